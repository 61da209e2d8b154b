"""The objective of a run: a preset, and the terms, weights and options that replace parts of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, get_args

from grun.config.options import LossConfig
from grun.errors import ConfigError
from grun.objectives.gate import gate_passes
from grun.objectives.terms import (
    OBJECTIVES,
    TERMS,
    Continuation,
    Options,
    Reference,
    Side,
    Term,
    negative_log_likelihood,
    number_of,
)

if TYPE_CHECKING:
    from grun.data.encoding import Batch

POSITIVE = ("beta", "eta", "ascent_cap")
"""Options that must be > 0; the others must be >= 0."""
OF_GATE = ("gate_weight", "gate_warmup_steps")
"""Fields of LossConfig that only a gate term reads. Without a gate they may be set: profiles set them for all."""
SIDES = get_args(Side)


@dataclass(frozen=True)
class Objective:
    """Terms and weights in force; the total is forget_weight * forget + retain_weight * retain + gate_weight * gate."""

    terms: dict[str, Term]
    """By side: forget, retain, gate; a side without a term is absent."""
    weights: dict[str, float]
    """By side, at the first step; see `next_weights`."""
    options: dict[str, Options]
    """By side, what the term's options are."""
    gate_warmup_steps: int = 0
    """See `warmup`."""

    @property
    def continuations(self) -> list[Continuation]:
        """Passes to run. The retain pass is run for the gate term even where there is no retain term."""
        wanted = {name for term in self.terms.values() for name in term.continuations}
        if "gate" in self.terms:
            wanted.add("retain")
            if not wanted & {"answer", "refusal"}:
                wanted.add("answer")
        order = ("answer", "refusal", "alternate", "retain")
        return [name for name in order if name in wanted]

    @property
    def reference(self) -> Reference:
        """The most that a term in force reads of the untouched model's passes over the same rows."""
        order: tuple[Reference, ...] = get_args(Reference)
        read = (term.reference for term in self.terms.values() if not term.teacher)
        return max(read, key=order.index, default="none")

    @property
    def teacher(self) -> bool:
        """Whether the untouched model is asked about others."""
        return any(term.teacher for term in self.terms.values())

    @property
    def reference_continuations(self) -> list[Continuation]:
        """Passes to run under the untouched model too."""
        reading = [term for term in self.terms.values() if term.reference != "none" and not term.teacher]
        wanted = {name for term in reading for name in term.continuations}
        return [name for name in self.continuations if name in wanted]

    def hidden(self, depth: int) -> tuple[int, ...]:
        """Blocks whose hidden states some term reads, of a model with `depth` blocks."""
        return tuple(
            sorted({block for side, term in self.terms.items() for block in term.hidden(self.options[side], depth)})
        )

    @property
    def reads_head(self) -> bool:
        """Whether some term but the gate's reads log-probabilities or logits."""
        return any(term.reads_head for side, term in self.terms.items() if side != "gate")

    def counted(self, side: str) -> list[Continuation]:
        """Passes over which the count of a side's term adds up; a row mean over two passes counts pairs."""
        if side == "gate":
            return gate_passes(self.continuations)
        term = self.terms[side]
        return list(term.continuations[:1] if term.per == "row" else term.continuations)

    def counts(self, micro_batches: Sequence[Mapping[Continuation, Batch]]) -> dict[str, int]:
        """Denominator of each side's term over the micro-batches of a step."""
        return {
            side: sum(number_of(term.per, batch[name]) for batch in micro_batches for name in self.counted(side))
            for side, term in self.terms.items()
        }

    def warmup(self, step: int) -> float:
        """Weight of the forget and retain terms at 0-based `step`: min(step / gate_warmup_steps, 1)."""
        if "gate" not in self.terms or self.gate_warmup_steps <= 0:
            return 1.0
        return min(step / self.gate_warmup_steps, 1.0)

    @property
    def adapts(self) -> bool:
        """Whether the retain weight changes from step to step."""
        return "forget" in self.terms and self.terms["forget"].dual is not None

    def next_weights(self, weights: Mapping[str, float], parts: Mapping[str, float], epochs: int) -> dict[str, float]:
        """Weights of the step after one with `weights` and terms `parts`, `epochs` passes being finished before it."""
        dual = self.terms["forget"].dual if "forget" in self.terms else None
        if dual is None:
            return dict(weights)
        return {**weights, "retain": dual(weights["retain"], parts["retain"], epochs, self.options["forget"])}


