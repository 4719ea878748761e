"""Several processes give what one gives, and none waits for a dead one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fxprune
from fxprune.errors import CalibrationError, DistributedError
from fxprune.graph.call import Inputs
from fxprune.graph.regions import Region
from fxprune.options import FitSettings
from fxprune.processes import group
from fxprune.recovery.adaptors import AdaptorFit
from fxprune.recovery.comparison import compare_whole
from fxprune.recovery.features import surviving_tap
from fxprune.recovery.recover import cut_and_fold
from fxprune.recovery.training import fit_features, trainable_parameters
from fxprune.scoring.end_to_end import EndToEndScorer
from fxprune.scoring.fingerprint import fingerprint_of
from fxprune.scoring.scorer import fit_all
from fxprune.scoring.store import ScoreStore
from fxprune.scoring.stored import StoredScorer
from tests.doubles import brief, count_latency
from tests.test_store import ROOT, Tiny, tiny
from tests.tiny import BLOCKS, images
from tests.tiny import tiny as four_blocks

# 7 of 10 images: a batch that two processes cannot halve
EVAL = FitSettings(iterations=8, batch_size=7, learning_rate=0.01)
ADAM = FitSettings(optimizer="adam", iterations=8, batch_size=7, learning_rate=1e-3)
TRAIN = FitSettings(iterations=3, batch_size=8, batch_norm="train")
SINGLE = FitSettings(iterations=2, batch_size=1)
LIMIT_S = 150


class EndToEnd:
    """PRACTISE's fit, two steps a candidate; it can be told to fail or to die at one region."""

    def __init__(self, network: Tiny, fails_at: str = "", dies_at: str = "") -> None:
        self.network, self.fails_at, self.dies_at = network, fails_at, dies_at
        self.continues = False
        self.workers = 1
        self.prepared: list[int] = []
        self.fitted = 0

    def prepare(self, sets: Sequence[Sequence[Region]]) -> None:
        self.prepared.append(len(sets))

    def fit(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit:
        self.fitted += 1
        labels = [region.label for region in regions]
        if self.dies_at in labels:
            os._exit(9)
        if self.fails_at in labels:
            raise CalibrationError(f"the loss of {self.fails_at} is nan")
        settings = FitSettings(iterations=2, batch_size=5)
        return EndToEndScorer(self.network.original, settings).fit(regions)

    def estimate(self, regions: Sequence[Region], start: Sequence[AdaptorFit]) -> float:
        return self.fit(regions).loss

    def release(self) -> None:
        """Nothing is held."""


def recovered(network: Tiny, settings: FitSettings, *, shared: bool) -> dict[str, Tensor]:
    regions = network.regions[1:2]
    student, _ = cut_and_fold(network.original, regions, {})
    comparison = compare_whole(network.original, student, surviving_tap(network.tap, regions))
    parameters = trainable_parameters(comparison.student)
    fit_features(comparison, parameters, network.original, settings, shared=shared)
    return {name: value.contiguous() for name, value in student.state_dict().items()}


def as_tensors(fits: Sequence[AdaptorFit]) -> dict[str, Tensor]:
    found = {}
    for i, fit in enumerate(fits):
        found[f"{i}.loss"] = torch.tensor([fit.loss, fit.loss_before], dtype=torch.float64)
        found |= {f"{i}.{s.operator}.{s.side.value}": m.contiguous() for s, m in fit.maps.items()}
    return found


def sets_of(network: Tiny) -> list[list[Region]]:
    return [*([region] for region in network.regions), list(network.regions[:2])]


def compressed(out: Path) -> dict[str, dict[str, Tensor]]:
    """What `compress` and `sweep` give from end to end, latencies counted; their reports lie in `out`."""
    settings: dict[str, Any] = {"recipe": brief(adaptor=2, mimic=3), "latency_batch": 2, "seed": 4}
    with pytest.MonkeyPatch.context() as patch:
        count_latency(patch)
        small = fxprune.compress(four_blocks(), images(), 2, out=out, progress=False, **settings)
        front = fxprune.sweep(four_blocks(), images(), progress=False, out=out / "sweep", **settings)
    losses = torch.tensor([point.recovery_loss for point in front.points], dtype=torch.float64)
    cut = torch.tensor([[BLOCKS.index(b) for b in fxprune.report(small).plan.chosen]])
    weights = {name: value.contiguous() for name, value in small.state_dict().items()}
    return {"compress": {**weights, "cut": cut}, "sweep": {"losses": losses}}


def work_together(folder: Path) -> None:
    network, exact = tiny(), tiny(torch.float64)
    number = group.rank()
    scorer = EndToEnd(network)
    fits = fit_all(scorer, sets_of(network))
    assert scorer.prepared == [7]
    save_file(as_tensors(fits), folder / f"fits-{number}.safetensors")
    for name, net, settings in (
        ("eval", network, EVAL),
        ("adam", exact, ADAM),
        ("train", network, TRAIN),
        ("single", network, SINGLE),
    ):
        save_file(recovered(net, settings, shared=True), folder / f"{name}-{number}.safetensors")
    order: list[int] = []
    facts = {
        "world": group.world_size(),
        "main": group.is_main(),
        "same": group.same_everywhere({"rank": number}),
        "on_main": group.on_main(lambda: [number, os.getpid()]),
        "first": group.main_first(lambda: (order.append(number), number)[1]),
        "calls": len(order),
    }
    for name, tensors in compressed(folder / "whole").items():
        save_file(tensors, folder / f"{name}-{number}.safetensors")
    try:
        group.on_main(lambda: 1 / 0)
    except (ZeroDivisionError, DistributedError) as error:
        facts["failure"] = f"{type(error).__name__}: {error}"
    (folder / f"facts-{number}.json").write_text(json.dumps(facts))


def score_with_store(folder: Path, fails_at: str = "", dies_at: str = "") -> None:
    network = tiny()
    key = fingerprint_of(network.original, {})
    store = group.main_first(lambda: ScoreStore(folder, key))
    scorer = StoredScorer(EndToEnd(network, fails_at, dies_at), store)
    fit_all(scorer, [[region] for region in network.regions])


def work_until_death(folder: Path) -> None:
    """All that two processes are tested for, in one start; rank 1 does not survive it."""
    work_together(folder)
    try:
        score_with_store(folder / "failed", fails_at=tiny().regions[5].label)
    except (CalibrationError, DistributedError) as error:
        (folder / f"error-{group.rank()}.txt").write_text(f"{type(error).__name__}: {error}")
    score_with_store(folder / "died", dies_at=tiny().regions[3].label)


def run_two(folder: Path) -> list[int]:
    """Exit status of each process, started as `torchrun` would; `output-N.txt` is what it wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    runs = []
    try:
        for r in range(2):
            with (folder / f"output-{r}.txt").open("w") as output:
                environment = {**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)}
                command = [sys.executable, __file__, str(folder)]
                runs.append(
                    subprocess.Popen(command, env=environment, cwd=ROOT, stderr=output, stdout=output)
                )
        return [run.wait(LIMIT_S) for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    status = run_two(folder)
    output = "\n".join((folder / f"output-{r}.txt").read_text() for r in range(2))
    assert status == [1, 9], output
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_two_processes_fit_what_one_fits(together: Path) -> None:
    wanted = as_tensors(fit_all(EndToEnd(tiny()), sets_of(tiny())))
    assert len(wanted) > 20
    for number in (0, 1):
        close(load_file(together / f"fits-{number}.safetensors"), wanted)


@pytest.mark.parametrize(
    ("name", "settings", "dtype"),
    [("eval", EVAL, torch.float32), ("adam", ADAM, torch.float64), ("single", SINGLE, torch.float32)],
)
def test_two_processes_recover_the_weights_that_one_recovers(
    together: Path, name: str, settings: FitSettings, dtype: torch.dtype
) -> None:
    network = tiny(dtype)
    start = network.gm.state_dict()
    wanted = recovered(network, settings, shared=True)
    assert any((wanted[k] - start[k]).abs().max() > 1e-4 for k in wanted)
    alone = recovered(network, settings, shared=False)
    assert all(torch.equal(wanted[k], alone[k]) for k in alone)
    found = [load_file(together / f"{name}-{number}.safetensors") for number in (0, 1)]
    close(found[0], wanted)
    assert all(torch.equal(found[0][k], found[1][k]) for k in wanted)


def test_batch_statistics_of_their_own_leave_all_processes_with_one_network(together: Path) -> None:
    found = [load_file(together / f"train-{number}.safetensors") for number in (0, 1)]
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    start = tiny().gm.state_dict()
    assert any("running_mean" in k and not torch.equal(v, start[k]) for k, v in found[0].items())


@pytest.mark.parametrize("name", ["compress", "sweep"])
def test_two_processes_give_as_a_whole_what_one_gives(together: Path, name: str, tmp_path: Path) -> None:
    wanted = compressed(tmp_path)[name]
    found = [load_file(together / f"{name}-{number}.safetensors") for number in (0, 1)]
    assert all(torch.equal(found[0][k], found[1][k]) for k in wanted)
    close(found[0], wanted)
    report = {"compress": "report.json", "sweep": "sweep/sweep.json"}[name]
    kept, alone = (json.loads((folder / report).read_text()) for folder in (together / "whole", tmp_path))
    for change in ("durations", "peak_memory_bytes"):  # what two processes need is their own
        kept.pop(change, None), alone.pop(change, None)
    assert kept.keys() == alone.keys()
    assert kept.get("plan", {}).get("chosen") == alone.get("plan", {}).get("chosen")


def test_objects_travel_from_the_main_process(together: Path) -> None:
    facts = [json.loads((together / f"facts-{number}.json").read_text()) for number in (0, 1)]
    assert [f["world"] for f in facts] == [2, 2]
    assert [f["main"] for f in facts] == [True, False]
    assert [f["same"] for f in facts] == [{"rank": 0}] * 2
    assert facts[0]["on_main"] == facts[1]["on_main"]
    assert [(f["first"], f["calls"]) for f in facts] == [(0, 1), (1, 1)]
    assert facts[0]["failure"] == "ZeroDivisionError: division by zero"
    assert facts[1]["failure"].startswith("DistributedError: rank 0 failed, so rank 1 ends too: ZeroDivision")


def finished(folder: Path) -> int:
    return len(list(folder.glob("*/score-*.safetensors")))


def test_a_process_that_fails_tells_the_others_why_and_loses_no_score(together: Path) -> None:
    label = tiny().regions[5].label  # the last of rank 1's three
    errors = [(together / f"error-{number}.txt").read_text() for number in (0, 1)]
    told = f"scoring failed elsewhere, so rank 0 ends too: rank 1: the loss of {label} is nan"
    assert errors == [f"DistributedError: {told}", f"CalibrationError: the loss of {label} is nan"]
    assert finished(together / "failed") == 5


def test_a_process_that_dies_ends_the_others_and_loses_no_score(together: Path) -> None:
    told = "DistributedError: process 0 of 2 lost the others while gathering scores: one of them ended"
    assert told in (together / "output-0.txt").read_text()
    assert finished(together / "died") == 4
    network = tiny()
    store = ScoreStore(together / "died", fingerprint_of(network.original, {}))
    inner = EndToEnd(network)
    fits = fit_all(StoredScorer(inner, store), [[region] for region in network.regions])
    assert inner.fitted == 2
    close(as_tensors(fits), as_tensors(fit_all(EndToEnd(network), [[r] for r in network.regions])))


def test_a_process_that_never_comes_is_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    start = time.monotonic()
    with pytest.raises(DistributedError, match=r"process 0 of 2 lost .* while meeting the other processes"):
        group.ensure_group(timeout_s=2.0)
    assert time.monotonic() - start < 20
    assert group.world_size() == 1


def test_without_a_group_everything_is_local() -> None:
    assert (group.rank(), group.world_size(), group.is_main()) == (0, 1, True)
    token = object()
    assert group.same_everywhere(token) is token
    assert group.on_main(lambda: token) is token
    assert group.main_first(lambda: token) is token
    with pytest.raises(ZeroDivisionError):
        group.on_main(lambda: 1 / 0)
    group.leave_group()


@pytest.mark.parametrize(
    ("cards", "local", "beside", "nccl", "chosen", "device"),
    [
        (0, 1, 2, True, "gloo", None),
        (2, 1, 2, True, "cpu:gloo,cuda:nccl", 1),
        (2, 1, 2, False, "gloo", 1),
        (2, 3, 4, True, "gloo", 1),  # two processes on each card
    ],
)
def test_gradients_travel_by_nccl_where_each_process_has_a_card(
    monkeypatch: pytest.MonkeyPatch,
    cards: int,
    local: int,
    beside: int,
    nccl: bool,
    chosen: str,
    device: int | None,
) -> None:
    given = {"RANK": local, "WORLD_SIZE": beside, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": beside}
    for variable, value in given.items():
        monkeypatch.setenv(variable, str(value))
    devices: list[int] = []
    backends: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **_: backends.append(backend)
    )
    group.ensure_group()
    assert (backends, devices) == ([chosen], [] if device is None else [device])


def test_without_torchrun_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert group.ensure_group() is False
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("count", "world"), [(7, 2), (64, 3), (2, 5), (1, 1)])
def test_shares_of_a_batch_are_disjoint_and_whole(
    monkeypatch: pytest.MonkeyPatch, count: int, world: int
) -> None:
    batch = Inputs((torch.arange(count),), {"mask": torch.arange(count) * 2})
    monkeypatch.setattr(group, "world_size", lambda: world)
    seen: list[int] = []
    weights = []
    for number in range(world):
        monkeypatch.setattr(group, "rank", lambda number=number: number)
        part, weight = group.share_of(batch)
        assert part.batch_size >= 1
        assert torch.equal(part.kwargs["mask"], part.args[0] * 2)
        assert weight == (part.batch_size / count if weight else 0.0)
        seen += part.args[0].tolist() if weight else []
        weights.append(weight)
    assert seen == list(range(count))
    assert sum(weights) == pytest.approx(1.0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert group.ensure_group(timeout_s=120.0)
    work_until_death(Path(sys.argv[1]))
