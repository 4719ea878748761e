"""Folds batch normalisation into the convolution in front of it."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fxprune.graph import operators as ops
from fxprune.passes.base import FxPass

__all__ = ["FoldBatchNorm"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FoldBatchNorm(FxPass):
    """Folds evaluation-mode batch norms into their convolutions.

    ```
    conv(W, b) ── bn(gamma, beta, mean, var) ── next   =>   conv(W', b') ── next
    ```

    Left alone: (1) a convolution or a norm that is called more than once, (2) a convolution whose output something
    else reads, (3) a norm without running statistics, or either in training mode, (4) subclasses, whose forward may
    differ, (5) modules with forward hooks, which may change the weight or the output.
    A folded convolution is a new module, so that graph modules that share the old one keep it as it was. onnxruntime
    does this itself; the pass is for networks that stay in torch.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Folds every pair that qualifies."""
        calls = Counter(str(n.target) for n in graph_module.graph.nodes if n.op == "call_module")
        modified = False
        for node in list(graph_module.graph.nodes):
            pair = _pair(graph_module, node, calls)
            if pair is None:
                continue
            folded = fuse_conv_bn_eval(*pair).requires_grad_(pair[0].weight.requires_grad)
            graph_module.set_submodule(str(node.all_input_nodes[0].target), folded)
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph_module.graph.erase_node(node)
            modified = True
        if modified:
            graph_module.delete_all_unused_submodules()
        return PassResult(graph_module, modified)


def _pair(gm: fx.GraphModule, node: fx.Node, calls: Counter[str]) -> tuple[_ConvNd, _BatchNorm] | None:
    before = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else node
    conv, norm = ops.module_of(gm, before), ops.module_of(gm, node)
    if not isinstance(conv, _CONVOLUTIONS) or not isinstance(norm, _NORMS):
        return None
    stays = (
        calls[str(node.target)] > 1 or calls[str(before.target)] > 1,  # case 1
        len(before.users) > 1,  # case 2
        conv.training or norm.training or norm.running_mean is None,  # case 3
        type(conv) not in _CONVOLUTIONS or type(norm) not in _NORMS,  # case 4
        any(m._forward_hooks or m._forward_pre_hooks for m in (conv, norm)),  # case 5
    )
    return None if any(stays) else (conv, norm)
