"""What each region is worth in what can be counted, where the machine that will serve the network is not at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fxprune.errors import MeasurementError
from fxprune.graph.call import Inputs
from fxprune.graph.regions import Region
from fxprune.measurements import CountComparison
from fxprune.options import Cost
from fxprune.timing.savings import without

__all__ = ["count_savings", "flops", "parameters"]


def count_savings(
    gm: fx.GraphModule, regions: Sequence[Region], cost: Cost, image: Inputs
) -> tuple[CountComparison, ...]:
    """What the network needs without each region.

    Args:
        gm: The original.
        regions: What to leave out, one at a time.
        cost: `flops` or `parameters`.
        image: An example batch of one image, on the network's device.

    Raises:
        MeasurementError: Nothing of the network counts.
    """
    count: Callable[[fx.GraphModule], int]
    count = parameters if cost == "parameters" else lambda network: flops(network, image)
    before = count(gm)
    if not before:
        raise MeasurementError(
            f"cost is {cost!r}, and the network has none that can be counted; use cost='latency'"
        )
    return tuple(CountComparison(cost, before, count(without(gm, [region]))) for region in regions)


def parameters(gm: fx.GraphModule) -> int:
    """Values in the parameters that the graph uses, shared ones once."""
    used: dict[int, int] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            held = gm.get_submodule(node.target).parameters()
        elif node.op == "get_attr":
            parent, _, name = node.target.rpartition(".")
            value = getattr(gm.get_submodule(parent), name)
            held = iter([value] if isinstance(value, torch.nn.Parameter) else [])
        else:
            continue
        used.update((id(parameter), parameter.numel()) for parameter in held)
    return sum(used.values())


def flops(gm: fx.GraphModule, inputs: Inputs) -> int:
    """Floating-point operations of one call, as torch counts them: two for each multiply-add of dense operators.

    The network runs on fake tensors; where it cannot, for real.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    counter = FlopCounterMode(display=False)
    fake = inputs.map(lambda tensor: mode.from_tensor(tensor, static_shapes=True))
    try:
        with torch.no_grad(), mode, counter:
            gm(*fake.args, **fake.kwargs)
    except Exception:  # an operator without a fake kernel; what is wrong with the network itself fails again
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            gm(*inputs.args, **inputs.kwargs)
    return int(counter.get_total_flops())
