"""Attacks that have more of the model than its text: scores of given answers, or hidden states."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from grun.data.rows import ALTERNATIVES, Row, evenly_spaced
from grun.data.templates import encode
from grun.errors import ModelError
from grun.evaluation.attacks.base import Access, Advance, Asked, Material, Outcome, Place, WithMaterial, attack

if TYPE_CHECKING:
    from torch import Tensor

    from grun.config.options import EvaluateConfig
    from grun.evaluation.reading import ReadPrompt
    from grun.loading.adapters import Loaded

MEMORIZED, PARAPHRASED = "memorized", "paraphrased"
LENS_ROWS, FITTED, HELD = 256, 1024, 256
"""Known rows, at most, evenly spaced: by which the lens chooses a block, that a probe is fitted on, and chosen by."""


class ReadOut(WithMaterial):
    """An attack that reads scores or hidden states."""

    access: Access = "read_out"
    turn = ("read_out", 0)


def states_at(
    prompts: Sequence[tuple[int, ...]], material: Material, loaded: Loaded, config: EvaluateConfig
) -> list[ReadPrompt]:
    """Hidden states of all blocks and gates at the last token of each prompt, read once; see `read_prompts`."""
    from grun.evaluation.reading import blocks_of, read_prompts

    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in material.memory]
    blocks = range(len(blocks_of(loaded.model)))
    read = read_prompts(loaded.model, new, blocks, config.batch_size, loaded.pad_id)
    material.memory.update(zip(new, read, strict=True))
    return [material.memory[prompt] for prompt in prompts]


class FactPlace(NamedTuple):
    """Where a row's fact is about to begin."""

    ids: tuple[int, ...]
    """Token ids of the prompt and of the answer up to the fact."""
    given: int
    """Number of answer tokens among them."""
    next_id: int
    """The fact's first token."""


def before_fact(row: Row, material: Material) -> FactPlace:
    """Where the fact of `row`, which has a question, begins; without a fact that its answer holds, the answer."""
    encoded = encode(material.template, material.tokenizer, row.prompt, row.completion, row.earlier)
    given = _tokens_before(row, encoded.answer_ids, material.tokenizer)
    return FactPlace((*encoded.prompt_ids, *encoded.answer_ids[:given]), given, encoded.answer_ids[given])


def _tokens_before(row: Row, answer_ids: Sequence[int], tokenizer: Any) -> int:
    """How many of the answer's tokens end before its fact begins."""
    parts = [part.split() for part in (row.fact or "").split(ALTERNATIVES)]
    words = "|".join(r"\s+".join(map(re.escape, part)) for part in parts if part)
    found = re.search(words, row.completion, re.IGNORECASE) if words else None
    characters = len(row.completion[: found.start()].strip()) if found else 0
    given = 0
    for count in range(1, len(answer_ids) - 1 if found else 0):  # the last one is the end token
        if len(tokenizer.decode(answer_ids[:count], skip_special_tokens=True).strip()) > characters:
            break
        given = count
    return given


@attack("recognition", needs="rows with perturbed_answer")
class Recognition(ReadOut):
    """The true answer scores above the row's perturbed ones.

    By the mean log-probability a token. A model that refuses may still know; whoever can have given answers scored gets
    them from it. Asked twice of a row: with the answer as it was taught and, where the row has one, in other words.
    Wrong answers are mostly worded as the latter is, so the taught wording may win by itself: compare with the floor.

    Source: wrong answers and their scores, the truth ratio of TOFU, Maini et al. 2024, arXiv 2401.06121.
    """

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The plain question, once for the answer and once for `paraphrased_answer`; nothing without wrong answers."""
        if not row.extra.get("perturbed_answer"):
            return []
        variants = [MEMORIZED, *([PARAPHRASED] if row.extra.get("paraphrased_answer") else [])]
        return [material.ask(row, variant=variant) for variant in variants]

    def read(
        self, model: Any, places: Sequence[Place], loaded: Loaded, config: EvaluateConfig, advance: Advance
    ) -> Iterable[Outcome]:
        """Scores of the true answer and the wrong ones; the text of an outcome is the answer that ranks first."""
        from grun.data.encoding import encode_rows
        from grun.evaluation.reading import read_prompts
        from grun.evaluation.scoring import base_of, score
        from grun.loading.models import context_length

        material: Material = model
        texts = [_answers(place.asked) for place in places]  # of each place the true one first
        rows = [replace(at.asked.row, completion=text) for at, own in zip(places, texts, strict=True) for text in own]
        limit = context_length(base_of(loaded.model))
        encoded = encode_rows(rows, loaded.tokenizer, material.template, limit, strict=False)
        scored = iter(score(loaded.model, encoded, config.batch_size, loaded.pad_id, whole=False))
        asked = [place.asked.ids for place in places]
        gates = read_prompts(loaded.model, asked, (), config.batch_size, loaded.pad_id)
        for place, own, at in zip(places, texts, gates, strict=True):
            means = [sum(one.logp) / len(one.logp) for one in (next(scored) for _ in own)]
            first = own[means.index(max(means))]
            yield self.outcome(place, first, float(means[0] > max(means[1:])), at.gates)
            advance(1)


def _answers(asked: Asked) -> list[str]:
    """The true answer, in the wording of the variant, and the wrong ones."""
    extra = asked.row.extra
    true = asked.row.completion if asked.variant == MEMORIZED else str(extra["paraphrased_answer"])
    return [true, *extra["perturbed_answer"]]


@attack("logit_lens", needs="held-out or retain rows with questions, by which a block is chosen")
class LogitLens(ReadOut):
    """The fact's first token, read from a hidden state by the model's own head.

    The state is that of a block at the token before the fact begins, through the final norm and the head. The block is
    the one that reads known rows well (`chosen_block`), held-out and retain rows alike; forget rows do not count, so
    this is what somebody gets who does not know the answers. A row without a fact is read at the end of its prompt.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; as an attack, Patil et al. 2023, arXiv 2309.17410.
    """

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The prompt and the answer up to its fact."""
        if not (material.others or material.retain):
            return []
        place = before_fact(row, material)
        return [Asked(place.ids, row, given=place.given)]

    def read(
        self, model: Any, places: Sequence[Place], loaded: Loaded, config: EvaluateConfig, advance: Advance
    ) -> Iterable[Outcome]:
        """Whether the right next token is among the `TOP` that the chosen block gives."""
        import torch

        from grun.evaluation.reading import chosen_block, tokens_said

        def said_by(states: Tensor) -> list[list[int]]:
            return tokens_said(loaded.model, states, config.batch_size, loaded.pad_id)

        material: Material = model
        rows = evenly_spaced(list(dict.fromkeys([*material.others, *material.retain])), LENS_ROWS)
        known = [before_fact(row, material) for row in rows]
        read = states_at([at.ids for at in known], material, loaded, config)
        seen = torch.stack([one.states for one in read], dim=1)  # [blocks, rows, hidden size]
        said = iter(said_by(seen.flatten(0, 1)))
        block = chosen_block([sum(at.next_id in next(said) for at in known) / len(known) for _ in range(len(seen))])
        found = states_at([place.asked.ids for place in places], material, loaded, config)
        for place, one, tokens in zip(places, found, said_by(seen_at(found, block)), strict=True):
            leak = float(before_fact(place.asked.row, material).next_id in tokens)
            text = str(loaded.tokenizer.decode(tokens)).strip()
            yield self.outcome(place, text, leak, one.gates, f"block {block}")
            advance(1)


