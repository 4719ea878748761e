"""Finished scores on disk: what is kept comes back exactly, survives SIGKILL, and is never taken for another run's."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from fxprune.calibration.batches import CalibrationSet
from fxprune.discovery.discovery import discover
from fxprune.discovery.taps import find_tap
from fxprune.errors import ArtifactError, OptionError
from fxprune.graph.call import Inputs
from fxprune.graph.regions import AdaptorSite, Region, Side
from fxprune.graph.shapes import propagate_shapes
from fxprune.measurements import Interval, Latency, LatencyComparison
from fxprune.options import Backend, FitSettings
from fxprune.recovery.adaptors import AdaptorFit
from fxprune.recovery.original import Original
from fxprune.scoring.fingerprint import Fingerprint, fingerprint_of
from fxprune.scoring.store import ScoreStore
from fxprune.scoring.stored import StoredScorer, stored_latencies
from fxprune.tracing.trace import trace
from tests.motifs import Basic, conv

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = 6
SETTINGS = {"seed": 0, "backend": "torch"}


@dataclass
class Tiny:
    """A network of six basic blocks, ready to be scored."""

    gm: fx.GraphModule
    regions: tuple[Region, ...]
    tap: tuple[str, ...]
    calibration: CalibrationSet

    @property
    def original(self) -> Original:
        return Original(self.gm, self.tap, self.calibration)


def tiny(dtype: torch.dtype = torch.float32) -> Tiny:
    torch.manual_seed(0)
    blocks = [Basic() for _ in range(BLOCKS)]
    model = nn.Sequential(conv(3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    x = torch.randn(10, 3, 8, 8, dtype=dtype)
    gm = trace(model.to(dtype).eval(), (x[:2],))
    gm.requires_grad_(False)
    propagate_shapes(gm, (x[:2],), {})
    return Tiny(gm, discover(gm).regions, tuple(find_tap(gm, None)), CalibrationSet(Inputs((x,))))


class Pretender:
    """A scorer whose fits are made up from the labels; it counts, and takes its time."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self.continues = True
        self.workers = 1
        self.fitted: list[tuple[str, ...]] = []
        self.prepared: list[int] = []
        self.pause_s = pause_s

    def prepare(self, sets: Sequence[Sequence[Region]]) -> None:
        self.prepared.append(len(sets))

    def fit(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit:
        time.sleep(self.pause_s)
        labels = tuple(sorted(region.label for region in regions))
        self.fitted.append(labels)
        generator = torch.Generator().manual_seed(sum(map(ord, "".join(labels))))
        sites = [AdaptorSite(f"conv_{side.value}", side, 3, 1) for side in Side]
        maps = {site: torch.randn(3, 3, generator=generator) for site in sites}
        return AdaptorFit(maps, 0.1 + len(regions) / 3, 2 / 3)

    def estimate(self, regions: Sequence[Region], start: Sequence[AdaptorFit]) -> float:
        return self.fit(regions).loss / 7

    def release(self) -> None:
        """Nothing is held."""


def same(a: AdaptorFit, b: AdaptorFit) -> bool:
    maps = list(a.maps) == list(b.maps) and all(torch.equal(a.maps[s], b.maps[s]) for s in a.maps)
    return maps and (a.loss, a.loss_before) == (b.loss, b.loss_before)


@pytest.fixture(scope="module")
def network() -> Tiny:
    return tiny()


@pytest.fixture
def key(network: Tiny) -> Fingerprint:
    return fingerprint_of(network.original, SETTINGS)


def test_a_kept_fit_comes_back_bit_for_bit_whatever_the_order_of_its_regions(
    tmp_path: Path, network: Tiny, key: Fingerprint
) -> None:
    store = ScoreStore(tmp_path, key)
    pair = network.regions[:2]
    fit = replace(Pretender().fit(pair), loss=float("inf"))
    assert store.get(pair) is None
    store.put(pair, fit)
    again = ScoreStore(tmp_path, key).get(pair[::-1])
    assert again is not None
    assert same(fit, again)
    assert store.get(pair[:1]) is None
    assert len(store) == 1


def test_a_fit_without_adaptors_is_kept_too(tmp_path: Path, network: Tiny, key: Fingerprint) -> None:
    store = ScoreStore(tmp_path, key)
    store.put(network.regions[:1], AdaptorFit({}, 0.5, 0.5))
    found = store.get(network.regions[:1])
    assert found is not None
    assert same(found, AdaptorFit({}, 0.5, 0.5))


def test_a_second_run_computes_nothing_and_prepares_nothing(
    tmp_path: Path, network: Tiny, key: Fingerprint
) -> None:
    sets = [[region] for region in network.regions]
    for expected in (BLOCKS, 0):
        inner = Pretender()
        scorer = StoredScorer(inner, ScoreStore(tmp_path, key))
        scorer.prepare(sets)
        fits = [scorer.fit(regions) for regions in sets]
        assert len(inner.fitted) == expected
        assert inner.prepared == ([BLOCKS] if expected else [])
    assert all(same(fit, Pretender().fit(s)) for fit, s in zip(fits, sets, strict=True))


def test_a_scorer_hears_of_all_sets_even_if_some_are_finished(
    tmp_path: Path, network: Tiny, key: Fingerprint
) -> None:
    sets = [[region] for region in network.regions]
    store = ScoreStore(tmp_path, key)
    StoredScorer(Pretender(), store).fit(sets[0])
    inner = Pretender()
    scorer = StoredScorer(inner, store)
    scorer.prepare(sets)
    scorer.fit(sets[0])
    assert inner.prepared == []
    scorer.fit(sets[1])
    assert inner.prepared == [BLOCKS]


def test_fits_at_once_wait_until_the_scorer_has_prepared(
    tmp_path: Path, network: Tiny, key: Fingerprint
) -> None:
    class Slow(Pretender):
        def prepare(self, sets: Sequence[Sequence[Region]]) -> None:
            time.sleep(0.2)
            super().prepare(sets)

        def fit(self, regions: Sequence[Region], start: Sequence[AdaptorFit] = ()) -> AdaptorFit:
            assert self.prepared == [BLOCKS]
            return super().fit(regions, start)

    inner = Slow()
    scorer = StoredScorer(inner, ScoreStore(tmp_path, key))
    sets = [[region] for region in network.regions]
    scorer.prepare(sets)
    with ThreadPoolExecutor(BLOCKS) as pool:
        fits = list(pool.map(scorer.fit, sets))
    assert (len(inner.fitted), inner.prepared, len(scorer._store)) == (BLOCKS, [BLOCKS], BLOCKS)
    assert all(same(fit, Pretender().fit(regions)) for fit, regions in zip(fits, sets, strict=True))


def test_estimates_are_kept_apart_from_fits(tmp_path: Path, network: Tiny, key: Fingerprint) -> None:
    pair = network.regions[:2]
    wanted = Pretender().estimate(pair, ())
    computing, idle = Pretender(), Pretender()
    first = StoredScorer(computing, ScoreStore(tmp_path, key))
    assert first.fit(pair).loss == wanted * 7
    assert first.estimate(pair, ()) == wanted
    again = StoredScorer(idle, ScoreStore(tmp_path, key))
    assert again.estimate(pair[::-1], ()) == wanted
    assert (len(computing.fitted), idle.fitted) == (2, [])


def test_what_began_elsewhere_is_another_fit(tmp_path: Path, network: Tiny, key: Fingerprint) -> None:
    pair = network.regions[:2]
    starts = [(), [Pretender().fit([r]) for r in pair], [Pretender().fit([r]) for r in network.regions[1:3]]]
    for expected in (len(starts), 0):
        inner = Pretender()
        scorer = StoredScorer(inner, ScoreStore(tmp_path, key))
        for start in starts:
            scorer.fit(pair, start)
            scorer.estimate(pair, start)
        assert len(inner.fitted) == 2 * expected


def score_slowly(folder: str) -> None:
    network = tiny()
    store = ScoreStore(folder, fingerprint_of(network.original, SETTINGS))
    scorer = StoredScorer(Pretender(pause_s=0.3), store)
    for region in network.regions:
        scorer.fit([region])


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, network: Tiny, key: Fingerprint) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, __file__, str(tmp_path)], env=environment, cwd=ROOT) as run:
        limit = time.monotonic() + 50
        while len(list(tmp_path.glob("*/score-*"))) < 3:
            assert run.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
    finished = len(list(tmp_path.glob("*/score-*")))
    assert 3 <= finished < BLOCKS
    # the other process hashed graph, weights, images and settings to the same key
    inner = Pretender()
    scorer = StoredScorer(inner, ScoreStore(tmp_path, key))
    fits = [scorer.fit([region]) for region in network.regions]
    assert len(inner.fitted) == BLOCKS - finished
    assert all(same(f, Pretender().fit([r])) for f, r in zip(fits, network.regions, strict=True))


