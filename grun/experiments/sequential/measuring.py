"""What is measured after a step: what is left of each request's rows, and whose gates open for whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.errors import RunError
from grun.evaluation.metrics import METRICS, OPEN
from grun.evaluation.table import Table

if TYPE_CHECKING:
    from torch import Tensor

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
    from grun.loading.models import load_model

    loaded = load_model(config.model, config.adapter, strict=config.strict, gate_threshold=config.gate_threshold)
    data = config.data
    template = in_force(config, loaded.template, loaded.tokenizer)
    sets = {name: evenly_spaced(rows, data.limit) for name, rows in load_corpus(data).sets().items()}
    groups = {name: [sets["forget"][place] for place in places] for name, places in requests.items()}
    groups |= {name: sets[name] for name in config.sets if name in sets and name not in ("forget", "forget_paraphrase")}
    mean: dict[str, dict[str, float]] = {name: {} for name in loaded.model.names}
    opened: dict[str, dict[str, float]] = {name: {} for name in loaded.model.names}
    any_open = {}
    for group, rows in groups.items():
        encoded = encode_rows(rows, loaded.tokenizer, template, None, strict=False)
        prompts = [row.prompt_ids for row in encoded]
        widest = prompt_gates_by_request(loaded.model, prompts, config.batch_size, int(loaded.tokenizer.pad_token_id))
        for name, values in zip(loaded.model.names, widest, strict=True):
            mean[name][group] = float(values.mean())
            opened[name][group] = float((values > OPEN).double().mean())
        any_open[group] = float((widest.amax(dim=0) > OPEN).double().mean())
    loaded.model.unwrap()
    counts = {group: len(rows) for group, rows in groups.items()}
    return {"mean": mean, "open": opened, "any_open": any_open, "rows": counts}


def prompt_gates_by_request(model: Any, prompts: Sequence[Sequence[int]], batch_size: int, pad_id: int) -> Tensor:
    """Probability of each request's widest gate (over blocks) at the last token of each prompt.

    Args:
        model: a `GrunStack`.
        prompts: token ids.
        batch_size: prompts a pass.
        pad_id: id of padding, which is masked.

    Returns:
        float64, shape [requests, prompts], requests as in `model.names`.
    """
    import torch

    from grun.data.encoding import EncodedRow, collate

    parts = []
    for start in range(0, len(prompts), batch_size):
        rows = [EncodedRow(tuple(prompt), ()) for prompt in prompts[start : start + batch_size]]
        batch = collate(rows, pad_id).to(model.device)
        with torch.no_grad():
            model(batch.input_ids, batch.attention_mask, prompt_lengths=batch.prompt_lengths)
        last = batch.prompt_lengths[:, None] - 1  # [batch, 1]
        found = []
        for gates in model.request_gates.values():
            # A gate that reads every token has a column for each; one that reads the last prompt token has one.
            at_end = [
                gate if gate.shape[1] == 1 else gate.gather(1, last.to(gate.device)) for gate in gates.values()
            ]  # each [batch, 1]
            found.append(torch.cat([gate.double().cpu() for gate in at_end], dim=1).amax(dim=1))
        parts.append(torch.stack(found))
    return torch.cat(parts, dim=1)
