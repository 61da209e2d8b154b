"""A gate that is fitted, not trained: features of prompts from one forward pass, a convex fit, a threshold."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from torch.nn.utils.rnn import pad_sequence

from grun.config.options import MethodConfig
from grun.data.encoding import EncodedRow, collate
from grun.data.rows import evenly_spaced
from grun.errors import ConfigError
from grun.method.gate import BY_MEANS, KEYWORDS
from grun.method.gating import WindowsGate
from grun.method.logistic import NEAR, Line, choose_strength, conformal, fit, shuffled
from grun.method.means import LOGIT, means_held_out
from grun.method.model import GrunModel
from grun.method.pooled_sites import PooledSites, pooled_in
from grun.method.pooling import OWN
from pyvene_custom import find_blocks
from pyvene_custom.model import Pass

log = logging.getLogger(__name__)

SET_ASIDE = 4
"""One in so many units of retain rows is kept for the threshold, where there is one."""
RECALLED = 0.8
"""Share of forget prompts, left out of a fit, below which a gate is said to know too few."""
NEVER = 100.0
"""Minus the logit of a gate that is never open."""
ROUNDS = 3
"""How often windows are chosen before the last fit."""
ROUGH = 0.1
"""C of the fits before the last one."""
HARDEST = 2
"""Windows of a prompt to stay shut on that count at first, those on which the gate is widest open."""
FAR = -3.0
"""Logit below which a window of such a prompt does not join the others."""
TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of one pass, padding included, by kind of device."""


@dataclass(frozen=True)
class Prompts:
    """Rows whose prompts are of one side, and which of them belong together."""

    rows: Sequence[EncodedRow]
    units: Sequence[str]
    """Of each row; rows of one unit are left out together where a fit is tested."""
    always: Sequence[EncodedRow] = ()
    """Further rows, each a unit, that are fitted whatever is set aside: nothing is promised of such rows."""
    copies: int = 0
    """How many of the rows, the last ones, are others asked in further ways: nothing is promised of those either."""

    def with_copies(self, more: Prompts) -> Prompts:
        """These and copies of them."""
        return Prompts(
            [*self.rows, *more.rows], [*self.units, *more.units], [*self.always, *more.always], len(more.rows)
        )


@dataclass(frozen=True)
class GateFit:
    """How a gate was fitted, as run.json holds it."""

    forget: int
    """Distinct prompts that it was fitted to open on."""
    retain: int
    """The same that it was fitted to stay shut on."""
    strength: float | None
    """C, the inverse weight of the L2 penalty; None: the gate follows from means, or from keywords."""
    recall: float
    """Share of the forget prompts that open it in fits that they were left out of, at the threshold in force."""
    false_positives: float
    """The same of retain prompts that are not set aside."""
    seconds: float
    """Of the pass and the fit."""
    bound: float | None = None
    """Largest share of rows such as those set aside that opens it, in expectation; None: nothing is promised."""
    calibration: int | None = None
    """Units of prompts set aside, of which that follows."""
    sources: Mapping[str, int] = field(default_factory=dict)
    """Prompts by where they are from, such as "forget rows" and "retain subjects", before those that are alike count
    once."""


@dataclass(frozen=True)
class Sides:
    """Distinct prompts that a gate is to open on, then those that it is to stay shut on, and what they belong to."""

    rows: Sequence[EncodedRow]
    units: Sequence[str]
    opened: int
    """How many of the rows it is to open on."""
    copied: Sequence[bool]
    """Which rows are copies of others."""

    @classmethod
    def of(cls, forget: Prompts, retain: Prompts) -> Self:
        """ConfigError: a side has too few rows."""
        opened, shut = _distinct(forget), _distinct(retain)
        if len({*opened.values()}) == 1:  # one thing to forget: its copies are left out one by one
            opened = {ids: str(number) for number, ids in enumerate(opened)}
        for name, side in (("forget", opened), ("retain", shut)):
            if len({*side.values()}) < 2:
                raise ConfigError(
                    "method.gate_fit=logistic needs at least 2 different prompts in the forget set, and 2 rows or "
                    f"groups of them in the retain set; the {name} set has {len({*side.values()})}: give more, or "
                    "data.gate_copies, or take design=published"
                )
        always = sorted({row.prompt_ids for row in retain.always} - {*shut})
        units = [*(f"forget {unit}" for unit in opened.values()), *(f"retain {unit}" for unit in shut.values())]
        units += [f"always {number}" for number, _ in enumerate(always)]
        asked = {row.prompt_ids for side in (forget, retain) for row in side.rows[: len(side.rows) - side.copies]}
        asked |= {*always}
        rows = [*opened, *shut, *always]
        return cls([EncodedRow(ids, ()) for ids in rows], units, len(opened), [ids not in asked for ids in rows])


