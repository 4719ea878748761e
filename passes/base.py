"""The contract of a pass, on top of torch's own `PassBase`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxprune.errors import FxpruneError, PassError, PostconditionError, PreconditionError

__all__ = ["FxPass"]


class FxPass(PassBase):
    """A rewriting that works in place on the graph module it is given.

    Subclasses write `call`, and `requires` and `ensures` where they have something to check. The base class runs
    `requires`, `call`, then checks that the same object came back, lints, recompiles when something changed, and
    runs `ensures` on the result (torch's base class runs it on the input, and neither lints nor checks identity).
    Whatever `requires` raises reaches the caller as a `PreconditionError`, whatever `ensures` raises as a
    `PostconditionError`; both name the pass and keep the nodes.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Applies the pass.

        Args:
            graph_module: Rewritten in place.

        Returns:
            The same graph module, and whether anything changed.

        Raises:
            PreconditionError: `requires` found the graph unfit.
            PassError: `call` failed. What it raises of fxprune's own errors stays what it is.
            PostconditionError: The result is malformed: a defect of the pass.
        """
        self._check(self.requires, graph_module, PreconditionError)
        try:
            result = self.call(graph_module)
        except FxpruneError:
            raise
        except Exception as error:
            raise PassError(f"{type(self).__name__} failed: {type(error).__name__}: {error}") from error
        if result.graph_module is not graph_module:
            raise PostconditionError(
                f"{type(self).__name__} works in place: its author must return the module that it was given"
            )
        if result.modified:
            self._finish(graph_module)
        self._check(self.ensures, graph_module, PostconditionError)
        return result

    def _check(
        self, check: Callable[[fx.GraphModule], None], graph_module: fx.GraphModule, kind: type[PassError]
    ) -> None:
        try:
            check(graph_module)
        except Exception as error:
            if isinstance(error, kind):
                raise error.within(type(self).__name__) from error
            reason = error if isinstance(error, FxpruneError) else f"{type(error).__name__}: {error}"
            raise kind(f"{type(self).__name__}: {reason}", nodes=getattr(error, "nodes", ())) from error

    def _finish(self, graph_module: fx.GraphModule) -> None:
        try:
            graph_module.graph.lint()
        except Exception as error:
            name = type(self).__name__
            raise PostconditionError(f"{name} left a graph that does not lint: {error}") from error
        graph_module.recompile()

    @abstractmethod
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrites the graph in place and tells whether anything changed."""
