"""GRUN in Python: `unlearn`, `evaluate`, `attack`, `calibrate` with a model and rows in memory; `load` gives a model.

Each runs what the command of its name runs. Rows are a list of dicts (question and answer, prompt and completion, chat
messages, instructions), of texts, or a `datasets.Dataset`. Options are the command's, by their last part (`lr=1e-3`,
`epochs=5`, `blocks=[8, 10]`) or, where several share it, by their whole key (`options={"method.lora.rank": 8}`);
`python -m grun unlearn --help` lists them. Without output_dir nothing stays on disk.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grun.commands.calibrate import encoded_rows
from grun.commands.unlearn import Unlearning, check_rows, prepare, train_and_save
from grun.config.checks import one_of
from grun.config.options import DTYPES, DataConfig, ModelConfig, UnlearnConfig
from grun.config.values import COMMANDS, describe, nested
from grun.data import templates
from grun.data.corpus import Corpus, corpus_of
from grun.data.jsonl import plain_record, rows_of
from grun.data.rows import Row, are_texts, shape_of
from grun.errors import ConfigError, DataError, unknown_name
from grun.evaluation.evaluate import carry_out, read_evaluation
from grun.evaluation.plan import make_plan, previous_in
from grun.evaluation.scoring import evaluating
from grun.evaluation.suites.attacks import AttackSuite
from grun.evaluation.suites.base import carry_out as carry_out_suite
from grun.loading.adapters import Loaded
from grun.loading.checks import check
from grun.loading.fetching import located
from grun.loading.hashing import adapter_hash
from grun.loading.models import ensure_pad_token, load_base
from grun.loading.resolve import resolve_given
from grun.method.fingerprint import fingerprint
from grun.method.host import EditedModel
from grun.method.model import GrunModel
from grun.method.parametrization import traits_of
from grun.runtime import processes
from grun.runtime.files import holding, target
from grun.runtime.records import ATTACKS_FILE
from grun.training import calibration
from grun.training.gate_fit import Prompts
from grun.training.unlearning import units_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = Iterable[Mapping[str, Any] | Row | str]
"""A list of dicts or texts, or a `datasets.Dataset`."""

IN_MEMORY = "given in Python"
"""Stands in results where the command line names files."""
OF_FILES = (
    *(
        "model.",
        "adapter",
        "adapters",
        "with_base",
        "suffix",
        "strict",
        "gate_threshold",
        "suite",
        "sets",
        "output_dir",
    ),
    *(f"data.{name}" for name in ("name", "path", "forget", "retain", "subset", "unknown", "unknown_rows")),
    *(f"data.{name}" for name in ("refused_rows", "teach_general", "retain_rows", "demo.", "lore.", "questions.")),
)
"""Options that name or load what is in memory here, and beginnings of such."""
SETS = ("forget", "retain", "heldout", "validation", "unknown")
"""Evaluation sets that a corpus has a place for."""


def load(
    path: str, *, dtype: str = "auto", device: str = "auto", revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model, in evaluation mode on its device, and its tokenizer, to hand to the functions here.

    Args:
        path: as `model.path` on the command line: a name from `python -m grun list models`, which is had first if need
            be, a folder, a hub id or a GGUF file.
        dtype: type of the weights; auto: as they are stored.
        device: auto (a GPU if there is one, else the CPU), cpu, cuda or mps.
        revision: branch, tag or commit of a hub model.

    Raises:
        ConfigError: an option is wrong.
        ModelError: the model cannot be loaded, or is not to be had.
    """
    config = ModelConfig(path=path, dtype=dtype, device=device, revision=revision)
    one_of("dtype", dtype, DTYPES)
    model, tokenizer, _ = load_base(config)
    return model, tokenizer


def unlearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Rows,
    retain: Rows = (),
    *,
    objective: str = "npo",
    output_dir: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    **named: Any,
) -> Any:
    """Make a model forget rows while it keeps others.

    A model that was loaded from a folder which GRUN fine-tuned is asked in the template stored there; the profile that
    it was made with gives the options that are not set, as on the command line.

    Args:
        model: a transformers causal language model on its device. It is put into evaluation mode and changed in place:
            edits (grun, reft) are hooks on it, which `unwrap()` of the result takes off; lora puts layers into it; full
            trains its weights.
        tokenizer: of the model. Where it has no pad token it gets its end-of-text token as one.
        forget: rows to forget.
        retain: rows to keep; may be none where a gate is fitted (method.gate_fit) to `subjects` or `gate_negatives`.
        objective: preset from `python -m grun list objectives`.
        output_dir: folder for the result, which `evaluate` and `generate` of the command line take as adapter; a
            finished run of the same options and rows there is loaded, not repeated. None: nothing stays on disk.
        options: options by their keys, such as {"method.lora.rank": 8}; cache.dir is unset here, so that no state of
            a row is written.
        **named: options by the last part of their keys.

    Returns:
        A GrunModel on `model` in evaluation mode; for method.parametrization lora and full the model itself.

    Raises:
        ConfigError: an option is unknown or wrong.
        DataError: rows are malformed, or stand in both sets.
        RunError: output_dir holds something else, or training cannot go on.
    """
    _refuse_name(model)
    given = {"objective": objective, "cache.dir": None, **_by_key("unlearn", options, named)}
    if output_dir is None:
        given.setdefault("train.save_steps", 0)  # they would go with the folder
    config = _config("unlearn", model, given)
    rows = _rows(forget, "forget", config.data.columns)
    if are_texts(rows) and config.profile is None:  # the default's gate reads questions
        config = _config("unlearn", model, {"design": "published", **given})
    _check(config)
    corpus = corpus_of(rows, _rows(retain, "retain", config.data.columns), config.data)
    check_rows(corpus, config)
    ensure_pad_token(tokenizer)
    types = {name: parameter.dtype for name, parameter in model.eval().named_parameters()}
    with processes.connected(), _folder(output_dir) as folder:
        run = prepare(config, corpus, model, tokenizer, _template(model), folder)
        _train(run, save=output_dir is not None)
    for name, parameter in model.named_parameters():  # full trains in float32
        parameter.data = parameter.data.to(types.get(name, parameter.dtype))
    made = run.parametrization.model.eval()
    if isinstance(made, GrunModel):
        made.forget_rows = [*corpus.forget, *corpus.forget_prompts]
    return made


def _check(config: UnlearnConfig) -> None:
    """ConfigError as of `check`, and for a guardrail, which no model in memory would have."""
    check(config)
    name = config.method.parametrization
    if traits_of(config.method).untrained:
        raise ConfigError(
            f"method.parametrization={name} changes no model; python -m grun unlearn makes a folder of it"
        )


def _train(run: Unlearning, *, save: bool) -> None:
    """Train, or load what is there already; an error leaves no edits on the model."""
    try:
        train_and_save(run, save=save)
        if run.finished:
            run.parametrization.load(run.folder, run.base)
    except BaseException:
        if isinstance(edited := getattr(run.parametrization, "model", None), EditedModel):
            edited.unwrap()
        raise


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows | Mapping[str, Rows],
    *,
    output_dir: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    **named: Any,
) -> dict[str, Any]:
    """Measure what a model answers and how probable it finds right and wrong answers.

    Args:
        model: a transformers model, or the GrunModel that `unlearn` gave, whose `gate_threshold` counts.
        tokenizer: of the model.
        rows: rows by set, such as {"forget": ..., "retain": ...}, or rows of one set, which is then called rows.
        output_dir: folder for the table and the metrics; None: nothing stays on disk.
        options: options by their keys.
        **named: options by the last part of their keys, such as batch_size and max_new_tokens.

    Returns:
        What `python -m grun evaluate` writes to evaluation.json (docs/metrics.md): metrics of each set in "sets", such
        as result["sets"]["forget"]["rouge_l"], "overall", of gated models "gate"; and the `grun.evaluation.table.Table`
        with the score of every answer and every answer given, in "table".

    Raises:
        ConfigError, DataError, RunError: as of `unlearn`.
    """
    model = _asked(model)
    config = _config("evaluate", model, _by_key("evaluate", options, named))
    check(config)
    parts = rows if isinstance(rows, Mapping) else {"rows": rows}
    sets = {name: _rows(part, name, config.data.columns) for name, part in parts.items()}
    corpus = Corpus("jsonl", [], [])
    for name, part in sets.items():
        if name in SETS:
            setattr(corpus, name, part)
        else:
            corpus.general[name] = part
    if not corpus.sets():
        raise DataError("there is nothing to evaluate: every set is empty")
    config = replace(config, gate_threshold=getattr(model, "gate_threshold", None))
    with processes.connected(), _folder(output_dir) as folder:
        reference = None if config.reference is None else read_evaluation(Path(config.reference))
        plan = make_plan(config, folder, _loaded(model, tokenizer), corpus, previous_in(folder, config.overwrite))
        (result,) = carry_out([plan], reference, 0.0)
        return {**result, "table": read_evaluation(folder)[1]}