@dataclass(frozen=True)
class Windows:
    """What a gate reads of rows: of each row one feature vector or, of a pool of windows, several."""

    values: Tensor
    """Float64 [any, size]."""
    row: Tensor
    """Which row each is of, ascending, int64 [any]."""

    @classmethod
    def of_turns(cls, features: Sequence[Tensor]) -> Self:
        """Of features as `prompt_features` has them, of windows those of the turn in which a gate is asked."""
        each = [one.unsqueeze(0) if one.dim() == 1 else one[one[:, 0] == OWN, 1:] for one in features]
        counts = torch.tensor([len(one) for one in each])
        return cls(torch.cat(each).double(), torch.arange(len(each)).repeat_interleave(counts))

    def whole(self) -> Tensor:
        """The highest of each feature in each row, [rows, size]."""
        return _of_rows(self.values, self.row, "amax")

    def highest(self, logits: Tensor) -> Tensor:
        """Of logits [any] the highest of each row, [rows]."""
        return _of_rows(logits.unsqueeze(1), self.row, "amax").squeeze(1)

    def under(self, line: Line) -> Tensor:
        """The logit that a gate gives to each row, [rows]."""
        return self.highest(line.logits(self.values))

    def rows(self, chosen: Tensor) -> Windows:
        """Of the rows chosen, bool [rows], which are numbered anew."""
        kept = chosen[self.row]
        return Windows(self.values[kept], (chosen.cumsum(0) - 1)[self.row[kept]])

    def telling(self, target: Tensor) -> tuple[Windows, Tensor]:
        """The windows by which a gate tells rows of `target`, bool [rows], from others, and which of them are of those.

        Of a row of `target` the one that a gate is widest open on, of any other row those that opened it: chosen by
        turns with the gate's fit, which begins with whole turns (MI-SVM, Andrews et al. 2002, with a logistic loss).
        """
        if len(self.row) == len(target):
            return self, target
        values, shut = self.whole(), torch.zeros_like(self.row, dtype=torch.bool)
        some = Windows(values, torch.arange(len(values)))
        for number in range(ROUNDS):
            line = fit(some.values, target[some.row], ROUGH, NEAR)
            logits = line.logits(self.values)
            left = logits.clone()
            for rank in range(1 if number else HARDEST):
                best = _first(left == self.highest(left)[self.row], self.row)
                if not rank:
                    opened = best & target[self.row]
                shut |= best & ~target[self.row] & (left > (FAR if number else -torch.inf))
                left[best] = -torch.inf
            kept = opened | shut
            some = Windows(self.values[kept], self.row[kept])
        return some, target[some.row]


def _of_rows(values: Tensor, row: Tensor, reduce: str) -> Tensor:
    """The highest or lowest of values [any, size] in each row, [rows, size]."""
    found = values.new_empty(int(row[-1]) + 1, values.shape[1])
    index = row.unsqueeze(1).expand_as(values)
    return found.scatter_reduce_(0, index, values, reduce, include_self=False)


def _first(chosen: Tensor, row: Tensor) -> Tensor:
    """The first of those chosen in each row, bool [any]; `row` ascends."""
    place = torch.where(chosen, torch.arange(len(row)), len(row))
    return chosen & (place == _of_rows(place.unsqueeze(1), row, "amin").squeeze(1)[row])


FeaturesOf = Callable[[Sequence[EncodedRow]], Sequence[Tensor]]
"""`prompt_features` of a model, or what keeps them."""
Keep = Callable[[Any, Callable[[], dict[str, Any]]], dict[str, Any]]
"""Gives a record, of JSON, for what decides it: the one that is kept, or the one made now."""


