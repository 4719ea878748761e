"""Fitting the adaptors of a candidate: the network without some regions, with 1x1 maps beside the cut.

A candidate shares every weight with the original; only its adaptors are its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxprune.graph.extract import share
from fxprune.graph.regions import AdaptorSite, Region, every_call
from fxprune.passes import Adaptor, Cut
from fxprune.placement.placement import find_sites
from fxprune.recovery.features import surviving_tap

__all__ = ["AdaptorFit", "Candidate", "adaptor_weights"]


@dataclass(frozen=True, slots=True)
class AdaptorFit:
    """What fitting the adaptors of one set of regions gave.

    Attributes:
        maps: The adaptor of each site, `[channels, channels]`.
        loss: Recovery loss: mean squared error at the tap over the calibration images (PRACTISE, eq. 1).
        loss_before: The same with the adaptors at identity: the distance that the bare cut causes.
    """

    maps: Mapping[AdaptorSite, Tensor]
    loss: float
    loss_before: float


class Candidate:
    """The network without some regions, adaptors in place.

    Args:
        gm: The original, with shapes; it is shared, not changed.
        regions: What to drop.
        tap: Where features are read in the original.
    """

    def __init__(self, gm: fx.GraphModule, regions: Sequence[Region], tap: Sequence[str]) -> None:
        self.regions = every_call(regions)
        self.placement = find_sites(gm, regions)
        self.graph = share(gm)
        Cut(regions, self.placement.sites, fold=False)(self.graph)
        self.tap = surviving_tap(tap, regions)
        self.adaptors = {m.site: m for m in self.graph.modules() if isinstance(m, Adaptor)}

    def adaptor_nodes(self) -> list[str]:
        """Names of the adaptors' nodes, in graph order."""
        targets = {name for name, m in self.graph.named_modules() if isinstance(m, Adaptor)}
        return [n.name for n in self.graph.graph.nodes if n.op == "call_module" and str(n.target) in targets]

    @torch.no_grad()
    def begin_at(self, fits: Sequence[AdaptorFit]) -> None:
        """Sets each adaptor to the identity and all that some fits, of parts of the set, changed in it."""
        for site, adaptor in self.adaptors.items():
            eye = torch.eye(len(adaptor.weight)).to(adaptor.weight)
            known = [fit.maps[site].to(eye) for fit in fits if site in fit.maps]
            adaptor.weight.copy_(eye + sum(weights - eye for weights in known))

    def maps(self) -> dict[AdaptorSite, Tensor]:
        """The adaptors' weights as they stand."""
        return {site: adaptor.weight.detach().clone() for site, adaptor in self.adaptors.items()}


def adaptor_weights(part: fx.GraphModule) -> list[nn.Parameter]:
    """Weights of the adaptors that a part computes with; one behind the tap, on the classifier, stays the identity."""
    return [module.weight for module in part.modules() if isinstance(module, Adaptor)]