def attack(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    forget: Rows,
    retain: Rows = (),
    *,
    attacks: Sequence[str] = (),
    rows: int | None = None,
    output_dir: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    **named: Any,
) -> dict[str, Any]:
    """Ask for what a model was made to forget in other ways, and see what comes back.

    Args:
        model: a transformers model, or the GrunModel that `unlearn` gave.
        tokenizer: of the model.
        forget: rows with questions that the model was to forget.
        retain: rows that it was to keep: prompts take examples from them, and what attacks cost them is measured.
        attacks: names from `python -m grun list attacks`, or kinds (prompt, decoding, search, context, read_out,
            weights); none: every attack that neither searches nor changes weights.
        rows: how many rows of each set are attacked, evenly spaced; None: all.
        output_dir: folder for the result; None: nothing stays on disk.
        options: options by their keys.
        **named: options by the last part of their keys, such as attack_samples and max_new_tokens.

    Returns:
        What `python -m grun evaluate suite=attacks` writes to evaluation.json: in "attacks" what came back by attack
        ("leak", 0 to 1, with its interval), "worst", "retention", "left_out" with the reason; and in "answers" a record
        for each row and way of asking.

    Raises:
        ConfigError, DataError, RunError: as of `unlearn`.
    """
    model = _asked(model)
    given = {"attacks": list(attacks), "attack_rows": rows, **_by_key("evaluate", options, named)}
    config = _config("evaluate", model, {"suite": "attacks", **given})
    check(config)
    found = {name: _rows(part, name, config.data.columns) for name, part in (("forget", forget), ("retain", retain))}
    asking = {name: [row for row in part if row.prompt is not None] for name, part in found.items()}
    if not asking["forget"]:
        raise DataError("attacks ask questions, and the forget rows hold none; give rows with questions")
    config = replace(config, gate_threshold=getattr(model, "gate_threshold", None))
    with processes.connected(), _folder(output_dir) as folder:
        suite = AttackSuite(config, {**asking, "heldout": []})
        previous = previous_in(folder, config.overwrite)
        result = carry_out_suite(suite, config, folder, _loaded(model, tokenizer), previous, 0.0)
        lines = (folder / ATTACKS_FILE).read_text(encoding="utf-8").splitlines()
    return {**result, "answers": [json.loads(line) for line in lines]}


def calibrate(
    model: GrunModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    false_positives: float,
    forget: Rows = (),
    group: str | None = None,
) -> dict[str, Any]:
    """Set the threshold of a model's gates so that of rows that must stay at most a given share opens any.

    Args:
        model: the GrunModel that `unlearn` gave, whose gate changes; `save_pretrained` keeps what is promised.
        tokenizer: of the model.
        rows: rows that must stay and that the model was not made from.
        false_positives: largest share of such rows that may open a gate, in expectation, in (0, 1).
        forget: rows that the model was made to forget, whose share that opens a gate is told.
        group: field of `rows`, such as person, by which they belong together; None: each by itself.

    Returns:
        What `python -m grun calibrate` writes to run.json: bound, calibration (rows, or groups of them), and the shares
        that open a gate: opened, recall, each with _before.

    Raises:
        ConfigError: the model has no gate, or the rows are too few for the rate.
        DataError: rows are malformed, or there are none.
    """
    edited = _asked(model)
    if not isinstance(edited, GrunModel):
        raise ConfigError("calibrate needs a model with the gates of one adapter: the GrunModel that unlearn gives")
    if not 0 < false_positives < 1:
        raise ConfigError(f"false_positives={false_positives} must lie between 0 and 1")
    ensure_pad_token(tokenizer)
    template = templates.resolve("auto", _template(edited), tokenizer, None, DataConfig.date)
    parts = [_rows(part, name, {}) for part, name in ((rows, "rows"), (forget, "forget"))]
    keep, lost = (encoded_rows(part, edited, tokenizer, template, DataConfig()) for part in parts)
    prompts = Prompts(keep, units_of(parts[0], group))
    with evaluating(edited):
        found = calibration.calibrate(edited, prompts, lost, false_positives, int(tokenizer.pad_token_id or 0))
    return asdict(found)


