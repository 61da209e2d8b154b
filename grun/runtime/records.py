"""What is read of the JSON files of runs and evaluations: a field of another type is one line that names it.

Further keys may stand in each; older files lack some. Annotations are evaluated here, as `Required` needs.
"""

from pathlib import Path
from typing import Any, Literal, Required, TypedDict

from grun.runtime.reading import AGAIN, DamagedFile, read_json, typed

STACK_FILE = "stack.json"
"""Manifest of a folder that holds the adapters of several requests (`grun.requests`)."""
ATTACKS_FILE = "attacks.jsonl"
"""Answers under every attack, in a folder of suite=attacks."""
SUITE_FORMAT = 2
"""Raised when the meaning of a suite's result changes, so that older results are not taken for new ones.
2: leaks of answers in every script."""

Numbers = dict[str, float | None]


class Gate(TypedDict, total=False):
    """How far gates open, over blocks or at one."""

    auc_retain: float | None
    auc_heldout: float | None
    auc_unknown: float | None
    auc_neighbor: float | None
    auc_general: float | None
    false_positive_rate: float | None
    mean: Numbers
    open: Numbers
    blocks: "dict[str, Gate]"


class Share(TypedDict, total=False):
    """A share of the rows that an attack or a kind of question asks, with its interval."""

    access: str
    accuracy: float | None
    accuracy_macro: float | None
    chance: float | None
    fact_recall: float | None
    leak: float | None
    worst: float | None
    kept: float | None
    interval: list[float] | None
    rows: int
    questions: int
    gate: Numbers
    variants: Numbers
    curve: "dict[str, Share]"
    at_k: "dict[str, dict[str, Share]]"
    floor: "Share"
    subjects: "dict[str, Share]"


class Completed(TypedDict, total=False):
    """Sentences to complete."""

    gate: Gate
    roles: dict[str, Share]


class Asked(Completed, total=False):
    """Questions put in one way."""

    format: Required[str]
    order: Required[str]
    suffix: Required[str]


class Identity(TypedDict, total=False):
    """By what a model differs from others."""

    base: str | None
    dtype: str | None
    quantization: str | None
    adapter: str | None
    version: str | None
    format: int


class Settings(TypedDict, total=False):
    """Settings of an evaluation that are read again."""

    quirks: list[str] | None
    template: dict[str, Any] | None


class Counts(TypedDict, total=False):
    """What an evaluation asked of a set."""

    rows: int
    answer_tokens: int
    unread: dict[str, int]


class Evaluation(TypedDict, total=False):
    """evaluation.json of every suite."""

    key: str
    model: str | None
    adapter: str | None
    suite: str
    identity: Identity
    settings: Settings
    template: dict[str, Any] | None
    data: dict[str, Any]
    metrics_format: int
    counts: dict[str, Counts]
    sets: dict[str, dict[str, float | list[float] | None]]
    overall: Numbers
    gate: Gate
    reference: Numbers
    seconds: dict[str, float]
    attacks: dict[str, Share]
    worst: Share
    worst_of_prompts: Share
    retention: dict[str, dict[str, Share]]
    left_out: dict[str, str]
    unread: dict[str, int]
    choices: list[Asked]
    cloze: Completed
    perplexity: dict[str, Numbers]


class Run(TypedDict, total=False):
    """run.json of every command."""

    command: str
    profile: str | None
    objective: str | None
    parametrization: str
    base_fingerprint: str | None
    fingerprint: str | None
    config: dict[str, Any]
    terms: dict[str, Any] | None
    quirks: list[str] | None
    cache: dict[str, Any] | None
    versions: dict[str, str] | None
    seconds: float | None
    steps: int | None


class Step(TypedDict, total=False):
    """A line of log.jsonl or monitor.jsonl."""

    step: Required[int]
    sets: dict[str, Numbers]


class Choice(TypedDict, total=False):
    """A line of questions.jsonl on a multiple-choice question."""

    kind: Required[Literal["choice"]]
    role: Required[str]
    index: Required[int]
    format: Required[str]
    order: Required[str]
    suffix: Required[str]
    rotation: Required[int]
    logp: Required[list[float]]
    chosen: Required[int]
    answer: Required[int]


class FirstChoice(Choice, total=False):
    """The same of the order that comes first, which is shown."""

    question: Required[str]
    choices: Required[list[str]]


class Cloze(TypedDict, total=False):
    """A line of questions.jsonl on a sentence to complete."""

    kind: Required[Literal["cloze"]]
    role: Required[str]
    index: Required[int]
    prompt: Required[str]
    fact: Required[str]
    text: Required[str]


class Attempt(TypedDict, total=False):
    """A line of attacks.jsonl."""

    attack: Required[str]
    set: Required[str]
    prompt: Required[str]
    text: Required[str]
    leak: Required[float]
    variant: str
    given: int


def read_record(path: Path, kind: Any, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object of `kind` with these keys; RunError names the file and what is missing or of another type."""
    try:
        value = read_json(path, expect=dict)
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read ({error.strerror or error}); {AGAIN}") from error
    missing = [key for key in keys if key not in value]
    if missing:
        raise DamagedFile(f"{path} lacks {', '.join(missing)}; {AGAIN}")
    record: dict[str, Any] = typed(kind, value, str(path))
    return record
