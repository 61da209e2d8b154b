"""`evaluate suite=attacks`: how much of what a model was made to forget comes back when it is asked otherwise."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from grun.config.options import DataConfig, EvaluateConfig
from grun.data.choices import ChoiceRow
from grun.data.corpus import load_corpus, load_knowledge
from grun.data.rows import Row, evenly_spaced, hash_rows
from grun.data.words import plain
from grun.errors import ConfigError, DataError
from grun.evaluation.attacks.base import (
    ATTACKS,
    KINDS,
    Attack,
    Material,
    Outcome,
    Place,
    Planned,
    answers_at,
    is_readable,
    only_asks,
    write_answers,
)
from grun.evaluation.attacks.outcomes import by_attack, kept_of, leak_of, worst_of
from grun.evaluation.suites.base import Measured, Suite
from grun.runtime.progress import progress
from grun.runtime.records import ATTACKS_FILE

if TYPE_CHECKING:
    from grun.loading.adapters import Loaded

PLAIN = "plain"
"""The attack that is none."""
FORGET = ("forget",)
KEPT = ("retain", "heldout")
"""Sets of which retention is measured."""
FLOOR = ("unknown",)
"""Rows that were never taught."""
NEIGHBOR = "neighbor"
"""Rows near the forget set that unlearning did not see."""
ROLE_OF = {"forget": "forget", "retain": "neighbor", "heldout": "general"}
"""What multiple-choice questions of a set are about. General ones stand where held-out rows do, since they have nothing
to do with what is forgotten; unlearning reads neither them nor their neighbors."""
TEXTS = ("lore", "corpora")
"""Data whose forget set is texts."""


class AttackSuite(Suite):
    """How much of the forget set comes back under each attack, and what an attack costs other answers.

    Results:
        attacks: by name: access, leak (mean over rows of the mean over an attack's ways of asking; of drawn answers
            the best), its interval (95 %, Wilson) and rows, worst (mean over rows of the worst way), where there are
            several ways variants (the leak of each), for a model with gates gate: at the last token of what is asked
            the mean, the share of rows whose mean over blocks is open, open, and that with any block open, open_any. Of
            a search curve: leak and interval by number of queries, 0 the plain question. Of a grid cells: leak,
            interval and rows of each, and worst_cell, the name of the one whose numbers are the attack's. Of some
            floor, the same of rows that were never taught, where there are such.
        worst_of_prompts, worst: leak (mean over rows of the largest under any attack), interval, rows. The former is
            over attacks that write the prompt alone, the latter over prefilled and drawn answers too.
        retention: by attack and set: kept, interval, rows, gate. Held-out rows, or else retain rows, are asked as
            forget rows are by each attack that writes the prompt alone; "otherwise" is over all of these but plain. Of
            plain, gate has open_any_answer too: the share of rows with any block open there or on a token of the right
            answer.
        left_out: reason by attack, for those that the data does not allow.
        unread: by set, rows without a word in their answer and without a fact, which are in no number.

    attacks.jsonl has a line for each row and way of asking.
    """

    def __init__(self, config: EvaluateConfig, asking: Mapping[str, list[Row]] | None = None) -> None:
        """Attack config.attack_rows rows of each set, evenly spaced.

        `asking` are rows with questions by set: forget, retain, heldout and, if there are such, unknown and
        neighbor; None: those that `config.data` names.
        """
        super().__init__(config)
        asking = dict(attacked_sets(config.data) if asking is None else asking)
        self.neighbors = asking.pop(NEIGHBOR, [])
        self.others = asking["heldout"] or asking["retain"]
        self.retain, self.facts = asking["retain"], [row for rows in asking.values() for row in rows]
        self.rows, self.unread = {}, {}
        for name, rows in asking.items():
            chosen = evenly_spaced(rows, config.attack_rows)
            self.rows[name] = [row for row in chosen if is_readable(row)]
            if len(self.rows[name]) < len(chosen):
                self.unread[name] = len(chosen) - len(self.rows[name])
        if not self.rows["forget"]:
            raise DataError(
                f"none of the {self.unread['forget']} forget rows can be read by ROUGE-L: no answer has a letter or "
                "digit; add the field fact to the rows, or take others"
            )
        self.attacks = chosen_attacks(config.attacks)

    def settings(self, loaded: Loaded) -> dict[str, Any]:
        """Rows, template and attacks, and what their draws depend on."""
        config = self.config
        return {
            "rows": {name: hash_rows(rows) for name, rows in self.rows.items()},
            "examples": hash_rows(self.others),
            "retain": hash_rows(self.retain),
            "template": self.template(loaded).to_dict(),
            "attacks": [attack.name for attack in self.attacks],
            "facts": hash_rows(self.facts),
            "neighbors": hash_rows(self.neighbors),
            "samples": config.attack_samples,
            "queries": config.attack_queries,
            "temperature": config.attack_temperature,
            "seed": config.seed,
            "max_new_tokens": config.max_new_tokens,
        }

    def measure(self, loaded: Loaded) -> Measured:
        """Ask everything; ConfigError for an attack that was named and has no data."""
        planned, left_out = self._planned(loaded)
        leaks: list[Outcome] = []
        kept: list[Outcome] = []
        floors: list[Outcome] = []
        for one in (one for found in self._outcomes(planned, loaded) for one in found):
            (kept if one.place.set in KEPT else floors if one.place.set in FLOOR else leaks).append(one)
        attacks = {name: leak_of(found) for name, found in by_attack(leaks).items()}
        for name, found in by_attack(floors).items():
            attacks[name]["floor"] = leak_of(found)
        results = {
            "attacks": attacks,
            **worst_of(leaks),
            "retention": self._retention(kept, loaded),
            "left_out": left_out,
            "unread": self.unread,
        }
        return Measured(results, {ATTACKS_FILE: [_line(one, loaded.tokenizer) for one in leaks + kept + floors]})

    def _retention(self, kept: list[Outcome], loaded: Loaded) -> dict[str, Any]:
        """What comes back of rows that are to be kept, and at how many of them gates open."""
        from grun.evaluation.attacks.retention import open_in_answers

        found = by_attack(kept)
        retention = {name: kept_of(some) for name, some in found.items()}
        otherwise = [one for one in kept if one.attack.access == "prompt" and one.attack.name != PLAIN]
        if otherwise:
            retention["otherwise"] = kept_of(otherwise)
        with self.enough_memory("reading gates on right answers"):
            opened = open_in_answers(found.get(PLAIN, []), loaded, self.template(loaded), self.config)
        for name, share in opened.items():
            retention[PLAIN][name]["gate"]["open_any_answer"] = share
        return retention

    def _planned(self, loaded: Loaded) -> tuple[list[Planned], dict[str, str]]:
        """What each attack asks, and why some are left out."""
        material = self._material(loaded)
        planned: list[Planned] = []
        left_out = {}
        for attack in self.attacks:
            reason = attack.unfit(loaded)
            places = [] if reason else self._places(attack, material, KEPT if attack.retention else FORGET)
            if places:
                planned.append((attack, places + (self._places(attack, material, FLOOR) if attack.floor else [])))
            elif attack.name not in self.config.attacks:
                left_out[attack.name] = reason or f"needs {attack.needs}"
            elif reason:
                raise ConfigError(f"the attack {attack.name} {reason}; or leave it out of attacks=[...]")
            else:
                raise ConfigError(
                    f"the attack {attack.name} needs {attack.needs}; data.name={self.config.data.name} has none here, "
                    "so leave it out of attacks=[...]"
                )
        if any(attack.retention for attack, _ in planned):
            sets = ("heldout",) if self.rows["heldout"] else ("retain",)
            plain = ATTACKS.get(PLAIN)
            kept = [(plain, self._places(plain, material, KEPT))]
            for attack, _ in planned:
                if attack.access == "prompt" and not attack.begins and attack is not plain:
                    kept.append((attack, self._places(attack, material, sets)))
            planned += [(attack, places) for attack, places in kept if places]
        return planned, left_out

    def _material(self, loaded: Loaded) -> Material:
        return Material(
            self.template(loaded),
            loaded.tokenizer,
            others=self.others,
            forget=self.rows["forget"],
            retain=self.retain,
            seed=self.config.seed,
            samples=self.config.attack_samples,
            facts=self.facts,
            neighbors=self.neighbors,
        )

    def _places(self, attack: Attack, material: Material, sets: tuple[str, ...]) -> list[Place]:
        return [
            Place(name, number, asked)
            for name in sets
            for number, row in enumerate(self.rows.get(name, ()))
            for asked in attack.asked(row, material)
        ]

    def _outcomes(self, planned: Sequence[Planned], loaded: Loaded) -> list[list[Outcome]]:
        """What comes of each; what the model writes as it is, is written in one pass for all that ask no more."""
        asking = [number for number, (attack, _) in enumerate(planned) if only_asks(attack)]
        found: dict[int, list[Outcome]] = {}
        if asking:
            some = [planned[number] for number in asking]
            total = sum(answers_at(places) for _, places in some)
            doing = f"the attack {some[0][0].name}" if len(some) == 1 else f"{len(some)} attacks"
            with self.enough_memory(doing), progress(doing.removeprefix("the attack "), total) as advance:
                written = write_answers(some, loaded.model, loaded, self.config, advance)
                found |= dict(zip(asking, written, strict=True))
        groups: dict[Any, list[int]] = {}
        for number, (attack, _) in enumerate(planned):
            if number not in found:
                groups.setdefault(attack.turn[0] if attack.turn else number, []).append(number)
        for group in groups.values():
            in_turn = sorted(group, key=lambda number: planned[number][0].turn or ("", 0))
            of_group = self._of_changed([planned[number] for number in in_turn], loaded)
            found |= dict(zip(in_turn, of_group, strict=True))
        return [found[number] for number in range(len(planned))]

    def _of_changed(self, group: Sequence[Planned], loaded: Loaded) -> Iterator[list[Outcome]]:
        """What comes of attacks that change one model in turn, or of one alone."""
        attacks = [attack for attack, _ in group]
        with contextlib.ExitStack() as inside:
            with self.enough_memory(f"the attack {attacks[0].name}"):
                opened = attacks[0].models(attacks, loaded, self.config, self._material(loaded))
                models = inside.enter_context(opened)
            for attack, places in group:
                with self.enough_memory(f"the attack {attack.name}"):
                    model = next(models)
                    with progress(attack.name, attack.work(places, self.config)) as advance:
                        outcomes = [*attack.read(model, places, loaded, self.config, advance)]
                yield outcomes


def chosen_attacks(names: Sequence[str]) -> list[Attack]:
    """The attacks of these names and kinds of access; of no name all but those that search or need the weights."""
    attacks = [ATTACKS.get(name) for name in ATTACKS.names()]
    if not names:
        return [attack for attack in attacks if attack.access not in ("weights", "search")]
    found: dict[str, Attack] = {}
    for name in names:
        some = [attack for attack in attacks if attack.access == name] if name in KINDS else [ATTACKS.get(name)]
        found |= {attack.name: attack for attack in some}
    return list(found.values())


def _line(one: Outcome, tokenizer: Any) -> dict[str, Any]:
    """Line of attacks.jsonl; of drawn answers `text` is the one that gives most away."""
    asked, texts = one.place.asked, [answer.text for answer in one.answers]
    line = {
        "attack": one.attack.name,
        "set": one.place.set,
        "index": one.place.number,
        "variant": asked.variant,
        "prompt": tokenizer.decode(asked.ids),
        "given": asked.given,
        "text": texts[one.leaks.index(one.leak)],
        "leak": one.leak,
        "gates": one.answers[0].gates,
    }
    line |= {"curve": one.curve} if one.curve else {}
    return line | {"texts": texts, "leaks": one.leaks} if asked.samples else line


# -- what is attacked: rows with questions; multiple-choice questions are asked without their options ----------------


def attacked_sets(config: DataConfig) -> dict[str, list[Row]]:
    """Rows with questions by set (forget, retain, heldout, unknown, neighbor); only forget has rows for certain.

    They are the corpus's own, or, where its forget set asks nothing, multiple-choice questions, asked openly.

    Raises:
        ConfigError: there is nothing to ask.
        DataError: rows or questions cannot be had or are malformed.
    """
    if config.name not in TEXTS:
        sets = load_corpus(config).sets()
        names = [*ROLE_OF, *(name for name in (*FLOOR, NEIGHBOR) if name in sets)]
        asking = {name: [row for row in sets.get(name, []) if row.prompt is not None] for name in names}
        if asking["forget"]:
            return asking
    if config.name != "lore" and not config.questions.forget:
        raise ConfigError(
            f"suite=attacks asks questions, and the forget set of data.name={config.name} has none; name "
            "multiple-choice questions in data.questions.forget, take data with questions, or suite=knowledge"
        )
    # Corpora for perplexity may be large, and no attack reads them.
    knowledge = load_knowledge(replace(config, questions=replace(config.questions, perplexity=[])))
    return {
        name: open_questions(knowledge.choices.get(role, []), knowledge.cloze.get(role, []))
        for name, role in ROLE_OF.items()
    }


def open_questions(choices: Sequence[ChoiceRow], cloze: Sequence[Row] = ()) -> list[Row]:
    """Multiple-choice questions as rows with the question alone, which the right option answers.

    The fact is the right option without a full stop after it, the wrong options are `perturbed_answer`. A sentence of
    `cloze` at a question's place becomes its row's `cloze`, if its fact is the question's too; others belong to no
    question and are left out.
    """
    rows = []
    for number, choice in enumerate(choices):
        right = choice.choices[choice.answer]
        fact = re.sub("[.。｡．।۔]$", "", right.strip())
        extra: dict[str, Any] = {
            "fact": fact,
            "perturbed_answer": [wrong for wrong in choice.choices if wrong != right],
            "subject": choice.subject,
        }
        if number < len(cloze) and plain(cloze[number].fact or "") == plain(fact):
            extra["cloze"] = cloze[number].prompt
        rows.append(Row(choice.question, right, extra))
    return rows
