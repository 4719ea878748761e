"""Compressed networks as folders: made again elsewhere, trained further, and refused where anything was touched."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxprune
from fxprune.artifacts import recipe
from fxprune.errors import ArtifactError, GraphError, OptionError, PreconditionError
from fxprune.export.artifact import load_state
from fxprune.plan import Plan
from fxprune.reports.compression import CompressionReport
from fxprune.shell import cli
from tests.doubles import brief, count_latency
from tests.tiny import images, tiny

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "tests" / "samples"
FILES = ("model.pt2", "model.safetensors", "plan.json", "recipe.json", "report.json")
WAYS = ("factory", "alone")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Normed(nn.Module):
    """Three blocks with batch norms; one of the stem's parameters is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(4, 2)
        self.stem.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def normed() -> Normed:
    """With random weights, others at every call."""
    return Normed().eval()


def compress(model: nn.Module, folder: Path | None = None, **settings: Any) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        count_latency(patch)
        goal = {} if "k" in settings else {"regions": settings.pop("regions", ["body.1"])}
        return fxprune.compress(
            model,
            settings.pop("loader", images()),
            recipe=brief(),
            progress=False,
            latency_batch=2,
            out=folder,
            **goal,
            **settings,
        )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[fx.GraphModule, Path]:
    folder = tmp_path_factory.mktemp("kept") / "out"
    torch.manual_seed(0)
    small = compress(normed(), folder)
    assert isinstance(small, fx.GraphModule)
    return small, folder


def load(folder: Path, way: str) -> fx.GraphModule:
    gm = fxprune.load(folder, normed) if way == "factory" else fxprune.load(folder)
    assert isinstance(gm, fx.GraphModule)
    return gm


