"""Model utility and forget quality from a log that TOFU's own evaluation wrote: `python -m grun report tofu-log`.

Read is `eval_log_aggregated.json` (github.com/locuslab/tofu and its descendants), a section for each set of questions,
in each a field for each measurement, in each one value a row: as {index: value} (TOFU) or as a list (NPO).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grun.errors import ConfigError, DataError
from grun.evaluation.metrics.averages import mean
from grun.evaluation.metrics.likelihood import among, log_truth_ratio, truth_score
from grun.evaluation.metrics.overall import PROBABILITIES, model_utility
from grun.evaluation.metrics.reference import compare
from grun.runtime.reading import read_json

USAGE = "python -m grun report tofu-log LOG [retain=LOG]"
SECTIONS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
"""Our names of the sets and the log's."""
ANSWER, WRONG, CORRECT, ROUGE = "avg_gt_loss", "average_perturb_loss", "avg_paraphrased_loss", "rougeL_recall"
"""Fields: mean loss per token of the answer, each wrong answer, the truth ratio's right answer; ROUGE-L recall."""
TRUTH = (WRONG, CORRECT)
RETAIN_MODELS = {40: "retain99", 200: "retain95", 300: "retain90"}
"""Which retain-only model belongs to a log, by the number of its forget rows."""


@dataclass(frozen=True)
class Section:
    """One set of a log, by the index of the row; every field has the same rows."""

    answer: dict[str, float]
    """Mean log-probability per token of the answer, nats."""
    wrong: dict[str, list[float]]
    """The same of each wrong answer."""
    correct: dict[str, float]
    """The same of the right answer of the truth ratio: the paraphrase, or the answer where there is none."""
    rouge: dict[str, float]
    """ROUGE-L recall."""

    def log_truth_ratios(self, over: str) -> dict[str, float]:
        """log R by row; `over` as in `likelihood.log_truth_ratio`."""
        return {row: log_truth_ratio(self.correct[row], wrong, over) for row, wrong in self.wrong.items()}

    def numbers(self, name: str) -> dict[str, float | None]:
        """What TOFU reports of the set called `name`, by the names of our metrics."""
        normalized = [among(self.answer[row], wrong) for row, wrong in self.wrong.items()]
        return {
            "probability": mean([math.exp(log) for log in self.answer.values()]),
            **({"probability_normalized": mean(normalized)} if name in ("real_authors", "world_facts") else {}),
            "rouge_l": mean(list(self.rouge.values())),
            "truth_ratio": truth_score(name, list(self.log_truth_ratios("geometric").values())),
            "truth_ratio_arithmetic": truth_score(name, list(self.log_truth_ratios("arithmetic").values())),
        }


def tofu_log(path: Path, retain: Path | None = None) -> dict[str, Any]:
    """All numbers of a log, and with the log of a retain-only model the forget quality.

    Keys: `model_utility` (geometric truth ratio, as TOFU aggregates), `model_utility_arithmetic`; with `retain`
    `forget_quality` (p-value), `forget_quality_log10`, `forget_quality_arithmetic`, `ks_statistic`; and `sets`, by set
    `rows` and the numbers of `Section.numbers`.
    """
    log = _load(path)
    sections = {name: _section(log, path, name, (ANSWER, *TRUTH, ROUGE)) for name in SECTIONS}
    sets = {name: section.numbers(name) for name, section in sections.items()}
    result: dict[str, Any] = {
        key: model_utility(
            [sets[name][metric] for name, prob in PROBABILITIES.items() for metric in (prob, "rouge_l", truth_ratio)]
        )
        for key, truth_ratio in (
            ("model_utility", "truth_ratio"),
            ("model_utility_arithmetic", "truth_ratio_arithmetic"),
        )
    }
    if retain is not None:
        result |= _forget_quality(sections["forget"], _section(_load(retain), retain, "forget", TRUTH), path, retain)
    return {**result, "sets": {name: {"rows": len(sections[name].wrong), **sets[name]} for name in SECTIONS}}


def main(arguments: Sequence[str]) -> None:
    """Print one JSON object for the arguments after `report tofu-log`; ConfigError for wrong use."""
    paths = [argument for argument in arguments if not argument.startswith(("retain=", "-"))]
    retain = [argument.removeprefix("retain=") for argument in arguments if argument.startswith("retain=")]
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        raise ConfigError(f"unknown flag {flags[0]}; expected {USAGE}")
    if len(paths) != 1 or len(retain) > 1 or "" in retain:
        found = ", ".join(paths) or "none"
        raise ConfigError(f"report tofu-log reads one log and at most one retain=LOG (found {found}); expected {USAGE}")
    logs = [Path(path).expanduser() for path in (*paths, *retain)]
    print(json.dumps(tofu_log(*logs), indent=2, allow_nan=False))


