"""Asks a Triton server, and holds its answers against those of torch and onnxruntime in process.

It runs in the server's environment, which has neither torch nor fxprune.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as by_grpc
import tritonclient.http as by_http

Array = npt.NDArray[np.float32]
MODEL, VERSIONS = "net", ("1", "2")
CLIENTS, REQUESTS, ROUNDS = 16, 8, 5
TYPES = {"float32": "FP32", "int64": "INT64"}


class Server:
    """A server's two ports."""

    def __init__(self, http: int, grpc: int) -> None:
        self.urls = {by_http: f"127.0.0.1:{http}", by_grpc: f"127.0.0.1:{grpc}"}

    def client(self, protocol: Any = by_http) -> Any:
        """A client of its own for every thread: they are not to be shared."""
        return protocol.InferenceServerClient(self.urls[protocol])

    def ask(self, protocol: Any, model: str = MODEL, names: tuple[str, str] = ("input", "output")) -> Any:
        """A function from images and a version to answers."""
        client = self.client(protocol)

        def ask(images: Any, version: str = "", **form: bool) -> Any:
            entry = protocol.InferInput(names[0], images.shape, TYPES[str(images.dtype)])
            entry.set_data_from_numpy(images, **form)
            wanted = [protocol.InferRequestedOutput(names[1], **form)]
            return client.infer(model, [entry], model_version=version, outputs=wanted).as_numpy(names[1])

        return ask


class Expected:
    """Images, what the networks answer in process, and the largest difference that was seen."""

    def __init__(self, path: str) -> None:
        self.data = dict(np.load(path))
        self.images: Array = self.data["images"]
        self.worst = {"torch": 0.0, "onnxruntime": 0.0}
        self.tolerance = 1e-4 * max(1.0, float(np.abs(self.data["torch_1"]).max()))
        assert np.abs(self.data["torch_1"] - self.data["torch_2"]).max(1).min() > 10 * self.tolerance

    def compare(self, answer: Array, version: str, rows: slice) -> None:
        """Fails where an answer is not that of a version."""
        for runtime in self.worst:
            expected = self.data[f"{runtime}_{version}"][rows]
            assert answer.shape == expected.shape, (answer.shape, expected.shape)
            worst = float(np.abs(answer - expected).max())
            assert worst <= self.tolerance, f"version {version}: {worst:.3g} from {runtime}"
            self.worst[runtime] = max(self.worst[runtime], worst)

    def tell(self, what: str) -> None:
        """Says how far the answers were off, and begins anew."""
        print(
            f"{what}: " + ", ".join(f"at most {worst:.2g} from {name}" for name, worst in self.worst.items())
        )
        self.worst = dict.fromkeys(self.worst, 0.0)


def wait(server: Server, seconds: float = 60) -> None:
    """Until the server is ready."""
    end = time.monotonic() + seconds
    while True:
        try:
            if server.client().is_server_ready() and server.client().is_model_ready(MODEL):
                return
        except OSError:
            pass
        assert time.monotonic() < end, "the server is not ready"
        time.sleep(0.1)


def each_way(server: Server, expected: Expected) -> None:
    """Both protocols, both versions, and none; batches of one, two and seven."""
    client = server.client()
    assert client.get_model_metadata(MODEL)["versions"] == list(VERSIONS)
    ways: list[tuple[Any, dict[str, bool]]] = [
        (by_http, {}),
        (by_http, {"binary_data": False}),
        (by_grpc, {}),
    ]
    for protocol, form in ways:
        ask = server.ask(protocol)
        for version in (*VERSIONS, ""):
            for batch in (1, 2, 7):
                rows = slice(batch)
                expected.compare(ask(expected.images[rows], version, **form), version or VERSIONS[-1], rows)
    expected.tell("over HTTP, binary and JSON, and gRPC, batches of 1, 2 and 7, each version")


def other_models(server: Server) -> None:
    """Models with other configurations: the server takes them, and they answer."""
    for model, kind in (("free", np.float32), ("accelerated", np.float32), ("whole-numbers", np.int64)):
        images = np.ones((2, 3, 4, 4), kind)
        for protocol in (by_http, by_grpc):
            answer = server.ask(protocol, model, ("x", "total"))(images)
            np.testing.assert_array_equal(answer, [[96], [96]])
    print("free image size, accelerators listed, whole numbers: served")