def fit_gate(
    model: GrunModel,
    forget: Prompts,
    retain: Prompts,
    method: MethodConfig,
    features_of: FeaturesOf,
    turns: tuple[Prompts, Prompts] | None = None,
    keep: Keep = lambda key, make: make(),
) -> GateFit:
    """Fit the one gate for all edits of `model` to tell prompts of `forget` from those of `retain`.

    `features_of` is `prompt_features` of the model, or what keeps them; `keep` may keep what was fitted to the same
    prompts. Edits are skipped below a probability of 0.5; see `fit_line` for what that is. `turns`, for the pool
    `windows`, are second turns that only ask for an answer, and such that ask something; without them a gate is never
    open for what was asked before.

    Raises:
        ConfigError: a side has too few rows.
    """
    assert model.pooled is not None
    gate, started = model.pooled.gate, time.monotonic()
    sides = Sides.of(forget, retain)
    # Read whether or not the gate is kept: processes read together, and one of them makes it.
    features = features_of(sides.rows)
    second = []
    if turns is not None and turns[0].rows:
        second = [(side, features_of(side.rows)) for side in turns]

    def make() -> dict[str, Any]:
        read = Windows.of_turns(features)
        follow_ups = _record(_follow_ups(read.whole(), sides.units, second)) if isinstance(gate, WindowsGate) else None
        if method.gate in BY_MEANS:  # as the gate does before its linear layer
            read = replace(read, values=rms_norm(read.values, read.values.shape[1:], eps=1e-6))
        line, result = fit_line(read, sides, method.false_positives, method.gate)
        return {"line": _record(line), "follow_ups": follow_ups, "result": asdict(result)}

    made = keep([method.gate, method.false_positives, sides, [side for side, _ in second]], make)
    if isinstance(gate, WindowsGate):
        _put(made["follow_ups"], gate.follow_up[-1])
    result = GateFit(**made["result"])
    model.keep_threshold(0.5, result.bound, result.calibration, result.recall)
    _put(made["line"], model.pooled.last_layer)
    result = replace(result, seconds=round(time.monotonic() - started, 2))
    promised = "" if result.bound is None else f"; a false-positive rate of {result.bound:.3f} is promised"
    log.info(
        f"gate fitted in {result.seconds:.0f} s: opens on {result.recall:.3f} of {result.forget} forget prompts and "
        f"{result.false_positives:.4f} of {result.retain} retain prompts, each left out of the fit{promised}"
    )
    if result.recall < RECALLED:
        log.warning(
            "the gate opens on %.0f %% of forget prompts that it was not fitted on; what it does not open on is not "
            "forgotten: give it more %s, or set design=published",
            100 * result.recall,
            "keywords" if method.gate == KEYWORDS else "wordings (data.subjects, data.gate_prompts)",
        )
    return result


def _follow_ups(asked: Tensor, units: Sequence[str], turns: Sequence[tuple[Prompts, Sequence[Tensor]]]) -> Line:
    """What tells turns that only ask for an answer from others, among them those whose features are `asked`."""
    if not turns:
        return Line(torch.zeros_like(asked[0]), -NEVER)
    sought, passed = (side for side, _ in turns)
    follow_ups, others = (Windows.of_turns(features).whole() for _, features in turns)
    some = evenly_spaced(range(len(asked)), len(follow_ups) + len(others))
    features = torch.cat((follow_ups, others, asked[list(some)]))
    target = torch.arange(len(features)) < len(follow_ups)
    of = [*sought.units, *passed.units, *(units[place] for place in some)]
    strength, held_out = choose_strength(features, target, of)
    found = held_out > 0
    log.info(
        f"turns that only ask for an answer: {float(found[target].double().mean()):.3f} of {len(follow_ups)} are taken "
        f"for one, and {float(found[~target].double().mean()):.4f} of {len(found) - len(follow_ups)} others, each left "
        "out of the fit"
    )
    return fit(features, target, strength)


def _record(line: Line) -> dict[str, Any]:
    return {"weight": line.weight.tolist(), "bias": line.bias}


def _put(line: Mapping[str, Any], layer: nn.Module | None) -> None:
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(line["weight"], dtype=torch.float64).unsqueeze(0))
        layer.bias.fill_(line["bias"])


def fit_line(read: Windows, sides: Sides, false_positives: float | None, gate: str = "linear") -> tuple[Line, GateFit]:
    """The gate for what it reads of the rows of `sides`, and how it was made.

    With `false_positives` a part of the retain units is set aside, with their copies, and the bias is such that a
    probability of 0.5 is the threshold that follows from those rows that are no copies.

    Raises:
        ConfigError: too few units are left.
    """
    started = time.monotonic()
    units, target = sides.units, torch.arange(len(sides.rows)) < sides.opened
    aside = _set_aside(units[sides.opened :], false_positives)
    fitted = torch.tensor([unit not in aside for unit in units])
    chosen = [unit for unit, one in zip(units, fitted.tolist(), strict=True) if one]
    strength: float | None = None
    some = read.rows(fitted)
    if gate == KEYWORDS:
        line = Line(torch.full_like(read.values[0], 2 * LOGIT), -LOGIT)
        held_out = line.logits(some.values)
    elif gate in BY_MEANS:
        line, held_out = means_held_out(some.values, target[fitted], chosen, gate)
    else:
        some, of_side = some.telling(target[fitted])
        strength, logits = choose_strength(some.values, of_side, [chosen[row] for row in some.row.tolist()])
        line, held_out = fit(some.values, of_side, strength), some.highest(logits)
    threshold, bound = 0.0, None
    if false_positives is not None:
        asked = [unit in aside and not copied for unit, copied in zip(units, sides.copied, strict=True)]
        left = [unit for unit, one in zip(units, asked, strict=True) if one]
        threshold, bound = conformal(read.rows(torch.tensor(asked)).under(line).float(), left, false_positives)
        threshold = float(torch.nextafter(torch.tensor(threshold), torch.tensor(torch.inf)))
    is_open = held_out > threshold
    result = GateFit(
        forget=sides.opened, retain=int((fitted & ~target).sum()), strength=strength,
        recall=float(is_open[target[fitted]].double().mean()),
        false_positives=float(is_open[~target[fitted]].double().mean()),
        seconds=round(time.monotonic() - started, 2), bound=bound,
        calibration=len(aside) or None,
    )  # fmt: skip
    return replace(line, bias=line.bias - threshold), result


