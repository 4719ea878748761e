"""Dense operators: the linear maps over channels that adaptors stand beside and fold into.

An operator is known by the names of its parameters, so that a module call and an ATen function with `get_attr`
weights are the same thing to the rest of the package.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from fxprune.graph import operators as ops
from fxprune.graph import vocabulary
from fxprune.placement.algebra import Layout

__all__ = ["DenseOperator", "OperatorIndex"]


@dataclass(frozen=True, slots=True)
class DenseOperator:
    """One operator whose weights can absorb an adaptor.

    Attributes:
        node: Name of the operator's node.
        read: Qualified name of the weight that meets the input (a PRE adaptor folds into it).
        write: Qualified name of the weight that yields the output (a POST adaptor folds into it).
        bias: Qualified name of the bias added after `write`, None without one.
        in_channels: Channels read.
        out_channels: Channels written.
        data: Names of the nodes it reads data from (one, but three times the same for attention).
        output: Name of the node that holds its output tensor (an item of the result, for attention).
        refusal: Why no adaptor may stand here, "" when one may.
        layout: How its weights are laid out.
        groups: Groups of the map; adaptors fold only into 1.
    """

    node: str
    read: str
    write: str
    bias: str | None
    in_channels: int
    out_channels: int
    data: tuple[str, ...]
    output: str
    refusal: str
    layout: Layout = Layout.LINEAR
    groups: int = 1

    @property
    def channel_dim(self) -> int:
        """Dimension of the data tensors that holds the channels: 1 or -1."""
        return -1 if self.layout is Layout.LINEAR else 1


_LAYOUTS = {
    "linear": Layout.LINEAR,
    **{f"conv{n}d": Layout.CONV for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": Layout.CONV_TRANSPOSE for n in (1, 2, 3)},
}
_ATTENTION_FUNCTIONS = {"shifted_window_attention", "shifted_window_attention_3d"}
"""Functions over tokens that keep their projections as `qkv_weight` and `proj_weight`, with `proj_bias`."""


class OperatorIndex:
    """Every dense operator of a graph, and who else uses its weights.

    Operators are read when they are asked for, because a pass that works at a few sites needs no more.

    Args:
        gm: The graph module; make a new index after a rewrite.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        calls: list[str] = []
        owned: list[int] = []
        for node in gm.graph.nodes:
            module = ops.module_of(gm, node)
            if module is not None:
                calls.append(str(node.target))
                owned.extend({id(p) for part in ops.parts_of(module) for p in part._parameters.values()})
            elif node.op == "get_attr":
                value = attrgetter(str(node.target))(gm)
                if isinstance(value, nn.Parameter):
                    owned.extend([id(value)] * len(node.users))
        self._calls, self._owners = Counter(calls), Counter(owned)
        self._nodes = {node.name: node for node in gm.graph.nodes}
        self._found: dict[str, DenseOperator | None] = {}

    def __getitem__(self, name: str) -> DenseOperator:
        operator = self.get(name)
        if operator is None:
            raise KeyError(name)
        return operator

    def get(self, name: str) -> DenseOperator | None:
        """The operator at a node, None when the node is no dense operator."""
        if name not in self._found:
            self._found[name] = self._read(self._nodes[name]) if name in self._nodes else None
        return self._found[name]

    def writer(self, node: fx.Node) -> DenseOperator | None:
        """The operator whose output a node holds: its own, or that of the result it is an item of."""
        for source in (node, *node.all_input_nodes):
            operator = self.get(source.name)
            if operator is not None and operator.output == node.name:
                return operator
        return None

    def _read(self, node: fx.Node) -> DenseOperator | None:
        module, name = ops.module_of(self._gm, node), ops.op_name(self._gm, node)
        if isinstance(module, nn.MultiheadAttention):
            return self._attention(node, module)
        if name in _ATTENTION_FUNCTIONS:
            return self._attention_function(node)
        layout = _LAYOUTS.get(name)
        if layout is None:
            return None
        return self._function(node, layout) if module is None else self._module(node, module, layout)

    def _module(self, node: fx.Node, module: Any, layout: Layout) -> DenseOperator | None:
        source = ops.argument(node, 0, "input")
        weight = getattr(module, "weight", None)
        if not isinstance(source, fx.Node) or not isinstance(weight, torch.Tensor):
            return None
        path = str(node.target)
        bias = f"{path}.bias" if isinstance(getattr(module, "bias", None), torch.Tensor) else None
        groups, refusal = getattr(module, "groups", 1), self._module_refusal(node, module)
        return self._build(node, layout, f"{path}.weight", bias, weight.shape, groups, source, refusal)

    def _module_refusal(self, node: fx.Node, module: nn.Module) -> str:
        if self._calls[str(node.target)] > 1:
            return "the module is called more than once"
        if "weight" not in module._parameters:
            return "its weight is parametrised"
        plain = next(kind for kind in type(module).__mro__ if kind in vocabulary.MODULE_NAMES)
        if type(module).forward is not plain.forward and not _is_plain_map(module):
            return f"{type(module).__name__} does not apply its weight as {plain.__name__} does"
        if module._forward_hooks or module._forward_pre_hooks:
            return "the module has forward hooks"
        return ""

    def _function(self, node: fx.Node, layout: Layout) -> DenseOperator | None:
        source, weight, bias = (ops.argument(node, i, n) for i, n in enumerate(("input", "weight", "bias")))
        shape = ops.shape_of(weight) if isinstance(weight, fx.Node) else None
        if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node) or shape is None:
            return None
        stored = all(_stored(part) for part in (weight, bias) if isinstance(part, fx.Node))
        refusal = "" if stored else "its weight is computed, not stored"
        groups = ops.argument(node, 6, "groups", 1)  # of any convolution; linear layers take three arguments
        return self._build(node, layout, str(weight.target), _stored(bias), shape, groups, source, refusal)

    def _build(
        self,
        node: fx.Node,
        layout: Layout,
        weight: str,
        bias: str | None,
        shape: Sequence[int],
        groups: Any,
        source: fx.Node,
        refusal: str,
    ) -> DenseOperator:
        count = groups if isinstance(groups, int) else 1
        outer, inner = shape[0], shape[1] * count
        transposed = layout is Layout.CONV_TRANSPOSE
        return DenseOperator(
            node=node.name,
            read=weight,
            write=weight,
            bias=bias,
            in_channels=outer if transposed else inner,
            out_channels=inner if transposed else outer,
            data=(source.name,),
            output=node.name,
            refusal=refusal or ("it is grouped" if count != 1 else self._weight_refusal(weight)),
            layout=layout,
            groups=count,
        )

    def _weight_refusal(self, name: str) -> str:
        weight = attrgetter(name)(self._gm)
        if self._owners[id(weight)] > 1:
            return "its weight is used more than once"
        if not weight.dtype.is_floating_point:
            return f"its weight is {weight.dtype}"
        return "its weight is on the meta device" if weight.is_meta else ""

    def _attention(self, node: fx.Node, module: nn.MultiheadAttention) -> DenseOperator | None:
        sources = [ops.argument(node, i, name) for i, name in enumerate(("query", "key", "value"))]
        items = [u for u in node.users if ops.op_name(self._gm, u) == "getitem" and u.args[1] == 0]
        if not all(isinstance(s, fx.Node) for s in sources) or len(items) != 1:
            return None
        read, write = f"{node.target}.in_proj_weight", f"{node.target}.out_proj.weight"
        if self._calls[str(node.target)] > 1:
            refusal = "the module is called more than once"
        elif module.in_proj_weight is None or "in_proj_weight" not in module._parameters:
            refusal = "its projections are not packed"
        elif not isinstance(module.out_proj.weight, nn.Parameter):
            refusal = "its weight is parametrised"
        else:
            refusal = self._weight_refusal(read) or self._weight_refusal(write)
        return DenseOperator(
            node=node.name,
            read=read,
            write=write,
            bias=f"{node.target}.out_proj.bias" if module.out_proj.bias is not None else None,
            in_channels=module.embed_dim,
            out_channels=module.embed_dim,
            data=tuple(s.name for s in sources if isinstance(s, fx.Node)),
            output=items[0].name,
            refusal=refusal,
        )

    def _attention_function(self, node: fx.Node) -> DenseOperator | None:
        assert callable(node.target)  # it is a call_function node
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
        source, bias = given.get("input"), given.get("proj_bias")
        read, write = _stored(given.get("qkv_weight")), _stored(given.get("proj_weight"))
        if not isinstance(source, fx.Node) or read is None or write is None:
            return None
        return DenseOperator(
            node=node.name,
            read=read,
            write=write,
            bias=str(bias.target) if isinstance(bias, fx.Node) else None,
            in_channels=attrgetter(read)(self._gm).shape[1],
            out_channels=attrgetter(write)(self._gm).shape[0],
            data=(source.name,),
            output=node.name,
            refusal=self._weight_refusal(read) or self._weight_refusal(write),
        )


def _stored(node: Any) -> str | None:
    """Name of the tensor that a `get_attr` node reads, None for anything else."""
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _is_plain_map(module: nn.Module) -> bool:
    """Whether a subclass with a forward of its own still is linear in its input channels and in its weight.

    Decided by running it: scaling and mixing the weight's channels must do what mixing the input's or output's does.
    """
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or module.weight.is_meta:
        return False
    try:
        probe = copy.deepcopy(module).double().eval()
        generator = torch.Generator().manual_seed(0)
        side = max(8, 4 * max(module.kernel_size))
        x = torch.randn(1, module.in_channels, side, side, generator=generator, dtype=torch.float64)
        mix = torch.randn(module.in_channels, module.in_channels, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            expected = probe(torch.einsum("pi,nihw->nphw", mix, x))
            probe.weight.copy_(torch.einsum("ophw,pi->oihw", probe.weight, mix))
            return bool(torch.allclose(probe(x), expected, rtol=1e-9, atol=1e-9))
    except Exception:  # a module that cannot be probed is refused, with a reason, by the caller
        return False
