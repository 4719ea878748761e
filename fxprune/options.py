"""What users ask for, frozen and validated when it is written down, so that nothing fails late."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, TypeVar, cast, get_args

from fxprune.backends import Backend
from fxprune.errors import OptionError
from fxprune.plan import Plan
from fxprune.recipes import RECIPES, FitSettings, Recipe, Selection, recipe_named
from fxprune.validation import TORCH_PRUNING, folder, is_number, is_whole, listed, names, one_of, require

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "RECIPES",
    "Backend",
    "CompressSettings",
    "Cost",
    "Criterion",
    "FitSettings",
    "FrontEnd",
    "KindName",
    "Options",
    "Recipe",
    "Selection",
    "Settings",
    "recipe_named",
    "takes",
]

Cost = Literal["latency", "flops", "parameters"]
Criterion = Literal["recovery", "l2", "kl"]
FrontEnd = Literal["auto", "fx", "export"]
KindName = Literal["identity", "projection", "sequential"]

_SEEDS = 2**63
_MOST_THREADS = 4096

Function = TypeVar("Function", bound=Callable[..., Any])
Loss: TypeAlias = "Callable[[Any, Any], Any]"
Patterns: TypeAlias = "str | Callable[[Any], bool] | Sequence[str | Callable[[Any], bool]]"


class Settings(TypedDict, total=False):
    """Keywords that `fxprune.compress` and `fxprune.sweep` share, as people write them; see `Options`."""

    recipe: str | Recipe
    criterion: Criterion | Loss
    selection: Selection | None
    cost: Cost
    backend: Backend
    device: str | None
    kinds: str | Iterable[str]
    ignore: Patterns
    tap: str | None
    front_end: FrontEnd
    input_fn: Callable[[Any], Any] | None
    images: int
    labels: Any
    latency_batch: int | None
    cache_bytes: int
    seed: int
    threads: int | None
    out: str | os.PathLike[str] | None
    progress: bool | None


class CompressSettings(Settings, total=False):
    """Keywords of `fxprune.compress`."""

    target_speedup: float | None
    target_latency_ms: float | None
    regions: Iterable[str]
    plan: str | os.PathLike[str] | Plan | None
    min_agreement: float | None
    onnx: bool
    fp16: bool
    int8: bool


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that was asked for: signatures, the shell, reports and the keys of finished work come from it.

    Attributes:
        k: How many regions to cut.
        target_speedup: Alternatively, how much faster: original latency over new latency, above 1.
        target_latency_ms: Alternatively, the latency to reach, in milliseconds.
        regions: Alternatively, labels of what to cut, as `fxprune.discover` and reports name it: exactly these go, and
            nothing is scored or timed to choose.
        plan: Alternatively, the `plan.json` of an earlier compression: exactly its blocks go, if each is there, and of
            the kind and shape that the plan says. `kinds` is then the plan's own.
        min_agreement: Least top-1 agreement with the original on held-back calibration images, before the last steps
            fit them, in [0, 1]; with `int8` also of the file in eight bits with the one in single precision.
        recipe: `fast`, `practise` (the paper's settings to the letter), or a `Recipe`.
        criterion: `recovery` (PRACTISE, eq. 1); `l2` (distance of the features) or `kl` (CURL) judge the bare cut, and
            so does a function of your own, such as one of torch's losses: called with what the network without some
            regions and the original give for a batch, it returns a number, smaller the nearer they are, that is the
            mean over the images. Its scores are not kept in `out`.
        selection: `greedy` scores again after every cut, `independent` takes the k best scores, `exact` tries all sets;
            by default what the recipe says.
        cost: What a cut is to save: `latency`, measured, or `flops` or `parameters`, counted, where the machine at hand
            is not the one that will serve. A target is one of latency, and needs it.
        backend: Where latency counts; see `docs/measuring.md`.
        device: Where recovery runs, and torch is timed: `cpu`, `cuda` or `cuda:N`; by default where the model is.
        kinds: Kinds of region that may be cut; see `fxprune.discover`.
        ignore: What must stay; see `fxprune.discover`.
        tap: Node or module whose output is mimicked, if not the features before the final pooling.
        submodule: Path of the part to compress, of a model that cannot be traced as a whole, or paths of several; see
            `fxprune.compress`.
        front_end: How the network is captured; see `fxprune.trace`.
        input_fn: Turns one of the loader's batches into a tensor, a tuple of arguments or a dict of keywords.
        images: Most calibration images to use; of 20 or more a fifth is held back, to measure on what nothing was
            fitted to, before the last steps of mimicking fit all.
        labels: Labelled images to measure accuracy on, never to fit to: a loader that can be read several times, whose
            batches are `(inputs, labels)`, or a dataset of such pairs. Inputs are like the calibration images, labels
            are whole numbers `[N]`, indices of the network's outputs. `input_fn` is given the whole pair.
        latency_batch: Images in a timed batch; by default 64 on CUDA and 8 on the CPU.
        cache_bytes: Memory for cached activations; where they do not fit, fewer images are cached. Fits side by
            side may take a quarter of it more.
        seed: Of every random draw. The same seed and number of threads give the same plan as long as measured
            latencies order the same.
        threads: Of torch and the runtimes on the CPU; by default torch's present number, or as many as the process may
            use cores if those are fewer.
        out: Folder for the results, and for finished work: a run that was interrupted goes on from there.
        onnx: Whether `original.onnx` and `model.onnx` are among the results.
        fp16: Whether `model.fp16.onnx` lies beside them; see `fxprune.export_onnx`.
        int8: Whether `model.int8.onnx` does, in the ranges of the calibration images; see `fxprune.export_onnx`.
        progress: Whether to draw progress bars; by default on a terminal and in a notebook.

    Raises:
        OptionError: A value is out of range, or contradicts another.
    """

    k: int | None = None
    target_speedup: float | None = None
    target_latency_ms: float | None = None
    regions: tuple[str, ...] = ()
    plan: Plan | None = None
    min_agreement: float | None = None
    recipe: Recipe = RECIPES["fast"]
    criterion: Criterion | Loss = "recovery"
    selection: Selection | None = None
    cost: Cost = "latency"
    backend: Backend = "torch"
    device: str | None = None
    kinds: tuple[KindName, ...] = ("identity",)
    ignore: tuple[str | Callable[[Any], bool], ...] = ()
    tap: str | None = None
    submodule: str | tuple[str, ...] | None = None
    front_end: FrontEnd = "auto"
    input_fn: Callable[[Any], Any] | None = None
    images: int = 500
    labels: Any = None
    latency_batch: int | None = None
    cache_bytes: int = 2 * 2**30
    seed: int = 0
    threads: int | None = None
    out: str | None = None
    onnx: bool = False
    fp16: bool = False
    int8: bool = False
    progress: bool | None = None

    @classmethod
    def of(
        cls,
        k: int | None = None,
        submodule: str | Iterable[str] | None = None,
        **settings: Unpack[CompressSettings],
    ) -> Options:
        """Options from keywords as people write them: a recipe by its name, one pattern for a tuple of one, a path.

        Raises:
            OptionError: As for the class.
        """
        given: dict[str, Any] = dict(settings)
        if "recipe" in given:
            given["recipe"] = recipe_named(given["recipe"])
        if "kinds" in given:
            kinds = given["kinds"]
            given["kinds"] = tuple(
                getattr(kind, "value", kind) for kind in ((kinds,) if isinstance(kinds, str) else kinds)
            )
        if "ignore" in given:
            ignore = given["ignore"]
            given["ignore"] = (ignore,) if isinstance(ignore, str) or callable(ignore) else tuple(ignore)
        if "regions" in given:
            given["regions"] = names("regions", given["regions"], "labels of regions")
        if given.get("plan") is not None:
            plan = given["plan"]
            given["plan"] = plan if isinstance(plan, Plan) else Plan.read(plan)
            given["kinds"] = given["plan"].kinds
        if given.get("out") is not None:
            given["out"] = folder("out", given["out"])
        if submodule is not None and not isinstance(submodule, str):
            parts = names("submodule", submodule, "paths of parts")
            submodule = parts[0] if len(parts) == 1 else parts
        return cls(k=k, submodule=submodule, **given)

    def __post_init__(self) -> None:
        given = [name for name in _GOALS if getattr(self, name) not in (None, ())]
        if len(given) > 1:
            raise OptionError(f"give exactly one of {_GOALS_IN_WORDS}, not {given}")
        optional_count = "it must be a whole number, 1 or more"
        speedup, latency, least = self.target_speedup, self.target_latency_ms, self.min_agreement
        require(
            self,
            (
                ("k", self.k is None or is_whole(self.k), optional_count),
                ("target_speedup", speedup is None or is_number(speedup, 1), "it must be above 1"),
                ("target_latency_ms", latency is None or is_number(latency, 0), "it must be positive"),
                ("min_agreement", least is None or 0 <= least <= 1, "it must lie in [0, 1]"),
                (
                    "criterion",
                    callable(self.criterion) or self.criterion in get_args(Criterion),
                    f"{listed(Criterion)}, or give a function",
                ),
                ("selection", self.selection in (None, *get_args(Selection)), listed(Selection)),
                one_of("cost", self.cost, Cost),
                one_of("backend", self.backend, Backend),
                one_of("front_end", self.front_end, FrontEnd),
                (
                    "device",
                    self.device is None or re.fullmatch(r"cpu|cuda(:\d+)?", str(self.device)) is not None,
                    "it must be cpu, cuda or cuda:N",
                ),
                ("kinds", bool(self.kinds) and set(self.kinds) <= set(get_args(KindName)), listed(KindName)),
                ("images", is_whole(self.images), optional_count),
                ("latency_batch", self.latency_batch is None or is_whole(self.latency_batch), optional_count),
                ("cache_bytes", is_whole(self.cache_bytes), optional_count),
                ("seed", is_whole(self.seed, 0, _SEEDS - 2), "it must be a whole number from 0 to 2**63 - 2"),
                (
                    "threads",
                    self.threads is None or is_whole(self.threads, 1, _MOST_THREADS),
                    f"it must be a whole number from 1 to {_MOST_THREADS}",
                ),
            ),
        )
        if self.cost != "latency" and self.has_target:
            raise OptionError(
                f"cost is {self.cost!r}, and a target is one of latency, which is then not measured: give k, or "
                "cost='latency'"
            )
        if (self.fp16 or self.int8) and not (self.onnx and self.out):
            raise OptionError(
                "fp16 and int8 write files beside model.onnx: give onnx=True and out= (--out) too"
            )
        if self.selection == "exact" and self.k is None:
            raise OptionError(
                "selection='exact' has no path of growing plans: it compares sets of one size, so it needs k; use "
                "'greedy' or 'independent'"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the parts to compress; none where it is the whole model."""
        path = self.submodule
        return () if path is None else (path,) if isinstance(path, str) else path

    @property
    def has_target(self) -> bool:
        """Whether a latency is to be reached."""
        return self.target_speedup is not None or self.target_latency_ms is not None

    def require_goal(self) -> None:
        """Refuses options without a goal.

        Raises:
            OptionError: None is set.
        """
        if all(getattr(self, name) in (None, ()) for name in _GOALS):
            raise OptionError(f"give exactly one of {_GOALS_IN_WORDS}, not none of them")

    def filled(self, device: str, threads: int) -> Options:
        """The same with the defaults that depend on the model and the machine written out."""
        return replace(
            self,
            device=device,
            threads=threads,
            selection=self.selection or self.recipe.selection,
            latency_batch=self.latency_batch or (64 if device.startswith("cuda") else 8),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as reports hold it; functions and loaders by their names."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {
            "recipe": asdict(self.recipe),
            "criterion": _name_of(self.criterion),
            "plan": None if self.plan is None else self.plan.to_dict(),
            "ignore": [_name_of(pattern) for pattern in self.ignore],
            "input_fn": None if self.input_fn is None else _name_of(self.input_fn),
            "labels": None if self.labels is None else _name_of(self.labels),
        }


_GOALS = ("k", "target_speedup", "target_latency_ms", "regions", "plan")
_GOALS_IN_WORDS = "k, target_speedup, target_latency_ms, regions and plan"


def takes(settings: type) -> Callable[[Function], Function]:
    """Gives a function that passes its keywords on to `Options.of` the signature that they have there.

    Args:
        settings: Its keywords; `Options` knows their defaults.
    """
    defaults = {one.name: one.default for one in fields(Options)}

    def decorate(function: Function) -> Function:
        plain = inspect.signature(function)
        own = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=kind)
            for name, kind in settings.__annotations__.items()
        ]
        known = {p.name for p in (*own, *more)}

        @wraps(function)
        def checked(*args: Any, **keywords: Any) -> Any:
            unknown = sorted(keywords.keys() - known)
            if unknown:
                near = difflib.get_close_matches(unknown[0], known, n=3)
                hint = f"did you mean {', '.join(near)}?" if near else f"it takes {', '.join(sorted(known))}"
                if unknown[0] in TORCH_PRUNING:
                    hint = f"what torch-pruning calls so is {TORCH_PRUNING[unknown[0]]} here"
                raise TypeError(f"{function.__name__}() has no argument {unknown[0]!r}; {hint}")
            return function(*args, **keywords)

        checked.__signature__ = plain.replace(parameters=[*own, *more])  # type: ignore[attr-defined]  # read by inspect
        return cast("Function", checked)

    return decorate


def _name_of(value: object) -> str:
    """A string as it is, a function by its name."""
    return value if isinstance(value, str) else getattr(value, "__qualname__", type(value).__name__)
