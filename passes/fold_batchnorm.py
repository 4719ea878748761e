"""Folds batch normalisation into the convolution in front of it."""

from __future__ import annotations

import copy
from collections import Counter

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.utils.fusion import fuse_conv_bn_weights

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
    else reads, (3) a norm without running statistics or in training mode, (4) subclasses, whose forward may differ,
    (5) modules with forward hooks, which may change the weight or the output.
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
            conv, norm = pair
            assert norm.running_mean is not None
            assert norm.running_var is not None
            fused = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            folded = copy.deepcopy(conv)  # other graph modules may share the one there
            trained = conv.weight.requires_grad
            folded.weight, folded.bias = (nn.Parameter(p.detach(), requires_grad=trained) for p in fused)
            graph_module.set_submodule(str(node.all_input_nodes[0].target), folded)
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph_module.graph.erase_node(node)
            modified = True
        if modified:
            graph_module.delete_all_unused_submodules()
        return PassResult(graph_module, modified)


def _pair(
    gm: fx.GraphModule, node: fx.Node, calls: Counter[str]
) -> tuple[nn.Conv1d | nn.Conv2d | nn.Conv3d, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d] | None:
    if node.op != "call_module" or len(node.all_input_nodes) != 1:
        return None
    before = node.all_input_nodes[0]
    norm = gm.get_submodule(str(node.target))
    if before.op != "call_module" or type(norm) not in _NORMS:  # case 4
        return None
    conv = gm.get_submodule(str(before.target))
    if type(conv) not in _CONVOLUTIONS:  # case 4
        return None
    if calls[str(node.target)] > 1 or calls[str(before.target)] > 1:  # case 1
        return None
    if len(before.users) > 1:  # case 2
        return None
    assert isinstance(norm, _NORMS)
    assert isinstance(conv, _CONVOLUTIONS)
    if any(m._forward_hooks or m._forward_pre_hooks for m in (conv, norm)):  # case 5
        return None
    if norm.training or norm.running_mean is None or norm.running_var is None:  # case 3
        return None
    return conv, norm
