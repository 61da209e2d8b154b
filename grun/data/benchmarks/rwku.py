"""RWKU (Jin et al. 2024, arXiv 2406.10890): famous people, whom models know without being taught, to be forgotten.

Sentences with a blank (level 1), questions (level 2) and nine kinds of adversarial questions (level 3) on a target,
levels 1 and 2 on its neighbors, texts for membership inference, and utility: MMLU and TriviaQA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grun.config.checks import one_of
from grun.config.options import DataConfig
from grun.data.benchmarks.muse import cut
from grun.data.choices import choice_row
from grun.data.corpus import Corpus, Knowledge, Subject, benchmark, refusals
from grun.data.jsonl import hub_rows, read_records, rows_of
from grun.data.rows import ALTERNATIVES, Row, evenly_spaced
from grun.data.sets import EvaluationSet
from grun.data.subject import aliases
from grun.errors import ConfigError, DataError, unknown_name

REPOSITORY = "jinzhuoran/RWKU"
TEXTS = {
    "train_positive_llama3": "positive",
    "train_positive_phi3": "positive_phi",
    "train_original_passage": "passage",
    "train_refusal_llama3": "reject",
    "train_refusal_phi3": "reject_phi",
}
"""What may be unlearned from: configuration of the hub -> file of a folder, without its ending."""
PROBES = ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1", "neighbor_level2")
FILES = TEXTS | {name: name for name in PROBES}
FILES |= {"forget_target": "intro", "mia_forget": "forget_mia", "mia_retain": "retain_mia"}
FILES |= {"utility_general": "retain_mmlu", "utility_factuality": "triviaqa"}
KINDS = {
    "".join(kind.split()): kind
    for kind in (
        *("prefix injection", "affirmative suffix", "role playing", "multiple choice", "reverse query"),
        *("synonym manipulation", "background hint", "incontext learning", "cross lingual"),
    )
}
"""Of adversarial questions, by their letters: files may write "in-context learning"."""
KEPT = 100
"""Texts of others that evaluation reads, at most."""

BLANK = "Please complete the blank in the following question.\nQuestion: {}\nAnswer:"
QUESTION = "Please briefly answer the following question.\nQuestion: {}\nAnswer:"
PROMPTS = {
    "affirmativesuffix": QUESTION.removesuffix("\nAnswer:"),  # which ends with the beginning of an answer
    "incontextlearning": QUESTION.replace("Question: ", ""),  # whose questions are marked as such
}
"""How kinds of adversarial questions are put; any other as `QUESTION`."""


def _set(name: str, label: str, meaning: str, good: Any = "low", shown: bool = True, **more: Any) -> EvaluationSet:
    metrics = ("rouge_l_union", "fact_recall")
    return EvaluationSet(
        name, label, meaning, good, metrics if shown else (), () if shown else metrics, longest_answer=30, **more
    )


SETS = (
    _set("forget_level1", "level 1", "sentences with a blank on the target", color="#A63A00"),
    _set("forget_level2", "level 2", "questions on the target: those of forget", color="#D9772B"),
    _set("forget_level3", "level 3", "adversarial questions on the target", color="#C98A2B"),
    *(
        _set(f"level3_{kind.replace(' ', '_')}", kind, f"those of level 3 by {kind}", shown=False)
        for kind in KINDS.values()
    ),
    _set("neighbor_level1", "neighbors, level 1", "sentences with a blank on what is near", "high", color="#56B4E9"),
    _set("neighbor_level2", "neighbors, level 2", "questions on what is near the target", "high", color="#3A8FC4"),
    EvaluationSet("mia_forget", "MIA, forget", "texts on the target: the loss should rise", "low", ("text_loss",), ()),
    EvaluationSet("mia_retain", "MIA, retain", "texts on others: the loss should stay", "high", ("text_loss",), ()),
    EvaluationSet("utility_factuality", "TriviaQA", "general knowledge: must stay", "high", ("fact_recall",), ()),
)


def knowledge(config: DataConfig) -> Knowledge:
    """Multiple choice of MMLU for the targets."""
    chosen = _chosen(config)[1]
    found = _records("utility_general", config.path)
    rows = [choice_row({**row, "subject": row.get("task")}, where, "mmlu") for where, row in _of(found, chosen)]
    return Knowledge(choices={"general": rows})


@benchmark("rwku", sets=SETS, knowledge=knowledge)
def load(config: DataConfig) -> Corpus:
    """A famous person to forget whom the model knows (RWKU), with questions of three levels and neighbors.

    `data.forget` is [CONFIG/]TARGET, or several targets separated by " | ", CONFIG being one of `TEXTS`;
    `data.retain`, the texts on anybody else, is another CONFIG. The set forget holds the questions of level 2.
    """
    texts, chosen = _chosen(config)
    one_of("data.retain", config.retain or texts, tuple(TEXTS))
    on_all = _texts(texts, config.path)
    kept = _texts(config.retain, config.path) if config.retain else on_all
    retain = [row for row in kept if row.extra["subject"] not in chosen]
    probes = {name: _rows(name, config.path, chosen) for name in PROBES}
    kinds = {f"level3_{kind.replace(' ', '_')}": letters for letters, kind in KINDS.items()}
    level3 = probes["forget_level3"]
    forget = [row for row in on_all if row.extra["subject"] in chosen]
    kind = config.subject_kind
    called = {name: aliases(name, kind, [one for one in chosen if one != name]) for name in chosen}
    return Corpus(
        name="rwku",
        forget=forget,
        retain=retain,
        forget_evaluated=probes["forget_level2"],
        retain_evaluated=evenly_spaced(retain, KEPT),
        refusals=refusals(config.refusals),
        subjects=[Subject(tuple(called[name]), kind, (name,)) for name in (row.extra["subject"] for row in forget)],
        general=probes
        | {name: [row for row in level3 if _letters(row.extra) == letters] for name, letters in kinds.items()}
        | {name: _plain(_of(_records(name, config.path), chosen)) for name in ("mia_forget", "mia_retain")}
        | {"utility_factuality": _trivia(config.path, chosen)},
    )


def _chosen(config: DataConfig) -> tuple[str, list[str]]:
    """Texts to unlearn from, and the targets."""
    texts, _, named = config.forget.rpartition("/")
    one_of("data.forget: texts", texts or next(iter(TEXTS)), tuple(TEXTS))
    known = sorted({str(record.get("subject")) for _, record in _records("forget_level2", config.path)})
    chosen = [name.strip() for name in named.split(ALTERNATIVES.strip())]
    for name in chosen:
        if name not in known:
            what, where = "RWKU target (data.forget=[CONFIG/]TARGET)", "the field subject of forget_level2"
            raise ConfigError(unknown_name(what, name, known, where))
    return texts or next(iter(TEXTS)), chosen


def _rows(name: str, path: str | None, chosen: Sequence[str]) -> list[Row]:
    """Probes of one level on the targets; the answer is the fact too."""
    put = BLANK if name.endswith("level1") else QUESTION
    rows = rows_of(_of(_records(name, path), chosen), {"prompt": "query", "completion": "answer"})
    asked = [PROMPTS.get(_letters(row.extra), put).format(row.prompt) for row in rows]
    with_fact = [{**row.extra, "fact": row.completion} for row in rows]
    return [Row(one, row.completion, more) for one, row, more in zip(asked, rows, with_fact, strict=True)]


def _letters(record: Mapping[str, Any]) -> str:
    return "".join(filter(str.isalpha, str(record.get("type")).lower()))


def _texts(name: str, path: str | None) -> list[Row]:
    """What is unlearned from, on anybody: texts, cut as MUSE's, or questions with refusals."""
    rows = []
    for where, record in _records(name, path):
        if "instruction" in record:
            rows.append(Row.from_record(record, where))
        else:
            rows += [Row(None, part, row.extra) for row in _plain([(where, record)]) for part in cut(row.completion)]
    return [Row(row.prompt, row.completion, {"subject": row.extra.get("subject")}) for row in rows]


