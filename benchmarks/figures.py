"""Every measured figure in the documents, held to the result file that it comes from.

    python -m benchmarks.figures [--write]

`benchmarks/figures.txt` repeats each sentence or table row that holds figures, under its document's name, with a place
in `{}` for each: `{FILE > KEY > KEY | FORMAT}`. FILE is one of `benchmarks/results/`, the keys lead into its entries.
On a list or among entries, `NAME=VALUE` keeps the items that have it, another key is taken from every item, and `mean`,
`spread`, `median`, `min`, `max`, `sum` and `count` reduce it. The format is Python's, `.2%` without the sign; `.0M`
turns bytes to MiB. A line `NAME := FILE > KEY` lets NAME stand for a beginning that many places share. A sentence
without places holds numbers that nobody measured, such as settings. `--write` puts what the result files say now into
the documents.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.environment import ROOT
from benchmarks.common.result_file import RESULTS
from fxprune.errors import OptionError
from fxprune.files import write_text_atomic

__all__ = ["LIST", "Passage", "documents", "figure", "main", "passages", "problems", "unexplained", "updated"]

LIST = ROOT / "benchmarks" / "figures.txt"
NUMBER = r"(-?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?)"
PLACE = re.compile(r"\{([^{}]+)\}")
MEASURED = re.compile(
    r"\d+\.\d+|\d[\d,]*(?=\s(?:%|s|ms|seconds?|minutes?|hours?|times|MiB|GiB)\b)|\d[\d,]*(?=\s?%)"
    r"|(?<=\|)\s*\d[\d,]*\s*(?=\|)"
)
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`|\]\([^)]*\)", re.MULTILINE | re.DOTALL)
ONCE = "measured once"
"""A paragraph of a decision that says so may hold figures that no file keeps."""
REDUCED: Mapping[str, Callable[[list[Any]], Any]] = {
    "mean": statistics.fmean, "spread": statistics.stdev, "median": statistics.median,
    "min": min, "max": max, "sum": sum, "count": len,
}  # fmt: skip


@dataclass(frozen=True)
class Passage:
    """A part of a document that holds figures.

    Attributes:
        document: Relative to the repository.
        text: With a place in braces for each figure.
    """

    document: str
    text: str

    @property
    def places(self) -> list[str]:
        """What stands in the braces."""
        return PLACE.findall(self.text)

    def search(self, text: str) -> Iterator[re.Match[str]]:
        """Finds it in a document, whatever the numbers and wherever lines are broken."""
        literal = PLACE.split(self.text)[::2]
        words = (r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in literal)
        return re.finditer(NUMBER.join(words), text)


def passages(text: str) -> list[Passage]:
    """Reads the list of passages."""
    found: list[Passage] = []
    document, names = "", dict[str, str]()
    for paragraph in filter(None, map(str.strip, re.split(r"\n\s*\n", text))):
        if paragraph.startswith("# "):
            document = paragraph.removeprefix("# ")
        elif ":=" in paragraph:
            names.update(re.findall(r"^(\w+) := (.+)$", paragraph, re.MULTILINE))
        else:
            found.append(Passage(document, PLACE.sub(partial(_in_full, names), paragraph)))
    return found


def _in_full(names: Mapping[str, str], place: re.Match[str]) -> str:
    first, rest = place.group(1).split(" > ", 1)
    return f"{{{names.get(first, first)} > {rest}}}"


def documents() -> list[str]:
    """The documents in which every figure has an origin; the table of mutation.md is what its own command prints."""
    docs = (path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "mutation.md")
    return ["README.md", *(str(path.relative_to(ROOT)) for path in docs)]


def figure(place: str, folder: Path = RESULTS) -> str:
    """Returns the figure for a place, as the document should show it.

    Raises:
        OptionError: There is no such file or key, or more than one value is left.
    """
    path, _, form = (part.strip() for part in place.partition("|"))
    name, *steps = (step.strip() for step in path.split(">"))
    file = folder / f"{name}.json"
    if not file.is_file():
        raise OptionError(f"no result file {file.name}")
    result = json.loads(file.read_text())
    found = next((result[part] for part in ("entries", "runs") if part in result), result)
    for step in steps:
        found = _step(found, step)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, (int, float)):
        raise OptionError(f"{path} is no number but {str(found)[:80]}")
    return f"{found / 2**20:{form[:-1]}f}" if form.endswith("M") else f"{found:{form}}".removesuffix("%")


def _step(found: Any, step: str) -> Any:
    if isinstance(found, dict) and step in found:
        return found[step]
    items = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(items, list):
        raise OptionError(f"there is no {step!r} in {str(found)[:80]}")
    if step in REDUCED:
        return REDUCED[step](items)
    name, equals, wanted = step.partition("=")
    if equals:
        return [item for item in items if isinstance(item, dict) and str(item.get(name)) == wanted]
    try:
        return [item[step] for item in items]
    except (KeyError, TypeError):
        raise OptionError(f"there is no {step!r} in {str(found)[:80]}") from None


def problems(passage: Passage, text: str, folder: Path = RESULTS) -> list[str]:
    """Says what is wrong with a passage of a document's text."""
    matches = list(passage.search(text))
    if not matches or (len(matches) > 1 and passage.places):
        return [f"{passage.document}: found {len(matches)} times, not once: {passage.text}"]
    found = []
    for place, shown in zip(passage.places, matches[0].groups(), strict=True):
        try:
            wanted = figure(place, folder)
        except OptionError as error:
            found.append(f"{passage.document}: {error}")
            continue
        if shown != wanted:
            found.append(f"{passage.document}: says {shown}, but {place} is {wanted}")
    return found


def unexplained(document: str, text: str, known: Sequence[Passage]) -> list[str]:
    """Returns the lines of a document with a number that looks measured and belongs to no passage."""
    plain = CODE.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
    covered = [match.span() for passage in known for match in passage.search(text)]
    if document.startswith("docs/decisions/"):
        paragraphs = re.finditer(r"(?:.+\n?)+", text)
        covered += [match.span() for match in paragraphs if ONCE in re.sub(r"\s+", " ", match.group())]
    found = []
    for match in MEASURED.finditer(plain):
        if not any(start <= match.start() and match.end() <= end for start, end in covered):
            line = text.count("\n", 0, match.start())
            found.append(
                f"{document}:{line + 1}: {match.group().strip()} in: {text.splitlines()[line].strip()}"
            )
    return found


def updated(text: str, known: Sequence[Passage], folder: Path = RESULTS) -> str:
    """Returns a document with what the result files say now."""
    for passage in known:
        for match in passage.search(text) if passage.places else ():
            spans = [match.span(group + 1) for group in range(len(passage.places))]
            for (start, end), place in reversed(list(zip(spans, passage.places, strict=True))):
                text = text[:start] + figure(place, folder) + text[end:]
            break  # the positions of later matches have moved; there should be one only
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what does not agree, or writes what the result files say; the exit status is 1 if something is left."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--write", action="store_true", help="put what the result files say into the documents"
    )
    write = parser.parse_args(argv).write
    known, left = passages(LIST.read_text()), []
    for document in documents():
        own = [passage for passage in known if passage.document == document]
        text = (ROOT / document).read_text()
        if write and (new := updated(text, own)) != text:
            write_text_atomic(ROOT / document, new)
            text = new
        left += [line for passage in own for line in problems(passage, text)] + unexplained(
            document, text, own
        )
    print("\n".join(left) or "every figure is that of its result file")
    return int(bool(left))


if __name__ == "__main__":
    raise SystemExit(main())
