"""Graph rewritings, one to a file. They live at the root of the repository and are imported as `fxprune.passes`."""

if __name__ != "fxprune.passes":  # a second copy would have classes that are not the same
    raise ImportError("import fxprune.passes; the folder passes/ is not a package of its own")

from fxprune.passes.base import FxPass
from fxprune.passes.canonicalize import Canonicalize
from fxprune.passes.drop_regions import DropRegions
from fxprune.passes.fold_adaptors import FoldAdaptors
from fxprune.passes.fold_batchnorm import FoldBatchNorm
from fxprune.passes.insert_adaptors import Adaptor, InsertAdaptors
from fxprune.passes.propagate_shapes import PropagateShapes
from fxprune.passes.sequential import Cut, Prepare, Sequential
from fxprune.passes.store_weights import StoreWeights

__all__ = [
    "Adaptor",
    "Canonicalize",
    "Cut",
    "DropRegions",
    "FoldAdaptors",
    "FoldBatchNorm",
    "FxPass",
    "InsertAdaptors",
    "Prepare",
    "PropagateShapes",
    "Sequential",
    "StoreWeights",
]
