"""Hidden states through the model's own head."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grun.data.rows import Row, evenly_spaced
from grun.evaluation.attacks.base import Advance, Asked, Material
from grun.evaluation.attacks.outcomes import Outcome, Place
from grun.evaluation.attacks.read_out import Attacked, ReadOut, before_fact, chosen_block, read_prompts
from grun.evaluation.generation import base_of
from grun.evaluation.scoring import evaluating
from pyvene_custom import find_blocks

if TYPE_CHECKING:
    from grun.config.options import EvaluateConfig
    from grun.loading.models import Loaded

TOP = 1
"""Tokens that may be guessed. One, as of other attacks: the first tokens of facts of a kind (towns, colors) are few, so
a larger set, as the source takes, holds the right one by chance and lifts the floor."""
MOST = 256
"""Known rows by which the block is chosen, at most, evenly spaced."""


class LogitLens(ReadOut):
    """What a block's hidden state says through the final norm and the head, at the token before the fact begins.

    The block is the one that reads known rows well (`chosen_block`), held-out and retain rows alike; forget rows do
    not count, so this is what somebody gets who does not know the answers. A row without a fact is read at the end of
    its prompt.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; as an attack, Patil et al. 2023, arXiv 2309.17410.
    """

    name = "logit_lens"
    needs = "held-out or retain rows with questions, by which a block is chosen"

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The prompt and the answer up to its fact."""
        if not (material.others or material.retain):
            return []
        place = before_fact(row, material)
        return [Asked(place.ids, row, given=place.given)]

    def read(
        self, model: Any, places: Sequence[Place], loaded: Loaded, config: EvaluateConfig, advance: Advance
    ) -> list[Outcome]:
        """Whether the right next token is among the `TOP` that the chosen block says."""
        attacked: Attacked = model
        material, tokenizer = attacked.material, loaded.tokenizer
        size, pad_id = config.batch_size, int(tokenizer.pad_token_id or 0)
        blocks = attacked.blocks
        rows = evenly_spaced(list(dict.fromkeys([*material.others, *material.retain])), MOST)
        known = [before_fact(row, material) for row in rows]
        seen = torch.stack(
            [one.states for one in read_prompts(attacked.model, [at.ids for at in known], blocks, size, pad_id)]
        )
        successes = []
        for block in blocks:
            said = tokens_said(attacked.model, seen[:, block], size, pad_id)
            successes.append(sum(at.next_id in tokens for at, tokens in zip(known, said, strict=True)) / len(known))
        block = chosen_block(successes)
        found = read_prompts(attacked.model, [place.asked.ids for place in places], [block], size, pad_id, advance)
        said = tokens_said(attacked.model, torch.cat([one.states for one in found]), size, pad_id)
        outcomes = []
        for place, one, tokens in zip(places, found, said, strict=True):
            right = before_fact(place.asked.row, material).next_id in tokens
            outcomes.append(self.told_by(block, place, str(tokenizer.decode(tokens)).strip(), one.gates, right))
        return outcomes


@torch.no_grad()
def tokens_said(model: Any, states: Tensor, batch_size: int, pad_id: int, top: int = TOP) -> list[list[int]]:
    """The `top` most probable next tokens if the model's last block gave `states`, the most probable first.

    The model itself reads them: it runs one token, and the output of its last block is replaced. So whatever it has
    behind that block (norm, projection, head, caps) is in force, in any architecture.

    Args:
        model: a transformers causal model, or a gated one.
        states: hidden states, [states, hidden size].
        batch_size: states per pass.
        pad_id: the token that is run; any will do.
        top: tokens of each.
    """
    base = base_of(model)
    more: dict[str, Any] = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    said: list[list[int]] = []
    for part in states.split(batch_size):

        def replace(_: Any, __: Any, output: Any, part: Tensor = part) -> Any:
            own = output[0] if isinstance(output, tuple) else output
            put = part.unsqueeze(1).to(own)  # [states, 1, hidden size]
            return (put, *output[1:]) if isinstance(output, tuple) else put

        handle = find_blocks(base)[1][-1].register_forward_hook(replace)
        try:
            with evaluating(model):
                ids = torch.full((len(part), 1), pad_id, device=model.device)
                logits = base(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[:, -1]
        finally:
            handle.remove()
        said += logits.float().topk(top, dim=-1).indices.tolist()
    return said


LOGIT_LENS = LogitLens()