def _plain(records: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Row]:
    return rows_of([(where, {**record, "prompt": None}) for where, record in records], {"completion": "text"})


def _trivia(path: str | None, chosen: Sequence[str]) -> list[Row]:
    """TriviaQA's questions, any of whose answers is right; none where a folder lacks the file."""
    folder = _folder(path)
    if folder is not None and not (folder / "triviaqa.json").is_file():
        return []
    rows = []
    for where, record in _of(_records("utility_factuality", path), chosen):
        question, answers = record.get("question"), record.get("answers")
        right = [one for one in answers if isinstance(one, str) and one.strip()] if isinstance(answers, list) else []
        if not isinstance(question, str) or not right:
            raise DataError(f"{where}: expected a question, and answers, a list of texts of which one is not empty")
        rows.append(Row(QUESTION.format(question), right[0], {"fact": ALTERNATIVES.join(right)}))
    return rows


def _of(records: Sequence[tuple[str, Mapping[str, Any]]], chosen: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(where, record) for where, record in records if record.get("subject") in chosen]


def _records(name: str, path: str | None) -> list[tuple[str, Mapping[str, Any]]]:
    """Records of a configuration, of all targets, each after the words that name it in errors."""
    folder = _folder(path)
    if folder is None:
        split = "train" if name in TEXTS else "test"
        instead = f"data.path, a folder that holds {FILES[name]}.json"
        return list(hub_rows(REPOSITORY, name, split, called=f"{REPOSITORY} {name}", instead=instead))
    records = read_records(folder / f"{FILES[name]}.json")
    for where, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with fields as RWKU's {name} has them")
    return records


def _folder(path: str | None) -> Path | None:
    """Where the files lie: the folder, or its part All, as the data set's repository has it; None: the hub."""
    if path in (None, REPOSITORY):
        return None
    folder = Path(str(path)).expanduser()
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; set data.path to a folder of RWKU's layout, or leave it out for the hub")
    return folder / "All" if (folder / "All").is_dir() else folder
