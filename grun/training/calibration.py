"""Where the gate of an adapter stands, set anew by rows that must stay and that it was not made from."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grun.data.encoding import EncodedRow
from grun.errors import ConfigError, DataError
from grun.method.logistic import conformal, groups_needed
from grun.method.model import GrunModel
from grun.training.gate_fit import Prompts, passes_through

MARGIN = 1e-3
"""Of logits, how far above the highest score a threshold stands, in parts of it: more than rounding in a batch."""


@dataclass(frozen=True)
class Calibration:
    """What a threshold promises, as run.json holds it."""

    false_positives: float
    """Largest share of rows to keep that was to open the gate."""
    bound: float
    """Largest share of new ones that opens it, in expectation."""
    calibration: int
    """Rows, or groups of them, of which that follows."""
    opened: float
    """Share of these rows that opens the gate as it stands now."""
    opened_before: float
    recall: float | None = None
    """The same of forget rows; None: there are none."""
    recall_before: float | None = None


def calibrate(model: GrunModel, keep: Prompts, forget: Sequence[EncodedRow], rate: float, pad_id: int) -> Calibration:
    """Set the threshold of the gates of `model`: of rows such as `keep` at most `rate` open any, in expectation.

    What is open is soft as before; below the threshold the model is the base's, bit for bit. One gate for all edits is
    moved by its bias, so that the threshold is a probability of 0.5; elsewhere `gate_threshold` is another probability,
    which a row passes by its widest gate, at any token that gates read.

    Args:
        model: in evaluation mode; its gate changes.
        keep: rows that must stay, of which none had a part in making the gate; rows of a unit are no others' likes.
        forget: rows to be forgotten; perhaps none.
        rate: wanted share of false positives, in (0, 1).
        pad_id: id of padding, which is masked.

    Raises:
        ConfigError: the model has no gate, the rows are too few for the rate, or no threshold shuts its gates.
        DataError: there are no rows to keep.

    Source: split conformal prediction, see `grun.method.logistic.conformal`.
    """
    if model.config.gate == "none":
        raise ConfigError("the adapter has no gate, so there is nothing to calibrate: its edit acts on every prompt")
    distinct = {row: unit for row, unit in zip(keep.rows, keep.units, strict=True)}
    if not distinct:
        raise DataError("there are no rows to keep, by which a gate is calibrated; give some that it was not made from")
    check_enough(len(set(distinct.values())), rate)
    bias = _bias(model)
    kept, lost = (gate_scores(model, rows, pad_id) for rows in (list(distinct), list(dict.fromkeys(forget))))
    stood = 0.5 if model.gate_threshold is None else model.gate_threshold
    before = [scores.sigmoid().float() >= stood for scores in (kept, lost)]
    if bias is None:
        kept, lost = kept.float().sigmoid().double(), lost.float().sigmoid().double()
    threshold, bound = conformal(kept, list(distinct.values()), rate)
    stands = _between(kept, threshold, probability=bias is None)
    opened, recall = _share(kept > stands), _share(lost > stands)
    units = len(set(distinct.values()))
    if bias is not None:
        with torch.no_grad():
            bias -= stands
    model.keep_threshold(0.5 if bias is not None else stands, bound, units, recall)
    return Calibration(rate, bound, units, opened or 0.0, _share(before[0]) or 0.0, recall, _share(before[1]))


def check_enough(units: int, rate: float) -> None:
    """ConfigError where so many rows, or groups of them, cannot promise the rate: no less than 1 / (units + 1)."""
    least = 1 / (units + 1)
    if rate < least - 1e-9:
        raise ConfigError(
            f"false_positives={rate:g} needs {groups_needed(rate)} rows to keep, or groups of them (data.group), and "
            f"there are {units}, which can promise {least:.3g} and no less; give more, or set "
            f"false_positives={math.ceil(least * 1e4) / 1e4:g}"
        )


def gate_scores(model: GrunModel, rows: Sequence[EncodedRow], pad_id: int) -> Tensor:
    """Logit of the widest gate of each row, over blocks and tokens that gates read: float64 [rows].

    Edits are skipped meanwhile: a gate that reads what an earlier one would have edited decides nothing, since the
    earlier one is open then. Gates that read every token read those of the answer too.
    """
    found = torch.zeros(len(rows), dtype=torch.float64)
    last = model.pooled.block if model.pooled is not None else max(model.own_edits())
    with _all_shut(model):
        for numbers, running in passes_through(model, rows, last, pad_id):
            assert running.sites is not None
            counts = running.sites.read_mask
            widest = [logits.masked_fill(~counts, -torch.inf).amax(1) for logits in running.gates.values()]
            found[numbers] = torch.stack(widest).amax(0).double().cpu()
    return found


@contextlib.contextmanager
def _all_shut(model: GrunModel) -> Iterator[None]:
    """Within the block no gate passes the threshold, so that no edit acts."""
    before = model.gate_threshold
    for edit in model.own_edits().values():
        edit.threshold = math.inf
    try:
        yield
    finally:
        model.gate_threshold = before


def _bias(model: GrunModel) -> Tensor | None:
    """Bias of the last layer of the one gate for all edits; None where there is none to be moved."""
    last = None if model.pooled is None else model.pooled.last_layer
    return None if last is None else last.bias


def _between(scores: Tensor, threshold: float, *, probability: bool) -> float:
    """Halfway from a threshold to the next higher score, so that rounding moves no row across; the same rows pass.

    ConfigError for a probability of 1, which no threshold is above.
    """
    higher = scores[scores > threshold]
    if len(higher):
        stands = (threshold + float(higher.min())) / 2
    elif not probability:
        return threshold + MARGIN * max(1.0, abs(threshold))
    else:
        stands = (threshold + 1) / 2
    if probability:
        if threshold >= 1:
            raise ConfigError(
                "gates are open on some of the rows to keep by a probability of 1 in float32, so no threshold shuts "
                "them at this rate; fit a gate (design=pooled), or raise false_positives"
            )
        above = float(torch.nextafter(torch.tensor(threshold), torch.tensor(1.0)))
        stands = max(float(torch.tensor(stands)), above)  # as it is compared, in float32
    return stands


def _share(is_open: Tensor) -> float | None:
    return float(is_open.double().mean()) if len(is_open) else None
