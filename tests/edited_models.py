"""Models that carry edits, one adapter or a stack, and whole passes of them by hooks written here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import PAD, RULES, blocks_of, formula, padded, random_rows, tiny
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from grun import GrunModel, GrunStack
from grun.evaluation.generation import Answer, generate_answers
from grun.method.adapter import AdapterConfig

BLOCKS = (0, 2)
PUBLISHED = ("last_prompt", "none", "last_prompt")
ROBUST = ("every_token", "running_max", "every_token")
DESIGNS = [PUBLISHED, *RULES]
Member = tuple[AdapterConfig, dict[str, Tensor]]


def member(seed: int, rule: tuple[str, str, str] = PUBLISHED, **options: Any) -> Member:
    """Config and weights of an adapter with gates that are neither open nor shut."""
    base = tiny()
    torch.manual_seed(seed)
    read, accumulate, write = rule
    options = {"blocks": (1, 3), "rank": 4, **options}
    model = GrunModel.wrap(base, gate_read=read, gate_accumulate=accumulate, edit_write=write, **options)
    return model.config, {name: values.clone() for name, values in model.state_dict().items()}


MIXED = {
    "linear": member(1),
    "wide": member(2, gate="mlp_3", blocks=(0, 3), rank=2),
    "robust": member(3, ROBUST, gate="noisy_mlp_3"),
    "sticky": member(4, RULES[0], blocks=(2, 3)),
    "second": member(5),
    "activated": member(6, activation="relu"),
}


def wrapped(
    base: nn.Module | None = None, rule: tuple[str, str, str] = PUBLISHED, family: str = "llama", **options: Any
) -> GrunModel:
    """Random edits of BLOCKS; the same arguments give the same ones."""
    base = tiny(family) if base is None else base
    torch.manual_seed(3)
    read, accumulate, write = rule
    options = {"blocks": BLOCKS, **options}
    return GrunModel.wrap(base, gate_read=read, gate_accumulate=accumulate, edit_write=write, **options).eval()


def rows_keep_their_own_state(model: GrunModel, steps: int, whole: Callable[[list[int]], Tensor]) -> None:
    """Beams change places in every step: the score of what comes out is that of a whole pass over it; samples too.

    `whole` gives the logits of one pass over a row by itself, [tokens, vocabulary].
    """
    prompt = random_rows([7])[0]
    ids = torch.tensor([prompt])
    answer = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, num_beams=4, num_return_sequences=4,
        do_sample=False, eos_token_id=None, pad_token_id=PAD, return_dict_in_generate=True, output_scores=True,
        length_penalty=0.0,
    )  # fmt: skip
    assert len({tuple(row) for row in answer.sequences.tolist()}) == 4
    for row, score in zip(answer.sequences.tolist(), answer.sequences_scores, strict=True):
        logp = whole(row[:-1])[len(prompt) - 1 :].log_softmax(-1)
        agree(score, logp[torch.arange(steps), torch.tensor(row[len(prompt) :])].sum())
    torch.manual_seed(0)
    tokens, logits = generated(model, [prompt], do_sample=True, num_return_sequences=3)
    for index, new in enumerate(tokens.tolist()):
        agree(logits[index], whole(prompt + new[:-1])[-6:])


class Words:
    """A tokenizer that says tokens by their numbers."""

    def __init__(self, end: int) -> None:
        self.eos_token_id = end

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def rows_that_end_leave(model: GrunModel, prompts: list[list[int]]) -> list[Answer]:
    """Our own greedy decoding drops rows that have ended: what each says is what it says alone. Its answers."""
    alone = [generated(model, [prompt])[0][0].tolist() for prompt in prompts]
    ends = alone[1][0], alone[3][2]
    model.base.generation_config = GenerationConfig(eos_token_id=list(ends))
    answers = generate_answers(model, Words(ends[0]), prompts, 8, 6, PAD)
    for row, answer in zip(alone, answers, strict=True):
        until = next((place for place, token in enumerate(row) if token in ends), len(row))
        assert answer.text == " ".join(map(str, row[:until]))
    return answers


def strong(model: GrunModel) -> GrunModel:
    """With edits that change greedy tokens."""
    for edit in model.edits.values():
        nn.init.normal_(edit.edit.source.weight, std=3.0)
    return model


def stacked(members: dict[str, Member], base: PreTrainedModel | None = None, **options: Any) -> GrunStack:
    stack = GrunStack(tiny() if base is None else base, **options).eval()
    stack.add_weights(members)
    return stack


def single(one: Member) -> GrunModel:
    model = GrunModel(tiny(), one[0])
    model.load_state_dict(one[1])
    return model.eval()


def opening(logits: Tensor, rule: tuple[str, str, str], last: int, starts: tuple[int, ...]) -> Tensor:
    """Logit in force at each token of a row, told token by token: [tokens]."""
    read, accumulate, _ = rule
    if read == "last_prompt":
        return torch.full_like(logits, float(logits[last]))
    if accumulate == "none":
        return logits
    values = []
    for end in range(len(logits)):
        first = max([0, *(start for start in starts if start <= end)])
        values.append(logits[first : end + 1].max())
    return torch.stack(values)


def whole_pass(
    model: GrunModel, rule: tuple[str, str, str], row: list[int], last: int, family: str = "llama", starts: Any = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits [tokens, vocabulary] and openings by block of one row whose prompt ends at column `last`."""
    twin = tiny(family)
    weights = model.state_dict()
    found: dict[int, Tensor] = {}
    columns = torch.arange(len(row))
    written = {"last_prompt": columns == last, "sticky": columns >= last, "every_token": columns >= 0}[rule[2]]

    def hook(block: int) -> Any:
        def edit(_: Any, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            edited, logits = formula(weights, block, hidden)
            change = (edited - hidden) / torch.sigmoid(logits).unsqueeze(-1)
            found[block] = opening(logits[0], rule, last, tuple(starts))
            edited = hidden + (written * torch.sigmoid(found[block]))[:, None] * change
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return edit

    for block in BLOCKS:
        blocks_of(twin, family)[block].register_forward_hook(hook(block))
    with torch.no_grad():
        return twin(input_ids=torch.tensor([row]), use_cache=False).logits[0], found


def agree(got: Tensor, wanted: Tensor) -> None:
    """Norms go through float32, cached passes sum in another order, and transformers returns logits in float32."""
    torch.testing.assert_close(got.double(), wanted.double(), atol=5e-5, rtol=1e-5)


def prompts_of(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    """Ids and mask of padded rows, as `generate` takes them."""
    batch = padded(rows, side)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def generated(model: GrunModel, prompts: list[list[int]], **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens [rows, 6] and their logits [rows, 6, vocabulary]."""
    more: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options}
    answer = model.generate(**prompts_of(prompts), max_new_tokens=6, pad_token_id=PAD, eos_token_id=None, **more)
    return answer.sequences[:, -6:], torch.stack(answer.logits, dim=1)