def _by_key(command: str, options: Mapping[str, Any] | None, named: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a command by their whole keys; ConfigError for one that is unknown, or that several share."""
    known = [key for key, _, _ in describe(COMMANDS[command]) if not _is_of_files(key)]
    found: dict[str, Any] = {}
    for name, value in {**named, **(options or {})}.items():
        key = name if name in known else _key_of(name, known)
        if key in found:
            raise ConfigError(f"{key} is given twice; leave one of them out")
        found[key] = value
    return found


def _key_of(name: str, known: Sequence[str]) -> str:
    """The key that ends in `name`; of several the one with the fewest sections."""
    ends = sorted((key for key in known if key.endswith(f".{name}")), key=lambda key: key.count("."))
    if not ends:
        shorts = [key.rpartition(".")[2] for key in known]
        raise ConfigError(unknown_name("option", name, list(dict.fromkeys([*known, *shorts]))))
    if len(ends) > 1 and ends[0].count(".") == ends[1].count("."):
        raise ConfigError(f"option {name!r} may be {' or '.join(ends)}: give its whole key in options={{...}}")
    return ends[0]


def _is_of_files(key: str) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in OF_FILES)


def _config(command: str, model: Any, given: Mapping[str, Any]) -> Any:
    """The config of a command on a model in memory."""
    own: dict[str, Any] = {"data.name": "jsonl", "data.path": None, "data.forget": IN_MEMORY, "data.retain": IN_MEMORY}
    own |= {"data.columns": {}, "model.path": _name(model)}
    if command == "evaluate" and isinstance(model, EditedModel):
        own["adapter"] = IN_MEMORY
    try:
        values: DictConfig = OmegaConf.create(nested({**own, **given}))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"an option has a value of no plain type: {str(error).splitlines()[0]}") from error
    return resolve_given(command, values)


def _rows(rows: Rows, name: str, columns: Mapping[str, str]) -> list[Row]:
    """Rows as the data of a file are read; DataError names the one that is malformed, counted from 1."""
    if isinstance(rows, str | Mapping):
        raise DataError(f"{name}: expected rows, a list of dicts or a datasets.Dataset, not {type(rows).__name__}")
    records = []
    for number, row in enumerate(rows, start=1):
        record: Any = row.to_dict() if isinstance(row, Row) else row
        if isinstance(record, str):
            record = {"prompt": None, "completion": record}
        elif isinstance(record, Mapping):
            record = plain_record(record)
            if isinstance(record.get("text"), str) and shape_of(record) is None and not columns:
                record = {"prompt": None, "completion": record.pop("text"), **record}
        records.append((f"{name} row {number}", record))
    return rows_of(records, columns)


def _asked(model: Any) -> Any:
    """The edits that a base carries and that are in force, else the model as it is given; ConfigError for a name."""
    _refuse_name(model)
    edited = model if isinstance(model, EditedModel) else EditedModel.of(model)
    return edited if edited is not None and edited.active else model


def _refuse_name(model: Any) -> None:
    if isinstance(model, str):
        raise ConfigError(f"expected a model, not the text {model!r}: model, tokenizer = grun.load({model!r})")


def _name(model: Any) -> str:
    """Name, folder or hub id that a model came from."""
    base = model.base if isinstance(model, EditedModel) else model
    return getattr(base.config, "_name_or_path", "") or IN_MEMORY


def _template(model: Any) -> templates.Template | None:
    """What is stored with the edits, or with the model's weights where they lie in a folder."""
    if isinstance(model, EditedModel) and model.template is not None:
        return model.template
    folder = Path(located(_name(model)))
    return templates.load(folder) if folder.is_dir() else None


def _loaded(model: Any, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    """The model as evaluations take it, identified as if it had been loaded."""
    ensure_pad_token(tokenizer)
    base = model.base if isinstance(model, EditedModel) else model.eval()
    identity: dict[str, str | None] = {"base": fingerprint(base), "dtype": str(base.dtype).removeprefix("torch.")}
    identity |= {"quantization": str(method) if (method := getattr(base, "quantization_method", None)) else None}
    identity["adapter"] = None
    if isinstance(model, GrunModel):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            identity["adapter"] = adapter_hash(Path(folder))
    elif isinstance(model, EditedModel):
        identity["adapter"] = uuid.uuid4().hex  # a stack is no files
    return Loaded(model, tokenizer, _template(model), identity)


@contextlib.contextmanager
def _folder(output_dir: str | Path | None) -> Iterator[Path]:
    """The folder of a result; None: one that only this user can read, and that goes at the end of the block."""
    with contextlib.ExitStack() as stack:
        if output_dir is not None:
            folder = target(output_dir)
        elif processes.count() > 1:
            raise ConfigError("several processes need a folder that all of them see; name it as output_dir")
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="grun-"))) / "run"
        with holding():
            yield folder
