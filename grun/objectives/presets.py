"""Named objectives: a forget term, a retain term and their weights. A name never changes its meaning."""

from __future__ import annotations

from dataclasses import dataclass

from grun.config import LossConfig
from grun.errors import ConfigError
from grun.objectives.terms import TERMS, Continuation, Term
from grun.registry import Registry


@dataclass(frozen=True)
class Preset:
    """A published pair of terms; weights unset in the options are these."""

    forget: str
    retain: str
    forget_weight: float = 1.0
    retain_weight: float = 1.0


OBJECTIVES: Registry[Preset] = Registry("objective")
OBJECTIVES.add("ga", Preset("ga", "none"), "gradient ascent alone: ga")
OBJECTIVES.add("gd", Preset("ga", "ce"), "gradient difference: ga + ce")
OBJECTIVES.add("idk", Preset("idk", "ce"), "answer with a refusal: idk + ce")
OBJECTIVES.add("npo", Preset("npo", "ce"), "negative preference optimization with retain CE: npo + ce")


@dataclass(frozen=True)
class Objective:
    """Terms and weights in force; the total is forget_weight * forget + retain_weight * retain + gate_weight * gate."""

    terms: dict[str, Term]
    """By side: forget, retain, gate; a side without a term is absent."""
    weights: dict[str, float]
    """By side."""
    options: LossConfig

    @property
    def continuations(self) -> list[Continuation]:
        """Passes to run. The retain pass is run for the gate term even where there is no retain term."""
        wanted = {name for term in self.terms.values() for name in term.continuations}
        if "gate" in self.terms:
            wanted.add("retain")
            if not wanted & {"answer", "refusal"}:
                wanted.add("answer")
        order = ("answer", "refusal", "retain")
        return [name for name in order if name in wanted]

    @property
    def reference_continuations(self) -> list[Continuation]:
        """Passes to run under the untouched model too."""
        wanted = {name for term in self.terms.values() if term.reference for name in term.continuations}
        return [name for name in self.continuations if name in wanted]

    @property
    def hidden(self) -> tuple[int, ...]:
        """Blocks whose hidden states some term reads."""
        return tuple(sorted({block for term in self.terms.values() for block in term.hidden(self.options)}))

    def warmup(self, step: int) -> float:
        """Weight of the forget and retain terms at 0-based `step`: min(step / gate_warmup_steps, 1)."""
        if "gate" not in self.terms or self.options.gate_warmup_steps <= 0:
            return 1.0
        return min(step / self.options.gate_warmup_steps, 1.0)


def build_objective(name: str, options: LossConfig, *, gated: bool) -> Objective:
    """Resolve a preset and the options that override it.

    Args:
        name: preset.
        options: terms and weights that replace the preset's where set.
        gated: whether the parametrization has a gate; without one there is no gate term.

    Raises:
        ConfigError: an unknown name, a term on the wrong side, or a weight that is out of range.
    """
    preset = OBJECTIVES.get(name)
    chosen = {
        "forget": options.forget or preset.forget,
        "retain": options.retain or preset.retain,
        "gate": options.gate if gated else "none",
    }
    weights = {
        "forget": preset.forget_weight if options.forget_weight is None else options.forget_weight,
        "retain": preset.retain_weight if options.retain_weight is None else options.retain_weight,
        "gate": options.gate_weight,
    }
    if options.beta <= 0:
        raise ConfigError(f"loss.beta {options.beta} must be greater than 0")
    terms: dict[str, Term] = {}
    for side, term_name in chosen.items():
        if term_name == "none":
            continue
        term = TERMS.get(term_name)
        if term.side != side:
            known = ", ".join(_terms_of(side))
            raise ConfigError(f"loss.{side}={term_name} is a {term.side} term; known {side} terms: {known}")
        if weights[side] < 0:
            raise ConfigError(f"loss.{side}_weight {weights[side]} must not be negative")
        terms[side] = term
    return Objective(terms, {side: weights[side] for side in terms}, options)


def _terms_of(side: str) -> list[str]:
    return [entry.name for entry in TERMS if TERMS.get(entry.name).side == side] + ["none"]