def altered_weights(network: Tiny) -> Fingerprint:
    other = tiny()
    with torch.no_grad():
        next(other.gm.parameters()).view(-1)[0] += 1e-6
    return fingerprint_of(other.original, SETTINGS)


def altered_graph(network: Tiny) -> Fingerprint:
    other = tiny()
    next(m for m in other.gm.modules() if isinstance(m, nn.BatchNorm2d)).eps = 1e-4
    return fingerprint_of(other.original, SETTINGS)


def altered_images(network: Tiny) -> Fingerprint:
    return fingerprint_of(replace(network.original, images=network.calibration.split(0.5, 0)[0]), SETTINGS)


def altered_settings(network: Tiny) -> Fingerprint:
    return fingerprint_of(network.original, {**SETTINGS, "seed": 1})


def altered_versions(network: Tiny) -> Fingerprint:
    return replace(fingerprint_of(network.original, SETTINGS), versions='{"torch": "0.4"}')


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (altered_weights, "weights"),
        (altered_graph, "graph"),
        (altered_images, "images"),
        (altered_settings, "settings (seed: 0, now 1)"),
        (altered_versions, "versions (fxprune: '"),
    ],
)
def test_another_run_starts_anew_and_says_why(
    tmp_path: Path, network: Tiny, key: Fingerprint, caplog: pytest.LogCaptureFixture, alter, reason: str
) -> None:
    region = network.regions[:1]
    store = ScoreStore(tmp_path, key)
    store.put(region, Pretender().fit(region))
    store.put_record("latency", "all", [1])
    (tmp_path / "report.json").write_text("mine")
    with caplog.at_level(logging.WARNING):
        new = ScoreStore(tmp_path, alter(network))
    assert f"starting anew, because these changed: {reason}" in caplog.text
    assert caplog.text.count(";") == 1 + caplog.text.count("features")  # one part changed, not several
    assert new.get(region) is None
    assert new.get_record("latency", "all") is None
    caplog.clear()
    ScoreStore(tmp_path, alter(network))
    assert caplog.text == ""


