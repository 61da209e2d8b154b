"""`evaluate suite=attacks`: how much of what a model was made to forget comes back when it is asked otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grun.config import EvaluateConfig
from grun.data.corpus import load_corpus
from grun.data.rows import evenly_spaced, hash_rows
from grun.data.templates import Template, resolve
from grun.errors import ConfigError
from grun.evaluation.attacks.base import ATTACKS, Attack, Material
from grun.evaluation.attacks.outcomes import Outcome, Place, by_attack, kept_of, leak_of, worst_of
from grun.evaluation.attacks.plain import PLAIN
from grun.evaluation.suites import Measured
from grun.memory import enough_memory
from grun.progress import progress

if TYPE_CHECKING:
    from grun.evaluation.drawing import Draw
    from grun.evaluation.generation import Answer
    from grun.loading import Loaded

ATTACKS_FILE = "attacks.jsonl"
FORGET = ("forget",)
KEPT = ("retain", "heldout")
"""Sets of which retention is measured."""


class AttackSuite:
    """How much of the forget set comes back under each attack, and what an attack costs other answers.

    Results:
        attacks: by name: access, leak (mean over rows of the mean over an attack's ways of asking; of drawn answers
            the best), its interval (95 %, Wilson) and rows, worst (mean over rows of the worst way), where there are
            several ways variants (the leak of each), for a model with gates gate (mean and share open, at the last
            token of what is asked).
        worst_of_prompts, worst: leak (mean over rows of the largest under any attack), interval, rows. The former is
            over attacks that write the prompt alone, the latter over prefilled and drawn answers too.
        retention: by attack (plain too, to compare with) and set: kept, interval, rows, gate.
        left_out: reason by attack, for those that the data does not allow.

    attacks.jsonl has a line for each row and way of asking.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        """Load the corpus; config.attack_rows rows of each set, evenly spaced."""
        self.config = config
        sets = load_corpus(config.data).sets()
        asking = {name: [row for row in sets.get(name, []) if row.prompt is not None] for name in (*FORGET, *KEPT)}
        if not asking["forget"]:
            raise ConfigError(
                f"suite=attacks asks questions, and the forget set of data.name={config.data.name} has none; take data "
                "with questions, or suite=knowledge"
            )
        self.others = asking["heldout"] or asking["retain"]
        self.rows = {name: evenly_spaced(rows, config.attack_rows) for name, rows in asking.items()}
        self.attacks = [ATTACKS.get(name) for name in dict.fromkeys(config.attacks or ATTACKS.names())]

    def settings(self, loaded: Loaded) -> dict[str, Any]:
        """Rows, template and attacks, and what their draws depend on."""
        config = self.config
        return {
            "rows": {name: hash_rows(rows) for name, rows in self.rows.items()},
            "examples": hash_rows(self.others),
            "template": self._template(loaded).to_dict(),
            "attacks": [attack.name for attack in self.attacks],
            "samples": config.attack_samples,
            "temperature": config.attack_temperature,
            "seed": config.seed,
            "max_new_tokens": config.max_new_tokens,
        }

    def accept(self, result: dict[str, Any]) -> None:
        """Nothing is asked for."""

    def measure(self, loaded: Loaded) -> Measured:
        """Ask everything; ConfigError for an attack that was named and has no data."""
        planned, left_out = self._planned(loaded)
        leaks: list[Outcome] = []
        kept: list[Outcome] = []
        for attack, places in planned:
            (kept if places[0].set in KEPT else leaks).extend(self._ask(attack, places, loaded))
        results = {
            "attacks": {name: leak_of(found) for name, found in by_attack(leaks).items()},
            **worst_of(leaks),
            "retention": {name: kept_of(found) for name, found in by_attack(kept).items()},
            "left_out": left_out,
        }
        return Measured(results, {ATTACKS_FILE: [_line(one, loaded.tokenizer) for one in leaks + kept]})

    def _planned(self, loaded: Loaded) -> tuple[list[tuple[Attack, list[Place]]], dict[str, str]]:
        """What each attack asks, and why some are left out."""
        material = Material(
            self._template(loaded),
            loaded.tokenizer,
            others=self.others,
            forget=self.rows["forget"],
            seed=self.config.seed,
            samples=self.config.attack_samples,
        )
        planned: list[tuple[Attack, list[Place]]] = []
        left_out = {}
        for attack in self.attacks:
            places = self._places(attack, material, KEPT if attack.retention else FORGET)
            if places:
                planned.append((attack, places))
            elif self.config.attacks:
                raise ConfigError(
                    f"the attack {attack.name} needs {attack.needs}; data.name={self.config.data.name} has none here, "
                    "so leave it out of attacks=[...]"
                )
            else:
                left_out[attack.name] = f"needs {attack.needs}"
        if any(attack.retention for attack, _ in planned):
            planned.append((PLAIN, self._places(PLAIN, material, KEPT)))
        return planned, left_out

    def _places(self, attack: Attack, material: Material, sets: tuple[str, ...]) -> list[Place]:
        return [
            Place(name, number, asked)
            for name in sets
            for number, row in enumerate(self.rows[name])
            for asked in attack.asked(row, material)
        ]

    def _ask(self, attack: Attack, places: list[Place], loaded: Loaded) -> list[Outcome]:
        """What the attacked model answers; drawn answers one draw after another, so that k takes no more memory."""
        from grun.evaluation.drawing import Draw
        from grun.evaluation.generation import generate_answers
        from grun.evaluation.items import memory_advice

        config, tokenizer = self.config, loaded.tokenizer
        samples = [place.asked.samples for place in places]
        passes: list[tuple[Draw | None, list[int]]] = [
            (None, [number for number, count in enumerate(samples) if not count])
        ]
        for draw in range(max(samples)):
            drawn = [number for number, count in enumerate(samples) if draw < count]
            passes.append((Draw(config.seed, draw, config.attack_temperature), drawn))
        answers: list[list[Answer]] = [[] for _ in places]
        with (
            enough_memory(f"the attack {attack.name}", memory_advice(config)),
            attack.model(loaded, config) as model,
            progress(attack.name, sum(max(1, count) for count in samples)) as advance,
        ):
            for choice, numbers in passes:
                found = generate_answers(
                    model,
                    tokenizer,
                    [places[number].asked.ids for number in numbers],
                    config.batch_size,
                    config.max_new_tokens,
                    int(tokenizer.pad_token_id or 0),
                    advance,
                    draw=choice,
                )
                for number, answer in zip(numbers, found, strict=True):
                    answers[number].append(answer)
        return [
            Outcome(attack, place, found, [attack.leak(place.asked.row, one.text, place.asked) for one in found])
            for place, found in zip(places, answers, strict=True)
        ]

    def _template(self, loaded: Loaded) -> Template:
        data = self.config.data
        return resolve(data.template, loaded.template, loaded.tokenizer, data.system_prompt, data.date)


def _line(one: Outcome, tokenizer: Any) -> dict[str, Any]:
    """Line of attacks.jsonl; of drawn answers `text` is the one that gives most away."""
    asked, texts = one.place.asked, [answer.text for answer in one.answers]
    return {
        **{"attack": one.attack.name, "set": one.place.set, "index": one.place.number, "variant": asked.variant},
        **{"prompt": tokenizer.decode(asked.ids), "given": asked.given, "text": texts[one.leaks.index(one.leak)]},
        **{"leak": one.leak, "gates": one.answers[0].gates},
        **({"texts": texts, "leaks": one.leaks} if asked.samples else {}),
    }
