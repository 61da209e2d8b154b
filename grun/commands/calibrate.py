"""`python -m grun calibrate`: an adapter whose gates stand where a share of rows that must stay opens them at most."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grun.config.checks import require
from grun.config.options import CalibrateConfig, DataConfig, is_users, source_of
from grun.config.values import to_dict
from grun.data import templates
from grun.data.corpus import Corpus, load_corpus
from grun.data.encoding import EncodedRow, encode_rows
from grun.data.jsonl import load_prompts
from grun.data.rows import Row, hash_rows
from grun.data.sets import find_set
from grun.errors import AdapterError, ConfigError, DataError, GrunError
from grun.evaluation.probe import asked_first
from grun.loading.adapters import load_model
from grun.loading.hashing import adapter_hash
from grun.loading.models import context_length
from grun.method.adapter import find_adapter, peft_type
from grun.method.model import GrunModel
from grun.runtime.files import holding, staged, target, writing
from grun.runtime.ownership import LISTED
from grun.runtime.reading import in_one_line
from grun.runtime.records import Run, read_record
from grun.runtime.runs import RUN_FILE, claim, finish_run, identity, is_finished
from grun.training import calibration
from grun.training.calibration import Calibration, check_enough
from grun.training.gate_fit import Prompts
from grun.training.unlearning import units_of

log = logging.getLogger(__name__)


@holding()
def calibrate(config: CalibrateConfig) -> Path:
    """Calibrate an adapter as `config` asks; folder of the new one. The one that was given stays as it is.

    Raises:
        ConfigError: an option is missing, the adapter has no gate, or the rows are too few for the rate.
        DataError: the rows cannot be read, hold no question, or ask what is to be forgotten.
        AdapterError: the adapter cannot be read, or is none of GRUN's.
        RunError: the output folder holds something else.
    """
    usage = "calibrate adapter=FOLDER rows=FILE false_positives=0.01 output_dir=DIR"
    require(config, usage, "adapter", "false_positives", "output_dir")
    if (config.rows is None) == (config.set is None):
        raise ConfigError("name the rows that must stay, by rows=FILE or by set=NAME (one of them)")
    source, folder = find_adapter(str(config.adapter)), target(str(config.output_dir))
    if (kind := peft_type(source)) != "GRUN":
        raise AdapterError(f"{config.adapter} is no adapter of GRUN with gates of its own, but of type {kind}")
    run = read_record(source / RUN_FILE, Run) if (source / RUN_FILE).exists() else {}
    keep, corpus = _rows(config)
    units = units_of(keep, config.data.group)
    _check_rows(keep, corpus)
    _warn_of_groups(config, run)
    check_enough(len({*units}), float(config.false_positives or 0))
    loaded = load_model(config.model, str(source), strict=config.strict, gate_threshold=None)
    template = templates.in_force(config, loaded.template, loaded.tokenizer)
    run_identity = identity(
        to_dict(config), base=loaded.identity["base"], adapter=adapter_hash(source), rows=hash_rows(keep),
        forget=None if corpus is None else hash_rows(corpus.forget), template=template.to_dict(),
    )  # fmt: skip
    if is_finished(folder, run_identity, overwrite=config.overwrite):
        return folder
    claim(folder, run_identity, overwrite=config.overwrite)
    asking = [row for row in corpus.forget if row.prompt is not None] if corpus else []
    encoded = [encoded_rows(rows, loaded.model, loaded.tokenizer, template, config.data) for rows in (keep, asking)]
    result = calibration.calibrate(
        loaded.model, Prompts(encoded[0], units), encoded[1], float(config.false_positives or 0),
        int(loaded.tokenizer.pad_token_id),
    )  # fmt: skip
    _report(result, config)
    _save(folder, config, loaded.model, run, result, run_identity)
    return folder


def encoded_rows(
    rows: Sequence[Row], model: GrunModel, tokenizer: Any, template: templates.Template, data: DataConfig
) -> list[EncodedRow]:
    """Prompts of rows, and their answers where gates read those too."""
    longest = min(data.max_length or 2**30, context_length(model.base))
    encoded = encode_rows(rows, tokenizer, template, longest, data.strict)
    if model.rule.read == "every_token":
        return encoded
    return [EncodedRow(row.prompt_ids, ()) for row in encoded]


def _rows(config: CalibrateConfig) -> tuple[list[Row], Corpus | None]:
    """Rows that must stay, and what the adapter was made from; None: it is not to be had."""
    if config.set is not None:
        asked = asked_first(config)
        corpus = load_corpus(asked.data)
        sets = {name: rows for name, rows in corpus.sets().items() if find_set(name).good != "low"}
        if config.set not in sets:
            raise ConfigError(f"set={config.set} is no set of these data that must stay; there are: {', '.join(sets)}")
        return sets[config.set], corpus
    columns = config.data.columns if is_users(config, "data.columns") else {}
    keep = load_prompts(str(config.rows), None, columns)
    if source_of(config, "data.name") == "default":
        log.info("nothing says what the adapter was made to forget (data.*), so its recall is not measured")
        return keep, None
    try:
        return keep, load_corpus(asked_first(config).data)
    except (GrunError, OSError) as error:
        log.warning("what the adapter was made to forget cannot be loaded, so its recall is not measured: %s",
                    in_one_line(error))  # fmt: skip
        return keep, None


def _check_rows(keep: Sequence[Row], corpus: Corpus | None) -> None:
    """DataError for rows without a question, or about what is to be forgotten; a warning for those of the fit."""
    if texts := sum(row.prompt is None for row in keep):
        raise DataError(f"{texts} of the {len(keep)} rows to keep ask nothing; give rows with a question or a prompt")
    if corpus is None:
        return
    if both := _asked_in(keep, [*corpus.forget, *corpus.forget_prompts]):
        raise DataError(f"{both} of the {len(keep)} rows to keep ask what is to be forgotten; leave them out")
    if both := _asked_in(keep, [*corpus.retain, *corpus.retain_prompts]):
        log.warning(
            "%d of the %d rows to keep are among those that the adapter was made from, on which its gate is shut "
            "already: the bound is too low; give rows that it never saw", both, len(keep),
        )  # fmt: skip


def _asked_in(rows: Sequence[Row], others: Sequence[Row]) -> int:
    """How many rows ask what others ask, outer blanks aside."""
    known = {(row.earlier, row.prompt.strip()) for row in others if row.prompt is not None}
    return sum((row.earlier, str(row.prompt).strip()) in known for row in rows)


def _warn_of_groups(config: CalibrateConfig, run: dict[str, Any]) -> None:
    fitted = (run.get("config") or {}).get("data", {}).get("group")
    if fitted is not None and config.data.group is None:
        log.warning(
            "the gate was fitted with data.group=%s; without data.group each row counts by itself here, and if rows "
            "belong together the bound is too low", fitted,
        )  # fmt: skip


def _report(result: Calibration, config: CalibrateConfig) -> None:
    units = "rows" if config.data.group is None else f"groups ({config.data.group})"
    log.info(
        "at most %.4g of such rows open a gate, in expectation: by %d %s, of which %.3g do (before: %.3g)",
        result.bound, result.calibration, units, result.opened, result.opened_before,
    )  # fmt: skip
    if result.recall is not None:
        log.info("forget rows that open one: %.3g (before: %.3g)", result.recall, result.recall_before)


def _save(
    folder: Path, config: CalibrateConfig, model: GrunModel, run: dict[str, Any], result: Calibration, of_run: Any
) -> None:
    """Write the adapter, and run.json: that of the training, where there is one, with the calibration beside it."""
    with writing(folder), staged(folder) as new:
        model.save_pretrained(new)
    about = {key: value for key, value in run.items() if key not in (LISTED, "versions")}
    about = about or {"command": "calibrate", "base_fingerprint": of_run["base"]}
    of_this = {"adapter": config.adapter, "rows": of_run["rows"], "group": config.data.group}
    finish_run(folder, {**about, "calibration": {**of_this, **dataclasses.asdict(result)}})