def _forget_quality(forget: Section, reference: Section, path: Path, retain: Path) -> dict[str, float]:
    here, there = forget.wrong.keys(), reference.wrong.keys()
    if here != there:
        alone = f", row {min(here ^ there, key=_order)} in one of them alone" if len(here) == len(there) else ""
        raise DataError(
            f"forget has {len(here)} rows in {path}, {len(there)} in {retain}{alone}: they are of different splits. "
            "TOFU's logs hold at most 300 rows: 40, 200, 300 for forget01, forget05, forget10; "
            f"use the log of {RETAIN_MODELS.get(len(here), 'retain99, retain95, retain90')}"
        )
    geometric, arithmetic = (
        compare(list(forget.log_truth_ratios(over).values()), list(reference.log_truth_ratios(over).values()))
        for over in ("geometric", "arithmetic")
    )
    return {
        "forget_quality": geometric.p_value,
        "forget_quality_log10": geometric.log10,
        "forget_quality_arithmetic": arithmetic.p_value,
        "ks_statistic": geometric.statistic,
    }


def _load(path: Path) -> dict[str, Any]:
    try:
        log = read_json(path, DataError)
    except FileNotFoundError as error:
        raise DataError(f"no log {path}; expected TOFU's eval_log_aggregated.json") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); expected a file that TOFU wrote") from error
    if not isinstance(log, dict):
        raise DataError(
            f"{path} holds a JSON {_kind(log)}; expected an object with the keys {', '.join(SECTIONS.values())}, "
            "as TOFU's eval_log_aggregated.json"
        )
    return log


def _section(log: Mapping[str, Any], path: Path, name: str, fields: Sequence[str]) -> Section:
    """The section of one set; DataError unless it has the fields, each with the same rows of finite numbers."""
    section = log.get(SECTIONS[name])
    if not isinstance(section, dict):
        raise DataError(
            f"{path} has no section {SECTIONS[name]}: expected the keys {', '.join(SECTIONS.values())}, found "
            f"{_names(log)}; pass TOFU's eval_log_aggregated.json"
        )
    missing = [field for field in fields if field not in section]
    if missing:
        raise DataError(
            f"{path}, {SECTIONS[name]}: expected the keys {', '.join(fields)}, missing {', '.join(missing)}, found "
            f"{_names(section)}; pass TOFU's eval_log_aggregated.json"
        )
    where = {field: f"{path}, {SECTIONS[name]}, {field}" for field in fields}
    rows = {field: _rows(section[field], where[field]) for field in fields}
    for field in fields:
        odd = rows[fields[0]].keys() ^ rows[field].keys()
        if odd:
            raise DataError(
                f"{path}, {SECTIONS[name]}: row {min(odd, key=_order)} is in one of {fields[0]} "
                f"({len(rows[fields[0]])} rows) and {field} ({len(rows[field])} rows) alone; evaluate again"
            )

    def numbers(field: str, sign: float) -> dict[str, float]:
        return {row: sign * _number(value, where[field], row) for row, value in rows.get(field, {}).items()}

    return Section(numbers(ANSWER, -1), _wrong(rows[WRONG], where[WRONG]), numbers(CORRECT, -1), numbers(ROUGE, 1))


def _rows(values: Any, where: str) -> dict[str, Any]:
    """Values by row, from either layout."""
    if isinstance(values, list):
        values = {str(index): value for index, value in enumerate(values)}
    if not isinstance(values, dict):
        raise DataError(f"{where}: a JSON {_kind(values)}; expected {{index: value}} or a list, one value a row")
    if not values:
        raise DataError(f"{where}: no rows; evaluate again")
    return values


def _wrong(rows: Mapping[str, Any], where: str) -> dict[str, list[float]]:
    """Log-probabilities of the wrong answers by row, the same number in every row."""
    most = max((len(losses) for losses in rows.values() if isinstance(losses, list)), default=0)
    for row, losses in rows.items():
        if not isinstance(losses, list) or len(losses) != most or not losses:
            held = f"{len(losses)} losses" if isinstance(losses, list) else f"a JSON {_kind(losses)}"
            raise DataError(
                f"{where}, row {row}: {held}; expected a list of {most or 'at least 1'}, one loss for each wrong answer"
            )
    return {row: [-_number(loss, where, row) for loss in losses] for row, losses in rows.items()}


def _number(value: Any, where: str, row: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}, row {row}: a JSON {_kind(value)}; expected a number")
    if not math.isfinite(value):
        raise DataError(f"{where}, row {row}: {value}; expected a finite number (did the model give NaN?)")
    return float(value)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _names(section: Mapping[str, Any], most: int = 6) -> str:
    names = list(section)
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def _order(row: str) -> tuple[int, int | str]:
    """Rows by number, then what is none."""
    return (0, int(row)) if row.isdecimal() else (1, row)
