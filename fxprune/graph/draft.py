"""Graph modules whose Python code is written when somebody first wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

__all__ = ["Draft"]


class Draft(fx.GraphModule):
    """A graph module for several rewritings in a row.

    `fx.GraphModule` writes and compiles its code when it is made and after every pass, which takes longer than the
    passes themselves. A draft only notes that its code is outdated, and renews it before anybody reads or runs it. So
    a draft that is never run, because a part of it is taken out, costs no code at all.

    torch installs `forward` on a class that it makes for each graph module. While the code is outdated that class has
    none, so the lookup ends at the property here.
    """

    def recompile(self) -> Any:
        """Notes that the code is outdated; returns nothing, where the base class returns the code."""
        own = type(self)
        if "forward" in vars(own):
            del own.forward

    def _renew(self) -> None:
        if "forward" not in vars(type(self)):
            super().recompile()

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]  # read-only here, as on any graph module
        """The compiled code, as a bound method."""
        self._renew()
        method: Callable[..., Any] = vars(type(self))["forward"].__get__(self)
        return method

    @property
    def code(self) -> str:
        """The Python code of the graph as it stands."""
        self._renew()
        return super().code

    def __str__(self) -> str:
        self._renew()
        return super().__str__()