def test_going_back_to_an_earlier_question_finds_its_answers(
    tmp_path: Path, network: Tiny, key: Fingerprint
) -> None:
    region = network.regions[:1]
    fit = Pretender().fit(region)
    ScoreStore(tmp_path, key).put(region, fit)
    ScoreStore(tmp_path, altered_settings(network)).put(region, replace(fit, loss=9.0))
    found = [ScoreStore(tmp_path, k).get(region) for k in (key, altered_settings(network))]
    assert [one.loss for one in found if one is not None] == [fit.loss, 9.0]


def test_a_file_of_another_run_is_not_taken_for_this_ones(
    tmp_path: Path, network: Tiny, key: Fingerprint, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = ScoreStore(tmp_path, altered_settings(network)), ScoreStore(tmp_path, key)
    old.put(network.regions[:1], Pretender().fit(network.regions[:1]))
    old.put_record("latency", "all", [1])
    for path in old.folder.glob("*-*"):
        path.rename(new.folder / path.name)
    assert new.get(network.regions[:1]) is None
    assert new.get_record("latency", "all") is None
    assert caplog.text.count("belongs to another run") == 2


def test_an_entry_is_known_by_its_content_and_not_by_its_label(
    tmp_path: Path, network: Tiny, key: Fingerprint
) -> None:
    store, (first, second) = ScoreStore(tmp_path, key), network.regions[:2]
    store.put([first], Pretender().fit([first]))
    assert store.get([replace(second, label=first.label)]) is None
    assert store.get([replace(first, label="renamed")]) is not None


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text"])
def test_a_damaged_score_is_computed_again(
    tmp_path: Path, network: Tiny, key: Fingerprint, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    region = network.regions[:1]
    inner = Pretender()
    scorer = StoredScorer(inner, ScoreStore(tmp_path, key))
    wanted = scorer.fit(region)
    (path,) = tmp_path.glob("*/score-*")
    data = path.read_bytes()
    bad = {"cut": data[:-9], "empty": b"", "flipped": data[:-1] + bytes([data[-1] ^ 1]), "text": b"x" * 99}
    path.write_bytes(bad[damage])
    assert same(scorer.fit(region), wanted)
    assert "damaged" in caplog.text
    assert str(path) in caplog.text
    caplog.clear()
    assert same(scorer.fit(region), wanted)
    assert (len(inner.fitted), caplog.text) == (2, "")


def test_a_loss_that_was_changed_is_seen(
    tmp_path: Path, network: Tiny, key: Fingerprint, caplog: pytest.LogCaptureFixture
) -> None:
    store, region = ScoreStore(tmp_path, key), network.regions[:1]
    store.put(region, AdaptorFit({}, 0.5, 0.75))
    (path,) = tmp_path.glob("*/score-*")
    path.write_bytes(path.read_bytes().replace(b'loss\\": 0.5', b'loss\\": 0.4'))
    assert store.get(region) is None
    assert "wrong checksum" in caplog.text


def test_a_damaged_key_costs_no_score(tmp_path: Path, network: Tiny, key: Fingerprint) -> None:
    region = network.regions[:1]
    store = ScoreStore(tmp_path, key)
    store.put(region, Pretender().fit(region))
    (store.folder / "key.json").write_text('{"graph":')
    assert ScoreStore(tmp_path, key).get(region) is not None
    assert json.loads((store.folder / "key.json").read_text())["graph"] == key.graph


def test_a_full_disk_is_said_plainly_and_loses_nothing(
    tmp_path: Path, network: Tiny, key: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = StoredScorer(Pretender(), ScoreStore(tmp_path, key))
    scorer.fit(network.regions[:1])

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as stream:
            stream.write(data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(ArtifactError, match=r"disk is full.*The 1 scores finished before are kept in"):
            scorer.fit(network.regions[1:2])
    assert len(list(scorer._store.folder.iterdir())) == 2
    inner = Pretender()
    again = StoredScorer(inner, ScoreStore(tmp_path, key))
    for region in network.regions[:2]:
        again.fit([region])
    assert inner.fitted == [(network.regions[1].label,)]


def test_what_a_killed_write_left_goes_for_other_questions_too(
    tmp_path: Path, network: Tiny, key: Fingerprint
) -> None:
    other = ScoreStore(tmp_path, fingerprint_of(network.original, {"seed": 1}))
    other.put(network.regions[:1], Pretender().fit(network.regions[:1]))
    kept = {path.name for path in other.folder.iterdir()}
    for folder in (other.folder, ScoreStore(tmp_path, key).folder):
        left = folder / f".score-{os.getpid()}-0123abcd.safetensors"
        left.write_bytes(b"half")
        os.utime(left, (0, 0))
    store = ScoreStore(tmp_path, key)
    assert {path.name for path in other.folder.iterdir()} == kept
    assert [path.name for path in store.folder.iterdir()] == ["key.json"]


def test_settings_are_compared_by_value(network: Tiny) -> None:
    def digest(settings: dict[str, object]) -> str:
        return fingerprint_of(network.original, settings).digest

    fit = FitSettings(iterations=3)
    backend: Backend = "torch"
    assert digest({"fit": fit, "b": backend}) == digest({"b": "torch", "fit": FitSettings(iterations=3)})
    assert digest({"fit": fit}) != digest({"fit": FitSettings(iterations=4)})
    with pytest.raises(OptionError, match="no JSON form"):
        digest({"what": object()})


def comparison(ratio: float) -> LatencyComparison:
    latency = Latency("torch", "a CPU", (8, 3, 8, 8), 2, 1e-3 / 3, 2e-3, 1e-5, 40)
    return LatencyComparison(latency, replace(latency, median_s=ratio / 3e3), ratio, Interval(0.1, 0.2))


def test_latencies_are_measured_once_for_all_runs(tmp_path: Path, network: Tiny, key: Fingerprint) -> None:
    sets = [[region] for region in network.regions[:3]]
    calls: list[int] = []

    def measure(missing: Sequence[Sequence[Region]]) -> tuple[LatencyComparison, ...]:
        calls.append(len(missing))
        return tuple(comparison(1 / (7 + network.regions.index(one[0]))) for one in missing)

    wanted = measure(sets)
    for _ in range(2):
        assert stored_latencies(ScoreStore(tmp_path, key), sets[:2], {"batch": 8}, measure) == wanted[:2]
    # what is known already is neither measured again nor taken for something else
    store = ScoreStore(tmp_path, key)
    assert stored_latencies(store, sets[::-1], {"batch": 8}, measure) == wanted[::-1]
    assert stored_latencies(store, sets[:1], {"batch": 9}, measure) == wanted[:1]
    assert stored_latencies(None, sets[:2], {"batch": 8}, measure) == wanted[:2]
    assert calls == [3, 2, 1, 1, 2]


@pytest.mark.parametrize("content", ["", "[1]", "{}", "cut", "changed", "other fields"])
def test_damaged_latencies_are_measured_again(
    tmp_path: Path, network: Tiny, key: Fingerprint, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    store, sets = ScoreStore(tmp_path, key), [network.regions[:1]]
    assert stored_latencies(store, sets, {}, lambda _: [comparison(0.25)]) == (comparison(0.25),)
    (path,) = store.folder.glob("latency-*")
    text = path.read_text()
    if content == "other fields":
        store.put_record("latency", json.loads(text)["content"], {"ratio": 1})
    else:
        bad = {"cut": text[:-9], "changed": text.replace('"ratio": 0.25', '"ratio": 0.05')}
        path.write_text(bad.get(content, content))
    assert stored_latencies(store, sets, {}, lambda _: [comparison(0.5)]) == (comparison(0.5),)
    assert "again" in caplog.text
    assert json.loads(path.read_text())["value"]["ratio"] == 0.5


if __name__ == "__main__":
    score_slowly(sys.argv[1])
