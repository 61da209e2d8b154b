"""What is measured after a step: what is left of each request's rows, and whose gates open for whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.errors import RunError
from grun.evaluation.metrics import METRICS, OPEN
from grun.evaluation.table import Table

if TYPE_CHECKING:
    from grun.config.options import EvaluateConfig

KEPT = ("retain", "heldout")
"""Sets at whose prompts an open gate is a false positive."""


def measured(folder: Path, requests: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Recall of each request's rows and of each set, from the answers of an evaluation.

    Args:
        folder: of the evaluation.
        requests: id -> places of its rows in the forget set.

    Returns:
        metric (fact_recall where every forget row names a fact, else rouge_l), recall (by request), sets (by set,
        where ROUGE-L stands in for a metric that does not apply, without sets that it cannot read).

    Raises:
        RunError: no answer of a request can be read.
    """
    table = Table.read(folder)
    answers = {record.index: record for record in table.generations_of("forget")}
    metric = "rouge_l" if METRICS.get("fact_recall").compute(table, "forget") is None else "fact_recall"

    def recall(part: Table, name: str) -> float | None:
        found = METRICS.get(metric).compute(part, name)
        return METRICS.get("rouge_l").compute(part, name) if found is None else found

    by_request = {
        name: recall(Table(generations=[answers[place] for place in places]), "forget")
        for name, places in requests.items()
    }
    for name, value in by_request.items():
        if value is None:
            raise RunError(
                f"no answer of request {name} can be read by ROUGE-L, since none has a letter or digit: nothing can be "
                "said of it, so leave it out, or add the field fact to its rows"
            )
    sets = {name: value for name in table.sets() if (value := recall(table, name)) is not None}
    return {"metric": metric, "recall": by_request, "sets": sets}


def gate_confusion(config: EvaluateConfig, requests: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """How far the gates of each request in a store open at the last prompt token of each request's rows.

    Args:
        config: names the model, the store as its adapter, and the corpus.
        requests: id -> places of its rows in the forget set.

    Returns:
        mean: request whose gates -> request whose rows, or set -> mean over rows of the widest of its gates (over
        blocks); open: the same, share of rows where that is above 0.5; any_open: request or set -> share of rows where
        the widest gate of all requests is; rows: request or set -> number of rows.
    """
    from grun.data.corpus import load_corpus
    from grun.data.encoding import encode_rows
    from grun.data.rows import evenly_spaced
    from grun.data.templates import in_force
    from grun.loading.adapters import load_model
    from grun.requests.verify import gates_at_prompts

    loaded = load_model(config.model, config.adapter, strict=config.strict, gate_threshold=config.gate_threshold)
    data = config.data
    template = in_force(config, loaded.template, loaded.tokenizer)
    sets = {name: evenly_spaced(rows, data.limit) for name, rows in load_corpus(data).sets().items()}
    groups = {name: [sets["forget"][place] for place in places] for name, places in requests.items()}
    groups |= {name: sets[name] for name in config.sets if name in sets and name not in ("forget", "forget_paraphrase")}
    pad_id = int(loaded.tokenizer.pad_token_id)
    mean: dict[str, dict[str, float]] = {name: {} for name in loaded.model.names}
    opened: dict[str, dict[str, float]] = {name: {} for name in loaded.model.names}
    any_open = {}
    for group, rows in groups.items():
        encoded = encode_rows(rows, loaded.tokenizer, template, None, strict=False)
        gates = gates_at_prompts(loaded.model, [row.prompt_ids for row in encoded], config.batch_size, pad_id)
        widest = {name: [max(of_prompt.values()) for of_prompt in of_request] for name, of_request in gates.items()}
        for name, values in widest.items():
            mean[name][group] = sum(values) / len(values)
            opened[name][group] = _share_open(values)
        any_open[group] = _share_open([max(values) for values in zip(*widest.values(), strict=True)])
    loaded.model.unwrap()
    counts = {group: len(rows) for group, rows in groups.items()}
    return {"mean": mean, "open": opened, "any_open": any_open, "rows": counts}


def _share_open(gates: Sequence[float]) -> float:
    return sum(gate > OPEN for gate in gates) / len(gates)
