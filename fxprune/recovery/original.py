"""What every stage of a compression looks at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxprune.calibration.batches import CalibrationSet
from fxprune.graph.extract import is_returned
from fxprune.recipes import FitSettings

__all__ = ["Original"]


@dataclass(frozen=True, slots=True)
class Original:
    """The network to be compressed, and what always goes with it.

    Attributes:
        graph: A private, frozen copy with shapes, on `device`.
        tap: Nodes whose values are the features that are compared.
        images: What is fitted on.
        device: Where everything runs.
        seed: Of every random draw.
    """

    graph: fx.GraphModule
    tap: tuple[str, ...]
    images: CalibrationSet
    device: str = "cpu"
    seed: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether the tap is what the network returns, as of one for segmentation, with no pooling behind it."""
        return is_returned(self.graph, self.tap)

    def images_per_step(self, settings: FitSettings) -> int:
        """How many of the images a step of some fit holds."""
        return settings.images_per_step(self.images.pixels, dense=self.is_dense)