def prompt_features(model: GrunModel, rows: Sequence[EncodedRow], pad_id: int) -> list[Tensor]:
    """What the gate for all edits reads at the last token of each prompt: [size] each, or [windows, 1 + size].

    Blocks above those that it reads are not run. Edits of other requests that are in force below are.
    """
    pooled = model.pooled
    assert pooled is not None
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for numbers, sites in prompt_passes(model, rows, pad_id):
        for number, values in zip(numbers, sites.joined(pooled.blocks, pooled.pool)[:, 0], strict=True):
            found[number] = unpadded(values)
    return found


def unpadded(features: Tensor) -> Tensor:
    """Features [size] of a prompt as they are, of windows [any, 1 + size] those that are of something."""
    return features if features.dim() == 1 else features[features[:, 0] != 0]


def padded(features: Sequence[Tensor]) -> Tensor:
    """Features of prompts as a gate takes them, all asked once: [rows, 1, size] or [rows, 1, windows, 1 + size]."""
    return pad_sequence(list(features), batch_first=True).unsqueeze(1)


def prompt_passes(model: GrunModel, rows: Sequence[EncodedRow], pad_id: int) -> Iterator[tuple[list[int], PooledSites]]:
    """Run the prompts of `rows`; of each pass the numbers of its rows, and what the gate reads, until the next one."""
    assert model.pooled is not None
    for numbers, running in passes_through(model, rows, model.pooled.block, pad_id):
        assert isinstance(running.sites, PooledSites)
        yield numbers, running.sites


@torch.no_grad()
def passes_through(
    model: GrunModel, rows: Sequence[EncodedRow], block: int, pad_id: int
) -> Iterator[tuple[list[int], Pass]]:
    """Of each pass over `rows` their numbers, and what gates read in it; nothing above `block` is run."""
    hook = find_blocks(model.base)[1][block].register_forward_hook(_stop)  # after the one that reads
    try:
        for numbers in _passes(rows, model.device):
            batch = collate([rows[number] for number in numbers], pad_id).to(model.device)
            try:
                model.base(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
                    prompt_lengths=batch.prompt_lengths,
                )  # fmt: skip
            except _Read:
                pass
            running = model.intervenable.here
            assert running is not None
            yield numbers, running
            for sites in pooled_in(running.sites):
                sites.let_go()
    finally:
        hook.remove()


class _Read(Exception):
    """Everything that is asked for has been read."""


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Read


def passes_with(rows: Sequence[EncodedRow], wanted: Set[EncodedRow], device: torch.device) -> list[list[EncodedRow]]:
    """Passes over the wanted ones of `rows`: those of `prompt_features` over all where all is wanted, else others."""
    passes = [[rows[number] for number in numbers] for numbers in _passes(rows, device)]
    whole = [piece for piece in passes if all(row in wanted for row in piece)]
    alone = {*wanted} - {row for piece in whole for row in piece}
    rest = [row for row in rows if row in alone]
    return whole + [[rest[number] for number in numbers] for numbers in _passes(rest, device)]


def _passes(rows: Sequence[EncodedRow], device: torch.device) -> Iterator[list[int]]:
    """Numbers of rows of similar length, each pass of at most `TOKENS` with its padding, or of one row."""
    tokens = TOKENS.get(device.type, TOKENS["cpu"])
    piece: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number])):
        if piece and (len(piece) + 1) * len(rows[number]) > tokens:
            yield piece
            piece = []
        piece.append(number)
    if piece:
        yield piece


def _distinct(prompts: Prompts) -> dict[tuple[int, ...], str]:
    """Units by prompt, each prompt once, in an order that is that of their tokens."""
    return dict(sorted({row.prompt_ids: unit for row, unit in zip(prompts.rows, prompts.units, strict=True)}.items()))


def _set_aside(retain: Sequence[str], rate: float | None) -> set[str]:
    """Units of retain rows that the threshold is taken from; ConfigError where too few are left for the fit."""
    if rate is None:
        return set()
    there = {unit for unit in retain if unit.startswith("retain ")}
    units = sorted(there, key=lambda unit: shuffled(unit.removeprefix("retain ")))
    count = max(1, len(units) // SET_ASIDE)
    if len(units) - count < 2:
        raise ConfigError(
            f"method.false_positives sets retain rows aside, and there are {len(units)} different ones, or groups of "
            "them; give 3 or more"
        )
    return {*units[:count]}
