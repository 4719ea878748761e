"""Which residual blocks a natively smaller network keeps: the same names, with some left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fxprune.errors import OptionError

__all__ = ["surviving"]


def surviving(blocks: Sequence[str], droppable: Iterable[str], without: Iterable[str]) -> tuple[str, ...]:
    """Returns `blocks` less those that `without` names.

    Args:
        blocks: Labels of all blocks, such as `layer1.0`, in the order they run.
        droppable: Those of them that keep their input's shape.
        without: Labels to leave out; a path inside a block, such as `features.4.conv`, stands for the block,
            because the label of a region is the longest path its operators share.

    Raises:
        OptionError: If an entry of `without` lies in no droppable block.
    """
    allowed = tuple(droppable)
    gone = set()
    for label in without:
        matches = [block for block in allowed if label == block or label.startswith(f"{block}.")]
        if not matches:
            raise OptionError(
                f"cannot build the network without {label!r}: it is no block that keeps its input's shape; "
                f"choose from {', '.join(allowed)}"
            )
        gone.update(matches)
    return tuple(block for block in blocks if block not in gone)
