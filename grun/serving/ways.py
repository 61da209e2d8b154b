"""Other ways of asking for the same: what the attack suite makes of a prompt alone, as messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from grun.data.chat import Turn, without_system
from grun.data.rows import Row
from grun.evaluation.attacks.base import ATTACKS, Asked, Material


@dataclass(frozen=True)
class Spoken(Material):
    """Material of attacks that notes what is said, not only its token ids."""

    said: list[list[dict[str, str]]] = field(default_factory=list)
    """Messages of each way of asking."""

    def ask(self, row: Row, question: str | None = None, *turns: Turn, variant: str = "", samples: int = 0) -> Asked:
        """See `Material`."""
        messages = []
        for earlier in (*without_system(row.earlier), *turns):
            messages += [{"role": "user", "content": earlier.question}]
            messages += [{"role": "assistant", "content": earlier.answer}]
        asked = (row.prompt or "") if question is None else question
        self.said.append([*messages, {"role": "user", "content": asked}])
        return super().ask(row, question, *turns, variant=variant, samples=samples)


def ways_of_asking(material: Spoken, prompt: str, answer: str | None) -> list[dict[str, Any]]:
    """Each way with its attack's name: messages, and a begun answer if it has one.

    Attacks that need more than the prompt (rows, weights, draws, another template) give none. With the answer, its
    first tokens are begun answers too.
    """
    row = Row(prompt, answer or "")
    tries: list[dict[str, Any]] = []
    for name in ATTACKS.names():
        attack = ATTACKS.get(name)
        if attack.access != "prompt" or attack.retention or name == "plain":
            continue
        material.said.clear()
        found = attack.asked(row, material)
        if material.said:
            group = "conversation" if len(material.said[0]) > 1 else "rewritten"
            tries += [{"name": name, "group": group, "messages": one, "starts_with": None} for one in material.said]
        elif answer and found and found[0].given_text:
            plain = [{"role": "user", "content": prompt}]
            tries += [{"name": name, "group": "begun", "messages": plain, "starts_with": found[0].given_text}]
    return tries
