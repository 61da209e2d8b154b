"""Model utility and forget quality from a log that TOFU's own evaluation wrote: `python -m grun report tofu-log`.

Read is `eval_log_aggregated.json` (github.com/locuslab/tofu and its descendants), a section for each set of questions,
in each a field for each measurement, in each one value a row: as {index: value} (TOFU) or as a list (NPO).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grun.errors import ConfigError, DataError
from grun.evaluation.metrics.averages import mean
from grun.evaluation.metrics.likelihood import MEANS, among, log_truth_ratio, truth_score
from grun.evaluation.metrics.overall import PROBABILITIES, model_utility
from grun.evaluation.metrics.reference import compare
from grun.runtime.reading import fields_in, kind_of, parse_json, read_text

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
EXPECTED = f"expected {', '.join(SECTIONS.values())}, each with {ANSWER} and more: pass TOFU's eval_log_aggregated.json"
RETAIN_MODELS = {40: "retain99", 200: "retain95", 300: "retain90"}
"""Which retain-only model belongs to a log, by the number of its forget rows."""


class Section(NamedTuple):
    """One set of a log, by the index of the row; every field has the same rows."""

    answer: dict[str, float]
    """Mean log-probability per token of the answer, nats."""
    wrong: dict[str, list[float]]
    """The same of each wrong answer."""
    correct: dict[str, float]
    """The same of the right answer of the truth ratio: the paraphrase, or the answer where there is none."""
    rouge: dict[str, float]
    """ROUGE-L recall."""

    def log_truth_ratios(self, over: str) -> list[float]:
        """log R of each row; `over` as in `likelihood.log_truth_ratio`."""
        return [log_truth_ratio(self.correct[row], wrong, over) for row, wrong in self.wrong.items()]

    def numbers(self, name: str) -> dict[str, float | None]:
        """What TOFU reports of the set called `name`, by the names of our metrics."""
        normalized = [among(self.answer[row], wrong) for row, wrong in self.wrong.items()]
        return {
            "rows": len(self.wrong),
            "probability": mean([math.exp(log) for log in self.answer.values()]),
            **({"probability_normalized": mean(normalized)} if name in ("real_authors", "world_facts") else {}),
            "rouge_l": mean(list(self.rouge.values())),
            "truth_ratio": truth_score(name, self.log_truth_ratios("geometric")),
            "truth_ratio_arithmetic": truth_score(name, self.log_truth_ratios("arithmetic")),
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
    return {**result, "sets": sets}


def main(arguments: Sequence[str]) -> None:
    """Print one JSON object for the arguments after `report tofu-log`; ConfigError for wrong use."""
    paths = [argument for argument in arguments if not argument.startswith(("retain=", "-"))]
    retain = [argument.removeprefix("retain=") for argument in arguments if argument.startswith("retain=")]
    if len(paths) != 1 or len(retain) > 1 or "" in retain or len(paths + retain) < len(arguments):
        found = ", ".join(arguments) or "nothing"
        raise ConfigError(f"report tofu-log reads one log and at most one retain=LOG (found {found}); expected {USAGE}")
    print(json.dumps(tofu_log(*(Path(path).expanduser() for path in paths + retain)), indent=2, allow_nan=False))


def _forget_quality(forget: Section, reference: Section, path: Path, retain: Path) -> dict[str, float]:
    here, there = forget.wrong.keys(), reference.wrong.keys()
    if here != there:
        alone = f", row {min(here ^ there)} in one of them alone" if len(here) == len(there) else ""
        raise DataError(
            f"forget has {len(here)} rows in {path}, {len(there)} in {retain}{alone}: they are of different splits. "
            "TOFU's logs hold at most 300 rows: 40, 200, 300 for forget01, forget05, forget10; "
            f"use the log of {RETAIN_MODELS.get(len(here), 'retain99, retain95, retain90')}"
        )
    geometric, arithmetic = (compare(forget.log_truth_ratios(over), reference.log_truth_ratios(over)) for over in MEANS)
    return {
        "forget_quality": geometric.p_value,
        "forget_quality_log10": geometric.log10,
        "forget_quality_arithmetic": arithmetic.p_value,
        "ks_statistic": geometric.statistic,
    }


def _load(path: Path) -> dict[str, Any]:
    log = parse_json(read_text(path, DataError), str(path), DataError, finite=False)
    if not isinstance(log, dict):
        raise DataError(f"{path} holds {kind_of(log)}; {EXPECTED}")
    return log


def _section(log: Mapping[str, Any], path: Path, name: str, fields: Sequence[str]) -> Section:
    """The section of one set; DataError unless it has the fields, each with the same rows of finite numbers."""
    section = log.get(SECTIONS[name])
    if not isinstance(section, dict):
        raise DataError(f"{path} has no section {SECTIONS[name]} (found {fields_in(log)}); {EXPECTED}")
    if missing := [field for field in fields if field not in section]:
        found = fields_in(section)
        raise DataError(f"{path}, {SECTIONS[name]}: no {', '.join(missing)} (found {found}); {EXPECTED}")
    rows = {field: _rows(section[field], f"{path}, {SECTIONS[name]}, {field}", field == WRONG) for field in fields}
    for field in fields:
        if odd := rows[fields[0]].keys() ^ rows[field].keys():
            raise DataError(
                f"{path}, {SECTIONS[name]}: row {min(odd)} is in one of {fields[0]} ({len(rows[fields[0]])} rows) and "
                f"{field} ({len(rows[field])} rows) alone; evaluate again"
            )

    def numbers(field: str, sign: float) -> dict[str, float]:
        return {row: sign * value for row, (value,) in rows.get(field, {}).items()}

    wrong = {row: [-loss for loss in losses] for row, losses in rows[WRONG].items()}
    return Section(numbers(ANSWER, -1), wrong, numbers(CORRECT, -1), numbers(ROUGE, 1))


def _rows(values: Any, where: str, several: bool) -> dict[str, list[float]]:
    """Numbers by row, from either layout: one, or where there are `several` as many in every row."""
    if isinstance(values, list):
        values = {str(index): value for index, value in enumerate(values)}
    if not isinstance(values, dict) or not values:
        found = kind_of(values) if values != {} else "no rows"
        raise DataError(f"{where}: {found}; expected {{index: value}} or a list, one value a row")
    rows = {row: value if several else [value] for row, value in values.items()}
    most = max((len(value) for value in rows.values() if isinstance(value, list)), default=0)
    for row, value in rows.items():
        if not isinstance(value, list) or len(value) != most or not value:
            found = f"{len(value)} losses" if isinstance(value, list) else kind_of(value)
            raise DataError(f"{where}, row {row}: {found}; expected a list of {most or 'at least 1'}, as in other rows")
        for number in value:
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                found = str(number) if isinstance(number, float) else kind_of(number)
                raise DataError(f"{where}, row {row}: {found}; expected a finite number (did the model give NaN?)")
    return rows