@pytest.fixture
def copied(kept: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(kept[1] / name, tmp_path)
    return tmp_path


# --- the same network ---

ELSEWHERE = """
import sys
import fxprune
from safetensors.torch import load_file, save_file
from tests.test_saving import load
folder, way, given, answer = sys.argv[1:]
gm = load(folder, way)
assert not gm.training and fxprune.report(gm).plan.chosen == ("body.1",)
save_file({"y": gm(load_file(given)["x"]).detach()}, answer)
"""


@pytest.mark.parametrize("way", WAYS)
def test_another_process_makes_the_same_network(
    way: str, kept: tuple[fx.GraphModule, Path], tmp_path: Path
) -> None:
    small, folder = kept
    x = images(3)
    save_file({"x": x}, tmp_path / "x.safetensors")
    arguments = [str(folder), way, str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], cwd=ROOT, check=True)
    torch.testing.assert_close(
        load_file(tmp_path / "y.safetensors")["y"], small(x).detach(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("way", WAYS)
def test_the_report_the_weights_and_what_was_frozen_come_back(
    way: str, kept: tuple[fx.GraphModule, Path]
) -> None:
    small, folder = kept
    again = load(folder, way)
    assert fxprune.report(again).to_dict() == fxprune.report(small).to_dict()
    assert again.state_dict().keys() == small.state_dict().keys()
    for name, tensor in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    frozen = {name for name, parameter in again.named_parameters() if not parameter.requires_grad}
    assert frozen == {"stem.bias"}


def test_names_of_an_onnx_file_outlive_folder_and_plan(tmp_path: Path) -> None:
    file, out, names = tmp_path / "net.onnx", tmp_path / "out", (("data",), ("scores:0",))
    fxprune.export_onnx(tiny(), file, images(2), input_names=names[0], output_names=names[1])
    compress(fxprune.from_onnx(file), out)
    fxprune.save(fxprune.load(out), tmp_path / "saved")
    loaded = (fxprune.load(tmp_path / "saved"), fxprune.load(out, lambda: fxprune.from_onnx(file)))
    for small in loaded:
        record = fxprune.export_onnx(small, tmp_path / "again.onnx")
        assert (record.inputs, record.outputs) == names
    argv = ["apply", str(out / "plan.json"), str(file), "--out", str(tmp_path / "applied"), "--quiet"]
    assert cli.main(argv) == 0
    graph = onnx.load(tmp_path / "applied" / "model.onnx").graph
    assert [entry.name for entry in (*graph.input, *graph.output)] == ["data", "scores:0"]


@pytest.mark.parametrize("cost", ["latency", "parameters"])
def test_scores_come_back_whatever_was_measured(cost: str) -> None:
    made = fxprune.report(compress(tiny(), k=1, cost=cost))
    again = CompressionReport.from_json(made.to_json())
    assert len(again.plan.scores) == 4 and again.plan == made.plan
    assert again.to_dict() == made.to_dict() and str(again) == str(made)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": {"scores": [{}]}}', "[" * 100_000])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        CompressionReport.from_json(text)


def train(gm: nn.Module, steps: int = 12) -> list[float]:
    """An ordinary training loop."""
    gm.train()
    optimizer = torch.optim.SGD([p for p in gm.parameters() if p.requires_grad], lr=0.05)
    x, labels = images(8), torch.arange(8) % 2
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(gm(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    gm.eval()
    return losses


@pytest.mark.parametrize("way", WAYS)
def test_what_was_loaded_trains_and_is_saved_again(
    way: str, kept: tuple[fx.GraphModule, Path], tmp_path: Path
) -> None:
    gm = load(kept[1], way)
    bias = gm.get_parameter("stem.bias").clone()
    losses = train(gm)
    assert losses[-1] < losses[0] - 0.01
    assert torch.equal(gm.get_parameter("stem.bias"), bias)
    fxprune.save(gm, tmp_path)
    for again in (load(tmp_path, other) for other in WAYS):
        torch.testing.assert_close(again(images(3)), gm(images(3)), rtol=0, atol=1e-6)
        assert fxprune.report(again).plan.chosen == ("body.1",)
    rebuilt = load(kept[1], way)
    rebuilt.load_state_dict(gm.state_dict())
    torch.testing.assert_close(rebuilt(images(3)), gm(images(3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_batch_norms_move_in_training_and_rest_in_evaluation(
    way: str, kept: tuple[fx.GraphModule, Path]
) -> None:
    gm = load(kept[1], way)
    mean = gm.get_buffer("body.0.norm.running_mean")
    before = mean.clone()
    gm(images(4))
    assert torch.equal(mean, before)
    gm.train()
    gm(images(4))
    assert not torch.equal(mean, before)


@pytest.mark.parametrize("way", WAYS)
def test_what_was_loaded_can_be_compressed_and_exported(
    way: str, kept: tuple[fx.GraphModule, Path], tmp_path: Path
) -> None:
    gm = load(kept[1], way)
    assert [r.label for r in fxprune.discover(gm).regions] == ["body.0", "body.2"]
    fxprune.export_onnx(gm, tmp_path / "model.onnx")  # it knows its example inputs
    smaller = compress(gm, tmp_path / "again", regions=["body.2"])
    again = fxprune.load(tmp_path / "again", gm)
    torch.testing.assert_close(again(images(2)), smaller(images(2)), rtol=0, atol=1e-6)


def test_half_precision_is_kept(kept: tuple[fx.GraphModule, Path], tmp_path: Path) -> None:
    half = load(kept[1], "alone").half()
    fxprune.save(half, tmp_path)
    for way in WAYS:
        gm = load(tmp_path, way)
        assert {p.dtype for p in gm.parameters()} == {torch.float16}
        torch.testing.assert_close(gm(images(2).half()), half(images(2).half()))


def test_inputs_by_name_and_nested_outputs_stay_what_they_are(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()

        def forward(self, pixels: Tensor, scale: float = 1.0, *, mask: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(pixels * mask) * scale}

    torch.manual_seed(0)
    model = Named().eval()
    batches = [{"pixels": images(4), "mask": torch.ones(4, 1, 1, 1)} for _ in range(2)]
    small = compress(model, tmp_path, loader=batches, regions=["net.body.0"])
    wanted = small(pixels=images(3), mask=torch.ones(3, 1, 1, 1))["logits"]
    for again in (fxprune.load(tmp_path), fxprune.load(tmp_path, lambda: Named().eval())):
        found = again(pixels=images(3), mask=torch.ones(3, 1, 1, 1))["logits"]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_a_part_is_made_again_in_its_whole(tmp_path: Path) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = normed()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if float(x.sum()) > 1e9 else self.net(x) + 1

    whole = compress(Whole().eval(), tmp_path, submodule="net")
    again = fxprune.load(tmp_path, Whole)
    assert isinstance(again, Whole)
    torch.testing.assert_close(again(images(2)), whole(images(2)), rtol=0, atol=1e-6)
    torch.testing.assert_close(fxprune.load(tmp_path)(images(2)), whole.get_submodule("net")(images(2)))
    with pytest.raises(OptionError, match="submodule 'net' of the model was compressed, and this Normed has"):
        fxprune.load(tmp_path, normed)
    with pytest.raises(GraphError, match=r"give model.get_submodule\('net'\)"):
        fxprune.save(whole, tmp_path)  # type: ignore[arg-type]  # refused
    part = whole.get_submodule("net")
    assert isinstance(part, fx.GraphModule)
    fxprune.save(part, tmp_path / "part")
    with pytest.raises(OptionError, match="only the inputs of its compressed part are known"):
        fxprune.export_onnx(whole, tmp_path / "model.onnx")


def test_original_weights_are_told_apart(kept: tuple[fx.GraphModule, Path], tmp_path: Path) -> None:
    digests = set()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        compress(normed(), tmp_path)
        digests.add(json.loads((tmp_path / "recipe.json").read_text())["original_weights"])
    assert len(digests) == 2 and all(len(digest) == 64 for digest in digests)


def test_only_what_compress_and_load_return_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="does not say what was cut from it"):
        fxprune.save(fxprune.trace(normed(), images(2)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_saved_leaves_the_one_before(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such operator")

    gm = load(copied, "factory")
    monkeypatch.setattr(torch.export, "export", refused)
    with pytest.raises(ArtifactError, match="no such operator"):
        fxprune.save(gm, copied)
    monkeypatch.undo()
    load(copied, "alone")


def test_an_interrupted_save_is_no_network(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    gm = load(copied, "factory")
    monkeypatch.setattr("fxprune.artifacts.saving.write_plan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxprune.save(gm, copied)
    with pytest.raises(ArtifactError, match=r"holds no recipe\.json, which is written last"):
        fxprune.load(copied)


# --- refused by name ---


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_and_named(name: str, way: str, copied: Path) -> None:
    data = bytearray((copied / name).read_bytes())
    for place in (0, len(data) // 3, len(data) - 3):
        data[place] ^= 1
        (copied / name).write_bytes(data)
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            load(copied, way)
        data[place] ^= 1
    (copied / name).write_bytes(data)
    load(copied, way)


@pytest.mark.parametrize("name", FILES)
def test_missing_and_truncated_files_are_named(name: str, copied: Path) -> None:
    data = (copied / name).read_bytes()
    for left in (data[: len(data) // 2], b""):
        (copied / name).write_bytes(left)
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            fxprune.load(copied)
    (copied / name).unlink()
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        fxprune.load(copied)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere.*cannot be read: No such file"):
        fxprune.load(tmp_path / "nowhere")


def resealed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes `recipe.json` as somebody would who knows how its checksum is made."""
    data = json.loads((folder / "recipe.json").read_text())
    change(data)
    data["sha256"] = data.pop("sha256")
    (folder / "recipe.json").write_bytes(recipe._sealed((json.dumps(data, indent=1) + "\n").encode()))


def hashed_anew(folder: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        for name in data["files"]:
            data["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()

    resealed(folder, change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format=3), r"recipe\.json has format 3, and fxprune .* reads format 1 and 2"),
        (lambda d: d["files"].update({"../x": "0" * 64}), r"lists '\.\./x', which is no file of a saved"),
        (lambda d: d["files"].update({"model.pkl": "0" * 64}), r"lists 'model\.pkl', which is no file"),
        (lambda d: d["files"].pop("model.safetensors"), r"lists no model\.safetensors"),
        (lambda d: d.pop("front_end"), r"recipe\.json is damaged"),
        (lambda d: d.update(front_end="jit"), r"recipe\.json is damaged"),
    ],
)
def test_recipes_of_another_kind_are_refused(
    change: Callable[[dict[str, Any]], None], words: str, copied: Path
) -> None:
    resealed(copied, change)
    with pytest.raises(ArtifactError, match=words):
        fxprune.load(copied)


def test_a_newer_plan_is_refused(copied: Path) -> None:
    text = (copied / "plan.json").read_text().replace('"format": 1', '"format": 9')
    (copied / "plan.json").write_text(text)
    hashed_anew(copied)
    with pytest.raises(ArtifactError, match=r"plan\.json has format 9"):
        fxprune.load(copied)


class Trap:
    """Makes a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_the_place_of_a_file_is_refused_and_not_run(name: str, way: str, copied: Path) -> None:
    trap = copied / "sprung"
    (copied / name).write_bytes(pickle.dumps(Trap(trap)))
    if name != "recipe.json":
        hashed_anew(copied)
    if (name, way) in {("model.pt2", "factory"), ("model.safetensors", "alone")}:
        load(copied, way)  # the file that is not needed is not opened
    else:
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            load(copied, way)
    assert not trap.exists()


def test_an_archive_with_a_pickle_inside_is_refused_and_not_run(copied: Path) -> None:
    trap = copied / "sprung"
    with zipfile.ZipFile(copied / "model.pt2", "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/data/constants/custom_obj_0", pickle.dumps(Trap(trap)))
    hashed_anew(copied)
    with pytest.raises(ArtifactError, match=r"model\.pt2 was refused: it holds the entry"):
        fxprune.load(copied)
    assert not trap.exists()


def test_files_that_belong_to_nothing_are_not_read(copied: Path) -> None:
    trap = copied / "sprung"
    (copied / "model.pt").write_bytes(pickle.dumps(Trap(trap)))
    load(copied, "alone")
    assert not trap.exists()


def test_a_factory_of_another_network_is_refused(kept: tuple[fx.GraphModule, Path]) -> None:
    class Other(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 7)

    with pytest.raises(ArtifactError, match=r"do not fit Other without body\.1: .*head\.weight"):
        fxprune.load(kept[1], Other)
    with pytest.raises(PreconditionError, match=r"the plan names body\.1, and no region is called that"):
        fxprune.load(kept[1], nn.Sequential(nn.Conv2d(3, 2, 3)))


# --- the shell ---


def test_the_shell_makes_a_network_again_from_its_plan(
    kept: tuple[fx.GraphModule, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "network.py", tmp_path / "out"
    source.write_text("from tests.test_saving import normed\n")
    argv = ["apply", str(kept[1] / "plan.json"), f"{source}:normed", "--out", str(out)]
    assert cli.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cut"] == ["body.1"] and told["parameters"] == sum(p.numel() for p in kept[0].parameters())
    assert {path.name for path in out.iterdir()} == {*FILES, "model.onnx"} - {"report.json"}
    again = fxprune.load(out)
    torch.testing.assert_close(again(images(2)), kept[0](images(2)), rtol=0, atol=1e-6)
    with pytest.raises(GraphError, match="carries no report"):
        fxprune.report(again)
    assert cli.main(["inspect", str(out), "--input-shape", "1,3,16,16"]) == 0
    assert "2 droppable regions" in capsys.readouterr().out
    assert cli.main([*argv, "--weights", str(tmp_path / "nowhere.safetensors")]) == 1
    assert "nowhere.safetensors cannot be read" in capsys.readouterr().err


def test_the_shell_tells_where_plans_of_parts_are_applied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "network.py"
    source.write_text("from tests.test_saving import normed\n")
    compress(nn.Sequential(normed(), nn.Linear(2, 2)).eval(), tmp_path / "small", submodule="0")
    plan, out = tmp_path / "small" / "plan.json", tmp_path / "out"
    assert cli.main(["apply", str(plan), f"{source}:normed", "--out", str(out)]) == 1
    assert "is of a part of a model (0): in Python, fxprune.load(" in capsys.readouterr().err


def test_a_saved_network_that_was_changed_is_none_in_the_shell(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "plan.json").write_text("{}")
    assert cli.main(["inspect", str(copied)]) == 1
    assert "plan.json was changed" in capsys.readouterr().err


# --- what was released ---


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sample", sorted(SAMPLES.iterdir()), ids=lambda path: path.name)
def test_every_format_that_was_released_is_still_read(sample: Path, way: str) -> None:
    """Each sample holds a network of `normed`, what it was given, and what it answered when it was saved."""
    written = json.loads((sample / "recipe.json").read_text())["versions"]["torch"]
    if way == "alone" and version(torch.__version__) < version(written):
        pytest.skip(f"torch {written} wrote model.pt2, and older ones need not read it")
    gm = load(sample, way)
    known = load_state(sample / "answers.safetensors")
    torch.testing.assert_close(gm(known["x"]), known["y"], rtol=0, atol=1e-5)
    assert fxprune.report(gm).plan.chosen == ("body.1",)
    assert [cut.label for cut in Plan.read(sample / "plan.json").cuts] == ["body.1"]


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])