def learning() -> Objective:
    """CE of the answers to forget, and nothing else: what a task vector is trained by."""
    term = Term("forget", "token", ("answer",), lambda outputs, _: negative_log_likelihood(outputs.model["answer"]))
    return Objective({"forget": term}, {"forget": 1.0}, {"forget": {}})


def build_objective(name: str, loss: LossConfig, *, gated: bool, quirks: Collection[str] = ()) -> Objective:
    """Resolve a preset and the options that override it.

    Args:
        name: preset.
        loss: terms, weights and options that replace the preset's and the terms' own where set.
        gated: whether the parametrization has a gate; without one there is no gate term.
        quirks: published quirks in force; those of terms that are not chosen are let pass.

    Raises:
        ConfigError: an unknown name, a term on the wrong side, a weight or option that is out of range, that is
            missing, or that no chosen term reads.
    """
    preset = OBJECTIVES.get(name)
    names = {
        "forget": loss.forget or preset.forget,
        "retain": loss.retain or preset.retain,
        "gate": loss.gate if gated else "none",
    }
    names = {side: term_name for side, term_name in names.items() if term_name != "none"}
    terms: dict[str, Term] = {}
    for side, term_name in names.items():
        term = TERMS.get(term_name)
        if term.side != side:
            known = ", ".join(_terms_of(side))
            raise ConfigError(f"loss.{side}={term_name} is a {term.side} term; known {side} terms: {known}")
        terms[side] = next((term.quirks[quirk] for quirk in quirks if quirk in term.quirks), term)
    _refuse_unread(loss, names, terms, gated)
    if "forget" in terms and terms["forget"].dual is not None and "retain" not in terms:
        raise ConfigError(
            f"loss.retain=none: the term {names['forget']} adapts the retain weight; name a retain term: "
            f"{', '.join(_terms_of('retain')[:-1])}"
        )
    weights = {
        "forget": preset.forget_weight if loss.forget_weight is None else loss.forget_weight,
        "retain": preset.retain_weight if loss.retain_weight is None else loss.retain_weight,
        "gate": loss.gate_weight,
    }
    for side in terms:
        if not weights[side] >= 0:
            raise ConfigError(f"loss.{side}_weight {weights[side]} must not be negative")
    return Objective(
        terms,
        {side: weights[side] for side in terms},
        {side: _options(names[side], term, loss, quirks) for side, term in terms.items()},
        loss.gate_warmup_steps,
    )


def _options(name: str, term: Term, loss: LossConfig, quirks: Collection[str]) -> dict[str, float]:
    """What the options of a term are: as set, else its published defaults."""
    options = {}
    for option, default in term.options.items():
        given = getattr(loss, option, None)
        value = default if given is None else given
        if value is None:
            raise ConfigError(f"loss.{option} must be set: the term {name} has no default for it (docs/objectives.md)")
        if option == "rmu_block" and "rmu_hidden_state_index" in quirks:
            if value < 1:
                raise ConfigError(f"loss.rmu_block {value} must be 1 or more: the quirk in force counts the embeddings")
            value -= 1
        if option in POSITIVE and not value > 0:
            raise ConfigError(f"loss.{option} {value} must be greater than 0")
        if not value >= 0:
            raise ConfigError(f"loss.{option} {value} must not be negative")
        options[option] = value
    return options


def _refuse_unread(loss: LossConfig, names: Mapping[str, str], terms: Mapping[str, Term], gated: bool) -> None:
    """ConfigError for the first weight or option that is set and that no term in force reads."""
    unset = LossConfig()
    read = {f"{side}_weight" for side in terms} | {option for term in terms.values() for option in term.options}
    if "gate" in terms:
        read.update(OF_GATE)
    passed = {*SIDES, *read, *(() if gated else OF_GATE)}
    for field in fields(LossConfig):
        value = getattr(loss, field.name)
        if value != getattr(unset, field.name) and field.name not in passed:
            readable = ", ".join(one.name for one in fields(LossConfig) if one.name in read) or "nothing"
            default = "null" if getattr(unset, field.name) is None else getattr(unset, field.name)
            raise ConfigError(
                f"loss.{field.name}={value} has no effect: the terms in force ({', '.join(names.values()) or 'none'}) "
                f"read {readable}; leave it out, or unset what a profile sets with loss.{field.name}={default}"
            )


def _terms_of(side: str) -> list[str]:
    return [entry.name for entry in TERMS if TERMS.get(entry.name).side == side] + ["none"]