def seen_at(read: Sequence[ReadPrompt], block: int) -> Tensor:
    """States of one block at the ends of prompts, [prompts, hidden size]."""
    import torch

    return torch.stack([one.states[block] for one in read])


@attack("linear_probe", needs="two or more retain rows with questions, and facts that begin with different tokens")
class LinearProbe(ReadOut):
    """The same, by a linear map fitted on retain rows.

    The map goes to the rows of the output embedding, so it can name tokens that no retain row begins with. Block
    (`chosen_block`) and ridge strength are those that read held-out rows best, or a fourth of the retain rows where
    nothing is held out; forget rows do not count. Guessed is among all tokens with which a fact begins anywhere in
    the data (an answer, for a row without a fact), so chance is well above zero: compare with the retain-only model.

    Source: linear probes, Alain and Bengio 2016, arXiv 1610.01644; affine maps into the space that the head reads,
    Belrose et al. 2023, arXiv 2303.08112; as a check of unlearning, Lynch et al. 2024, arXiv 2402.16835.
    """

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The prompt and the answer up to its fact; nothing where all facts begin with the same token."""
        place = before_fact(row, material)
        others = (before_fact(other, material).next_id for other in material.retain)
        if len(material.retain) < 2 or not any(other != place.next_id for other in others):
            return []
        return [Asked(place.ids, row, given=place.given)]

    def read(
        self, model: Any, places: Sequence[Place], loaded: Loaded, config: EvaluateConfig, advance: Advance
    ) -> Iterable[Outcome]:
        """Whether the right next token is the first of all candidates."""
        import torch

        from grun.evaluation.reading import choose_map, chosen_block
        from grun.evaluation.scoring import base_of

        material: Material = model
        rows = (*(place.asked.row for place in places), *material.forget, *material.retain, *material.others)
        next_id = {row: before_fact(row, material).next_id for row in rows}
        candidates = sorted(set(next_id.values()))
        number = {token: index for index, token in enumerate(candidates)}
        head: Any = base_of(loaded.model).get_output_embeddings()
        if head is None:
            raise ModelError(
                "the model does not say which of its layers is the head; leave linear_probe out of attacks"
            )
        embedded = head.weight[candidates].detach().double().cpu()  # [candidates, hidden size]

        def known(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
            """States [blocks, rows, hidden size] and number of the right candidate [rows]."""
            read = states_at([before_fact(row, material).ids for row in rows], material, loaded, config)
            states = torch.stack([one.states for one in read], dim=1).double()
            return states, torch.tensor([number[next_id[row]] for row in rows])

        fitted, held = known_rows(material)
        (states, right), (held_states, held_right) = known(fitted), known(held)
        pairs = zip(states, held_states, strict=True)
        best = [choose_map(own, right, others, held_right, embedded) for own, others in pairs]
        block = chosen_block([one.success for one in best])
        found = states_at([place.asked.ids for place in places], material, loaded, config)
        guesses = best[block].map.guess(seen_at(found, block).double(), embedded)
        for place, one, guess in zip(places, found, guesses.tolist(), strict=True):
            token = candidates[guess]
            leak = float(token == next_id[place.asked.row])
            text = str(loaded.tokenizer.decode([token])).strip()
            yield self.outcome(place, text, leak, one.gates, f"block {block}")
            advance(1)


def known_rows(material: Material) -> tuple[list[Row], list[Row]]:
    """Rows to fit on and rows to choose by, of which no one is both."""
    retain = set(material.retain)
    held = [row for row in material.others if row not in retain]
    fitted = list(material.retain)
    if not held:
        held = fitted[::4]
        fitted = [row for number, row in enumerate(fitted) if number % 4]
    return evenly_spaced(fitted, FITTED), evenly_spaced(held, HELD)
