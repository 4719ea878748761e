"""Timing: what is recorded, when it stops, what is refused; never how long anything took."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import DeviceError, MeasurementError, OptionError
from fxprune.export.onnx_file import export_onnx
from fxprune.measurements import Interval, LatencyComparison
from fxprune.timing import latency, rounds

QUICK = latency.TimingSettings(warmup=1, min_rounds=3, max_rounds=4, resamples=50)
X = torch.randn(2, 3, 8, 8)
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


def network(depth: int) -> nn.Sequential:
    torch.manual_seed(depth)
    return nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(depth)))


def require_sane(comparison: LatencyComparison, backend: str) -> None:
    for side in (comparison.before, comparison.after):
        assert (side.backend, side.batch_shape) == (backend, (2, 3, 8, 8))
        assert side.device == latency.device_name("cpu")
        assert side.threads >= 1
        assert 0 < side.median_s <= side.p95_s
        assert side.iqr_s >= 0
        assert side.runs >= QUICK.min_rounds
    assert 0 < comparison.interval.low <= comparison.ratio <= comparison.interval.high
    assert comparison.interval.level == QUICK.level


@pytest.mark.parametrize("backend", ["torch", "onnxruntime-cpu", "openvino"])
def test_every_candidate_gets_a_comparison(backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    found = latency.compare(network(3), [network(1), network(2)], [X], backend=backend, settings=QUICK)
    assert len(found) == 2
    for comparison in found:
        require_sane(comparison, backend)
    assert found[0].before == found[1].before


WAYS = {
    "torch": (torch.float32, True, False),
    "torch-channels-last": (torch.float32, False, False),
    "torch-bf16": (torch.bfloat16, True, False),
    "torch-compile": (torch.float32, True, True),
}


@pytest.mark.parametrize("backend", WAYS)
def test_torch_runs_networks_in_the_way_that_is_asked_for(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # inductor takes its time
    seen: set[tuple[torch.dtype, bool, bool]] = set()

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            compiling = torch.compiler.is_compiling()
            note(x.dtype, x.is_contiguous() and self.conv.weight.is_contiguous(), compiling)
            return self.conv(x)

    @torch.compiler.disable
    def note(*way: Any) -> None:
        seen.add(way)

    model = Spy().eval()
    samples = latency.take_samples([model, model], [X], backend, None, QUICK)
    assert seen == {WAYS[backend]}
    assert model.conv.weight.dtype == torch.float32 and model.conv.weight.is_contiguous()
    for told in samples.conditions:
        assert told["dtype"] == str(WAYS[backend][0]).removeprefix("torch.")
        assert told["compiled"] is WAYS[backend][2]
        assert (told["memory_format"] == "channels_last") is not WAYS[backend][1]


def test_what_cannot_be_compiled_is_said() -> None:
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}),
        pytest.raises(MeasurementError, match=r"before cannot be timed as torch-compile: .*C\+\+ compiler"),
    ):
        latency.compare(network(1), [network(1)], [X], backend="torch-compile", settings=QUICK)


def test_what_torch_would_leave_uncompiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.raises(MeasurementError, match=r"candidate 1 .*limit"),
    ):
        latency.compare(network(1), [network(2)], [X], backend="torch-compile", settings=QUICK)


@pytest.mark.slow
def test_inductor_compiles() -> None:
    (found,) = latency.compare(network(3), [network(1)], [X], backend="torch-compile", settings=QUICK)
    require_sane(found, "torch-compile")


def test_channels_last_needs_an_image() -> None:
    with pytest.raises(MeasurementError, match="no input has four dimensions"):
        latency.compare(nn.Identity(), [nn.Identity()], [X[0]], backend="torch-channels-last", settings=QUICK)


def test_onnx_files_are_timed_as_they_are(tmp_path: Path) -> None:
    export_onnx(network(2), tmp_path / "a.onnx", [X], verify=False)
    (found,) = latency.compare(
        tmp_path / "a.onnx", [str(tmp_path / "a.onnx")], [X], backend="onnxruntime-cpu", settings=QUICK
    )
    require_sane(found, "onnxruntime-cpu")


def test_the_callers_world_is_left_as_it_was() -> None:
    model = network(2).train()
    before = [p.clone() for p in model.parameters()]
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    settings = latency.TimingSettings(warmup=0, min_rounds=1, max_rounds=1, threads=threads + 1)
    (found,) = latency.compare(model, [model], [X], settings=settings)
    assert found.before.threads == threads + 1
    assert (torch.get_num_threads(), gc.isenabled()) == (threads, collecting)
    assert model.training
    assert not torch.is_inference_mode_enabled()
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, model.parameters(), strict=True))


def test_modules_run_in_evaluation_mode_without_gradients() -> None:
    seen: set[tuple[bool, bool]] = set()

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.add((self.training, torch.is_grad_enabled()))
            return x

    latency.compare(Spy().train(), [Spy().train()], [X], settings=QUICK)
    assert seen == {(False, False)}


def contestants(costs: list[float]) -> list[rounds.Contestant]:
    return [rounds.Contestant(f"c{cost}", lambda cost=cost: cost) for cost in costs]  # type: ignore[misc]


def told(call: Callable[[], None], repeats: int) -> float:
    """A clock that believes whatever the call returns."""
    return float(call())  # type: ignore[func-returns-value]


def test_steady_ratios_end_the_race_at_the_first_check() -> None:
    runners = contestants([2.0, 1.0, 4.0])
    settings = latency.TimingSettings(min_rounds=5, max_rounds=100)
    intervals = rounds.race(runners, told, settings)
    assert [len(r.samples) for r in runners] == [5, 5, 5]
    assert intervals == [Interval(0.5, 0.5), Interval(2.0, 2.0)]


def test_noise_prolongs_the_race_to_its_end_and_time_cuts_it() -> None:
    noise = itertools.cycle([1.0, 3.0, 2.0, 5.0, 0.4, 0.9, 1.7])

    def noisy(call: Callable[[], None], repeats: int) -> float:
        return next(noise)

    runners = contestants([1.0, 1.0])
    rounds.race(runners, noisy, latency.TimingSettings(min_rounds=3, max_rounds=40))
    assert len(runners[0].samples) == 40
    runners = contestants([1.0, 1.0])
    rounds.race(runners, noisy, latency.TimingSettings(min_rounds=3, max_rounds=40, max_seconds=1e-9))
    assert len(runners[0].samples) == 3


def test_drift_cancels_within_rounds_and_the_order_is_drawn() -> None:
    order: list[float] = []
    drift = itertools.count(1)

    def drifting(call: Callable[[], None], repeats: int) -> float:
        order.append(told(call, 1))
        return order[-1] * (1 + next(drift) // 2)

    runners = contestants([2.0, 1.0])
    settings = latency.TimingSettings(min_rounds=30, max_rounds=30)
    (interval,) = rounds.race(runners, drifting, settings)
    assert 0.4 < interval.low <= interval.high < 0.6
    firsts = order[::2]
    assert {1.0, 2.0} == set(firsts)


def test_short_calls_are_bundled_into_longer_samples() -> None:
    runners = contestants([1e-4, 1e-2])
    rounds.warm_up(runners, told, calls=0)
    assert [r.repeats for r in runners] == [50, 1]


@pytest.mark.parametrize(
    ("ratio", "width", "relative", "enough"),
    [(1.0, 0.1, 0.25, False), (1.0, 0.01, 0.25, True), (0.5, 0.2, 0.25, True), (0.5, 0.2, 0.1, False)],
)
def test_a_clear_difference_needs_no_narrow_interval(
    ratio: float, width: float, relative: float, enough: bool
) -> None:
    interval = Interval(ratio - width / 2, ratio + width / 2)
    settings = latency.TimingSettings(half_width=0.01, relative=relative)
    assert rounds._narrow(np.full(9, ratio), interval, settings) is enough


def test_the_interval_of_a_constant_is_that_constant() -> None:
    assert rounds.median_interval([0.7] * 20, level=0.9) == Interval(0.7, 0.7, 0.9)


def test_the_interval_follows_the_order_statistics() -> None:
    # For 101 equidistant values the median's 95 % interval spans about the 40th to the 60th.
    found = rounds.median_interval(np.arange(101.0), resamples=4000)
    assert found.low <= 50.0 <= found.high
    assert found.low == pytest.approx(40, abs=2.5)
    assert found.high == pytest.approx(60, abs=2.5)
    assert rounds.median_interval(np.arange(101.0), level=0.5).width < found.width
    assert rounds.median_interval(np.arange(9.0), seed=3) == rounds.median_interval(np.arange(9.0), seed=3)


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = (rounds.median_interval(rng.normal(size=31), resamples=300, seed=i) for i in range(300))
    hits = sum(one.low <= 0.0 <= one.high for one in intervals)
    assert 0.90 <= hits / 300 <= 0.99


@pytest.mark.parametrize(
    "change",
    [
        {"warmup": -1},
        {"min_rounds": 0},
        {"max_rounds": 3},
        {"max_seconds": 0.0},
        {"half_width": 0.0},
        {"relative": 0.0},
        {"level": 1.0},
        {"resamples": 0},
        {"threads": 0},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(change))):
        latency.TimingSettings(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "abacus"}, "unknown"),
        ({"backend": "onnxruntime-cpu", "device": "cuda"}, "contradicts"),
        ({"backend": "onnxruntime-cuda", "device": "cpu"}, "contradicts"),
        ({"backend": "openvino", "device": "cuda"}, "contradicts"),
        ({"backend": "tensorrt", "device": "cpu"}, "contradicts"),
        ({"device": "abacus"}, "unknown"),
        ({"backend": "onnxruntime-cuda", "device": "cuda:1"}, "first device"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        latency.compare(network(1), [network(1)], [X], **options)  # type: ignore[arg-type]


def test_no_inputs_and_no_candidates() -> None:
    with pytest.raises(OptionError, match="input"):
        latency.compare(network(1), [network(1)], [])
    assert latency.compare(network(1), [], [X]) == ()


@without_cuda
@pytest.mark.parametrize("options", [{"device": "cuda"}, {"backend": "onnxruntime-cuda"}])
def test_cuda_without_a_card_is_an_error(options: dict[str, str]) -> None:
    with pytest.raises(DeviceError, match="no CUDA device"):
        latency.compare(network(1), [network(1)], [X], **options)  # type: ignore[arg-type]


def test_openvino_that_is_missing_is_an_error_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DeviceError, match="OpenVINO is not installed"):
        latency.compare(network(1), [network(1)], [X], backend="openvino")
    with pytest.raises(DeviceError, match="OpenVINO is not installed"):
        fxprune.compress(network(1), [], k=1, backend="openvino")


@without_cuda
def test_no_name_for_a_card_that_is_not_there() -> None:
    with pytest.raises(DeviceError):
        latency.device_name("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("options", [{"device": "cuda"}, {"backend": "onnxruntime-cuda"}])
def test_cuda_is_timed_where_there_is_a_card(options: dict[str, str]) -> None:
    model = network(2)
    (found,) = latency.compare(model, [network(1)], [X], settings=QUICK, **options)  # type: ignore[arg-type]
    assert found.before.device == torch.cuda.get_device_name(0)
    assert found.before.threads == 0
    assert 0 < found.interval.low <= found.ratio <= found.interval.high
    assert next(model.parameters()).device.type == "cpu"


def test_files_are_not_for_torch_and_must_exist(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="choose another backend"):
        latency.compare(network(1), [tmp_path / "x.onnx"], [X], settings=QUICK)
    with pytest.raises(MeasurementError, match="does not exist"):
        latency.compare(tmp_path / "x.onnx", [network(1)], [X], backend="onnxruntime-cpu")


def test_the_network_that_fails_is_named() -> None:
    with pytest.raises(MeasurementError, match="candidate 1 could not be timed"):
        latency.compare(network(1), [nn.Linear(5, 5)], [X], settings=QUICK)
    with pytest.raises(MeasurementError, match="candidate 1 cannot be timed as ONNX"):
        latency.compare(network(1), [nn.Linear(5, 5)], [X], backend="onnxruntime-cpu", settings=QUICK)


def test_the_processor_has_a_name() -> None:
    assert latency.device_name("cpu").strip()


def test_inputs_by_name_are_refused_in_words() -> None:
    with pytest.raises(OptionError, match="inputs is a dict: give the tensors in the order of forward"):
        fxprune.measure(nn.Identity(), nn.Identity(), inputs={"x": torch.ones(1)})  # type: ignore[arg-type]  # refused
