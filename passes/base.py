"""The contract of a pass, on top of torch's own `PassBase`."""

from __future__ import annotations

from abc import abstractmethod

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxprune.errors import FxpruneError, PassError, PostconditionError
from fxprune.graph.collector import collector_paused

__all__ = ["FxPass"]


class FxPass(PassBase):
    """A rewriting that works in place on the graph module it is given.

    Subclasses write `call`, and `requires` and `ensures` where they have something to check. The base class runs
    `requires`, `call`, then checks that the same object came back, lints, recompiles when something changed, and
    runs `ensures` on the result (torch's base class runs it on the input, and neither lints nor checks identity).
    """

    @collector_paused()
    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Applies the pass.

        Args:
            graph_module: Rewritten in place.

        Returns:
            The same graph module, and whether anything changed.

        Raises:
            PreconditionError: `requires` found the graph unfit.
            PassError: `call` failed.
            PostconditionError: The result is malformed: a defect of the pass.
        """
        self.requires(graph_module)
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
            try:
                graph_module.graph.lint()
            except Exception as error:
                raise PostconditionError(
                    f"{type(self).__name__} left a graph that does not lint: {error}"
                ) from error
            graph_module.recompile()
        self.ensures(graph_module)
        return result

    @abstractmethod
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrites the graph in place and tells whether anything changed."""
