"""Serves what `fxprune export` writes by a real Triton server, and asks it: `python -m tests.serve`.

The server comes from a package index, in an environment of its own, and listens on this machine alone. Where it cannot
run, the last line says why; anything that it answers wrongly is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto

import fxprune
from benchmarks.common.networks import MODELS
from fxprune.options import RECIPES
from fxprune.runtimes import onnxruntime
from fxprune.shell import cli
from tests.environments import CannotRunError, with_guests
from tests.test_triton import write

HERE = Path(__file__).resolve().parent
CUT = ["layer1.1", "layer1.2", "layer2.1", "layer2.2"]
IMAGES = 128


def main() -> int:
    """Makes everything, asks the server, and says what came of it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.serve", description="serve by a real Triton server"
    )
    parser.add_argument("--environment", type=Path, metavar="DIR", help="keep the server's environment here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            python = environment((given.environment or folder / "environment").resolve())
            backends(python, folder / "backends")
        except CannotRunError as error:
            print(f"tests.serve: not run: {error}")
            return 0
        compress(folder)
        export(folder, "out", "net", "--max-batch", "16", "--threads", "1")
        export_others(folder)
        with server(python, folder) as ports:
            ask(python, folder, "versions", ports)
            export(folder, "out", "net", "--versions", "original", "--overwrite")
            ask(python, folder, "anew", ports)
    print("tests.serve: all answers are those of torch and onnxruntime")
    return 0


def environment(folder: Path) -> Path:
    """The Python of an environment that holds the server and its clients."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise CannotRunError("the server's package is for Linux on x86_64 alone")
    library = sysconfig.get_config_var("INSTSONAME")
    try:
        ctypes.CDLL(str(Path(sysconfig.get_config_var("LIBDIR"), library)))
    except OSError:
        raise CannotRunError(f"{library} is missing, which Debian has as lib{python_name()}") from None
    return with_guests(folder, HERE / "requirements.txt")


def python_name() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def packages(python: Path) -> Path:
    return python.parent.parent / "lib" / python_name() / "site-packages"


def backends(python: Path, folder: Path) -> None:
    """The server's backend for Python, and ours in place of the one for ONNX; it follows no links."""
    triton = packages(python) / "pytriton" / "tritonserver"
    version = python_name().removeprefix("python")
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise CannotRunError(f"the server has no stub for Python {version}")
    shutil.copytree(triton / "backends" / "python", folder / "python")
    shutil.copy(stub, folder / "python")
    (folder / "python" / stub.name).chmod(0o755)
    (folder / "onnxruntime").mkdir()
    shutil.copy(HERE / "backend.py", folder / "onnxruntime" / "model.py")


def compress(folder: Path) -> None:
    """A compressed network with its original, and what both answer in process."""
    torch.manual_seed(0)
    model = MODELS["resnet20"].build().eval()
    images = torch.randn(IMAGES, 3, 32, 32)
    fast = RECIPES["fast"]
    brief = replace(
        fast, adaptor=replace(fast.adaptor, iterations=1), mimic=replace(fast.mimic, iterations=1)
    )
    small = fxprune.compress(
        model, images[:8], regions=CUT, recipe=brief, out=folder / "out", onnx=True, progress=False
    )
    expected = {"images": images.numpy()}
    for version, network, name in (("1", model, "original"), ("2", small, "model")):
        with torch.no_grad():
            expected[f"torch_{version}"] = network(images).numpy()
        session = onnxruntime.open_session(folder / "out" / f"{name}.onnx", device="cpu")
        (expected[f"onnxruntime_{version}"],) = onnxruntime.run(session, [images])
    np.savez(folder / "expected.npz", **expected)


def export(folder: Path, source: str, name: str, *arguments: str) -> None:
    """What a user would write."""
    command = ["export", str(folder / source), "--triton", str(folder / "models"), "--name", name, *arguments]
    assert cli.main([*command, "--quiet"]) == 0


def export_others(folder: Path) -> None:
    """Models with other configurations, which the server has to take as well."""
    write(folder / "free.onnx", x=["N", 3, "height", "width"])
    export(folder, "free.onnx", "free")
    write(folder / "plain.onnx")
    export(folder, "plain.onnx", "accelerated", "--accelerator", "tensorrt", "--max-batch", "8")
    write(folder / "whole.onnx", type=TensorProto.INT64)
    export(folder, "whole.onnx", "whole-numbers", "--max-queue-delay", "0")


@contextlib.contextmanager
def server(python: Path, folder: Path) -> Iterator[tuple[int, int]]:
    """A server of the models, by its two ports; what it logged is shown if anything fails."""
    ports = free_port(), free_port()
    site = packages(python)
    libraries = f"{site / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "PATH": f"{python.parent}:{os.environ['PATH']}",  # where the stub finds its packages
        "LD_LIBRARY_PATH": libraries,
    }
    models = ("net", "free", "accelerated", "whole-numbers")
    command = [
        str(site / "pytriton" / "tritonserver" / "bin" / "tritonserver"),
        f"--model-repository={folder / 'models'}",
        f"--backend-directory={folder / 'backends'}",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in models),
        "--http-address=127.0.0.1",
        f"--http-port={ports[0]}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={ports[1]}",
        "--allow-metrics=false",
        "--disable-auto-complete-config",
    ]
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield ports
    except BaseException:
        print(log.read_text(errors="replace")[-6000:])
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(python: Path, folder: Path, stage: str, ports: tuple[int, int]) -> None:
    """Has the client check a stage."""
    command = [str(python), str(HERE / "client.py"), stage, str(folder / "expected.npz"), *map(str, ports)]
    subprocess.run(command, check=True, timeout=240)


if __name__ == "__main__":
    sys.exit(main())
