"""Inserts 1x1 adaptors beside dense operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from fxprune.errors import GraphError
from fxprune.graph.regions import AdaptorSite, Side
from fxprune.passes.base import FxPass
from fxprune.placement.dense import DenseOperator, OperatorIndex

__all__ = ["Adaptor", "InsertAdaptors"]


class Adaptor(nn.Module):
    """A square map over channels, without a bias by type, because a bias in front of zero padding would not fold.

    Begins as the identity, which leaves every value as it was, to the bit.

    Args:
        site: Where it stands.

    Attributes:
        weight: `[channels, channels]`.
    """

    def __init__(self, site: AdaptorSite) -> None:
        super().__init__()
        self.site = site
        self.weight = nn.Parameter(torch.eye(site.channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps the channels of `x`: dimension 1 beside convolutions, the last one beside linear layers."""
        if self.site.channel_dim == -1:
            return F.linear(x, self.weight)
        kernel = self.weight[(...,) + (None,) * (x.dim() - 2)]
        convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        return convolve(x, kernel)

    def extra_repr(self) -> str:
        """Shows the site."""
        return f"{self.site.operator}, {self.site.side.value}, channels={self.site.channels}"


class InsertAdaptors(FxPass):
    """Puts an identity adaptor at each site.

    ```
    PRE:    x ── conv            x ── adaptor ── conv
    POST:   conv ── bn     =>    conv ── adaptor ── bn
    ```

    Args:
        sites: From `fxprune.placement.placement.find_sites`; or by site the map `[channels, channels]` to begin with.
            Sites that hold an adaptor already are left alone.
    """

    def __init__(self, sites: Sequence[AdaptorSite] | Mapping[AdaptorSite, Tensor]) -> None:
        self._sites = tuple(sites)
        self._maps = sites if isinstance(sites, Mapping) else {}

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Every site must be a dense operator of this graph that can absorb its adaptor."""
        index = OperatorIndex(graph_module)
        for site in self._sites:
            operator = index.get(site.operator)
            if operator is None:
                raise GraphError(
                    f"site {site.operator} ({site.side.value}) is no dense operator of this graph; find the sites on "
                    "this very graph",
                    nodes=[site.operator],
                )
            width = operator.in_channels if site.side is Side.PRE else operator.out_channels
            reason, shape = operator.refusal, self._maps[site].shape if site in self._maps else (width, width)
            if not reason and width != site.channels:
                reason = f"it has {width} channels, not {site.channels}"
            if not reason and shape != (width, width):
                reason = f"it has {width} channels, and the map is {list(shape)}"
            if reason:
                raise GraphError(f"no adaptor fits at {site.operator}: {reason}", nodes=[site.operator])

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Inserts what is missing."""
        index = OperatorIndex(graph_module)
        operators = {site: index[site.operator] for site in self._sites}  # read before the graph changes
        present = {m.site for m in graph_module.modules() if isinstance(m, Adaptor)}
        missing = [site for site in self._sites if site not in present]
        nodes = {node.name: node for node in graph_module.graph.nodes}
        # PRE first: a POST adaptor changes what the next operator reads, which is still named by its old source
        for site in sorted(missing, key=lambda site: site.side is Side.POST):
            adaptor = _insert(graph_module, site, operators[site], nodes)
            if site in self._maps:
                adaptor.weight.data.copy_(self._maps[site])
        return PassResult(graph_module, bool(missing))


def _insert(
    gm: fx.GraphModule, site: AdaptorSite, operator: DenseOperator, nodes: dict[str, fx.Node]
) -> Adaptor:
    like: Tensor = attrgetter(operator.read)(gm)
    name = f"adaptor_{site.side.value}_{site.operator}"
    module = Adaptor(site).to(like.device, like.dtype)
    gm.add_submodule(name, module)
    node = nodes[site.operator]
    if site.side is Side.PRE:
        source = nodes[operator.data[0]]
        with gm.graph.inserting_before(node):
            adaptor = gm.graph.call_module(name, (source,))
        node.replace_input_with(source, adaptor)
    else:
        source = nodes[operator.output]
        with gm.graph.inserting_after(source):
            adaptor = gm.graph.call_module(name, (source,))
        source.replace_all_uses_with(adaptor, delete_user_cb=lambda user: user is not adaptor)
    adaptor.meta = {k: v for k, v in source.meta.items() if k == "tensor_meta"}
    return module