def at_once(server: Server, expected: Expected) -> None:
    """Many clients, half of them by either protocol, and the versions in turns."""
    barrier = threading.Barrier(CLIENTS + 1)
    rates: dict[str, list[float]] = {version: [] for version in VERSIONS}

    def work(number: int, version: str) -> list[tuple[Array, slice]]:
        ask = server.ask((by_http, by_grpc)[number % 2])
        first = number * REQUESTS
        barrier.wait()
        rows = [slice(row, row + 1) for row in range(first, first + REQUESTS)]
        return [(ask(expected.images[one], version), one) for one in rows]

    for _ in range(ROUNDS):
        for version in VERSIONS:
            with ThreadPoolExecutor(CLIENTS) as pool:
                jobs = [pool.submit(work, number, version) for number in range(CLIENTS)]
                barrier.wait()
                start = time.perf_counter()
                answers = [answer for job in jobs for answer in job.result()]
                rates[version].append(len(answers) / (time.perf_counter() - start))
            for answer, rows in answers:
                expected.compare(answer, version, rows)
    expected.tell(f"{CLIENTS} clients at once")
    before, after = (statistics.median(rates[version]) for version in VERSIONS)
    ratio = statistics.median(b / a for a, b in zip(*rates.values(), strict=True))
    print(
        f"answers per second with {CLIENTS} clients, medians of {ROUNDS} turns, server and clients on the same cores: "
        f"{before:.0f} before, {after:.0f} after compression ({ratio:.2f} times)"
    )
    for one in server.client().get_inference_statistics(MODEL)["model_stats"]:
        print(f"version {one['version']}: {one['inference_count']} answers in {one['execution_count']} runs")


def during(server: Server, expected: Expected, change: Callable[[], None]) -> None:
    """Changes what is served while clients ask without a version: every request is answered, by one of the two."""
    done = threading.Event()
    rows = slice(1)

    def work(number: int) -> list[str]:
        ask, seen = server.ask((by_http, by_grpc)[number % 2]), []
        while not done.is_set():
            answer = ask(expected.images[rows])
            distances = {v: float(np.abs(answer - expected.data[f"torch_{v}"][rows]).max()) for v in VERSIONS}
            seen.append(min(distances, key=lambda version: distances[version]))
            assert distances[seen[-1]] <= expected.tolerance
        return seen

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(work, number) for number in range(4)]
        try:
            change()
            time.sleep(0.2)
        finally:
            done.set()
        for job in jobs:
            seen = job.result()
            assert sum(a != b for a, b in pairwise(seen)) <= 1, seen


def roll_back(server: Server, expected: Expected) -> None:
    """The original again, and the compressed one again, without a restart and without a lost request."""
    client, ask = server.client(), server.ask(by_http)
    for versions in ([1], [1, 2]):
        config = client.get_model_config(MODEL) | {"version_policy": {"specific": {"versions": versions}}}
        change = partial(client.load_model, MODEL, config=json.dumps(config))
        during(server, expected, change)
        assert [client.is_model_ready(MODEL, version) for version in VERSIONS] == [True, 2 in versions]
        expected.compare(ask(expected.images[:7]), str(versions[-1]), slice(7))
    expected.tell("rolled back to version 1 and forth again, without a restart or a lost request")


def written_anew(server: Server, expected: Expected) -> None:
    """The repository was written anew with the original alone: loading the model is enough."""
    client = server.client()
    during(server, expected, partial(client.load_model, MODEL))
    assert client.get_model_metadata(MODEL)["versions"] == ["1"]
    expected.compare(server.ask(by_grpc)(expected.images[:7]), "1", slice(7))
    expected.tell("written anew with the original alone, and loaded")


def main() -> None:
    """Runs the checks of one stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=("versions", "anew"))
    parser.add_argument("expected")
    parser.add_argument("ports", type=int, nargs=2)
    given = parser.parse_args()
    server, expected = Server(*given.ports), Expected(given.expected)
    wait(server)
    if given.stage == "anew":
        written_anew(server, expected)
        return
    each_way(server, expected)
    other_models(server)
    at_once(server, expected)
    roll_back(server, expected)


if __name__ == "__main__":
    main()
