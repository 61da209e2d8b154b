"""Answer questions, greedily or by draws, in batches, as the model would answer them one at a time."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer

from grun.data.encoding import Batch, collate_prompts
from grun.errors import DataError, ModelError
from grun.evaluation.journal import Journal
from grun.evaluation.scoring import NOT_FINITE, base_of, evaluating, prompt_gates, takes_prompt_lengths
from grun.loading.models import context_length
from grun.method.guardrail import output_filter_of
from grun.method.model import GrunModel
from grun.method.rules import PROMPT
from grun.runtime import processes
from grun.runtime.files import content_hash
from grun.runtime.reading import kind_of

log = logging.getLogger(__name__)

DROPPED = 1 / 8
"""Share of a batch that has to have ended before it is taken out, which copies the cache of the rest."""

SHARED = 8
"""Tokens that all prompts of a batch must begin with for them to be run once, and not in every row."""

NAN = -1
"""Stands for a token where logits are NaN, whose most probable token means nothing."""

Choose = Callable[[Tensor, Sequence[int]], Tensor]
"""The next token of each row, int64 [rows], from its logits, float32 [rows, vocabulary], and the rows' numbers in the
batch; called once a step."""


def most_probable(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Greedy decoding."""
    return logits.argmax(-1)


@dataclass(frozen=True)
class Draw:
    """One answer drawn for each prompt, by seed and prompt alone, not by the batch or the number of processes."""

    seed: int
    number: int
    """Which of several draws this is, from 0."""
    temperature: float
    """What logits are divided by, > 0."""

    def uniforms(self, prompt: Sequence[int], steps: int) -> Tensor:
        """A number for each step after `prompt`, uniform in [0, 1), float32 [steps]."""
        digest = content_hash([self.seed, self.number, list(prompt)])
        generator = torch.Generator().manual_seed(int(digest[:15], 16))
        return torch.rand(steps, generator=generator)


Question = tuple[tuple[int, ...], Draw | None]
"""Token ids of a prompt, and how its answer is drawn; None: greedily."""


def chooser(questions: Sequence[Question], steps: int) -> Choose:
    """Chooses tokens of the answers to `questions`, the rows of a batch, for at most `steps` steps.

    A row that is drawn has one uniform number a step: the token at which the running sum of probabilities passes it.
    """
    drawn = {row: (draw, draw.uniforms(prompt, steps)) for row, (prompt, draw) in enumerate(questions) if draw}
    if not drawn:
        return most_probable
    step = iter(range(steps))

    def choose(logits: Tensor, rows: Sequence[int]) -> Tensor:
        at, tokens = next(step), most_probable(logits, rows)
        places = [place for place, row in enumerate(rows) if row in drawn]
        some = logits if len(places) == len(rows) else logits[places]
        wanted = torch.tensor([float(drawn[rows[place]][1][at]) for place in places], device=logits.device)
        temperatures = torch.tensor([drawn[rows[place]][0].temperature for place in places], device=logits.device)
        running = (some / temperatures.unsqueeze(1)).softmax(-1).cumsum(-1)
        passed = torch.searchsorted(running, wanted.unsqueeze(1) * running[:, -1:], right=True)
        tokens[places] = passed.squeeze(1).clamp_max(logits.shape[-1] - 1)  # rounding may put it at the very end
        return tokens

    return choose


class Answer(NamedTuple):
    """What the model answers to one prompt."""

    text: str
    """Decoded without special tokens, white space at both ends removed, after an output filter if the model has one."""
    gates: dict[int, float] | None
    """Gate probability at the prompt by block; None for a model without gates."""

    @classmethod
    def from_json(cls, fields: Any) -> Answer:
        """The answer that JSON made a list of."""
        text, gates = fields
        return cls(text, None if gates is None else {int(block): gate for block, gate in gates.items()})


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    pad_id: int,
    advance: Callable[[int], None] = lambda count: None,
    *,
    masked_id: int | None = None,
    journal: Journal[Answer] | None = None,
    known: Mapping[tuple[int, ...], Answer] | None = None,
    expected: Sequence[int] | None = None,
    draw: Draw | Sequence[Draw | None] | None = None,
) -> list[Answer]:
    """Answer each prompt, every distinct one once, longest first, those that begin alike together, padded on the left.

    Answers are greedy whatever a model's generation config holds (beams, penalties, forced or forbidden tokens, stop
    strings); its end tokens alone count. An answer ends at an end token, at max_new_tokens, or where the context of the
    model is full.

    Args:
        model: a transformers causal model, or a gated one that gives the prompts' gates.
        tokenizer: decodes the answers.
        prompts: token ids; DataError if one is empty or fills the context.
        batch_size: prompts that are answered at once.
        max_new_tokens: longest answer, tokens.
        pad_id: id that fills up short prompts and ended answers.
        advance: called with the number of `prompts` done since the last call.
        masked_id: further id that is masked wherever it stands in a prompt; None: none.
        journal: keeps the answers to the distinct prompts, and knows those of an earlier, interrupted call.
        known: answers that need not be asked for, where all are greedy.
        expected: about how many tokens each answer will have, such as the reference's. Answers that are about as long
            are asked for together, so that they end together.
        draw: draws the answers, all alike or each by its own; None: greedy ones.
    """
    draws = [draw] * len(prompts) if draw is None or isinstance(draw, Draw) else draw
    asked: list[Question] = list(zip(map(tuple, prompts), draws, strict=True))
    repeats = Counter(asked)
    limit = context_length(base_of(model))
    distinct = sorted(repeats, key=lambda question: len(question[0]), reverse=True)
    answers = {question: known[question[0]] for question in repeats if known and question[0] in known}
    done = journal.known if journal else {}
    answers |= {distinct[number]: answer for number, answer in processes.merged(done).items()}
    advance(sum(repeats[question] for question in answers))
    numbers = {question: number for number, question in enumerate(distinct)}
    remaining = [question for question in _beginning_alike(distinct) if question not in answers]
    if expected is not None:
        about = dict(zip(asked, expected, strict=True))
        remaining.sort(key=lambda question: about[question], reverse=True)
    asking = _Asking(model, tokenizer, pad_id, masked_id)
    with evaluating(model):
        for chunk, room in processes.own(list(_batches(remaining, batch_size, max_new_tokens, limit))):
            found = asking.answers(chunk, room)
            if journal is not None:
                journal.add([numbers[question] for question in chunk], found)
            answers.update(zip(chunk, found, strict=True))
            advance(sum(repeats[question] for question in chunk))
    answers = processes.merged(answers)
    return [answers[question] for question in asked]


def _beginning_alike(questions: Sequence[Question]) -> list[Question]:
    """Questions, longest first, in groups whose first `SHARED` tokens are the same; the group of the longest first."""
    groups: dict[tuple[int, ...], list[Question]] = {}
    for question in questions:
        groups.setdefault(question[0][:SHARED], []).append(question)
    return [question for group in groups.values() for question in group]


class _Asking:
    """How batches of questions are answered; arguments as in `generate_answers`."""

    def __init__(self, model: Any, tokenizer: Any, pad_id: int, masked_id: int | None) -> None:
        self.model, self.tokenizer, self.pad_id, self.masked_id = model, tokenizer, pad_id, masked_id
        self.ends = end_tokens(model, tokenizer)
        self.shown = output_filter_of(base_of(model)) or str
        self.reason = needs_generate(base_of(model))
        if self.reason:
            log.info("answers come from the model's own generate, which is slower: %s", self.reason)

    def answers(self, questions: Sequence[Question], room: int) -> list[Answer]:
        """Answers of at most `room` tokens."""
        asked = [prompt for prompt, _ in questions]
        prompts = asked if self.reason else list(dict.fromkeys(asked))
        batch = collate_prompts(prompts, self.pad_id)
        if self.masked_id is not None:
            batch.attention_mask[batch.input_ids == self.masked_id] = 0
        batch, choose, rooms = batch.to(self.model.device), chooser(questions, room), [room] * len(questions)
        if self.reason:
            ids, gates = _generate(self.model, batch, rooms, self.ends, self.pad_id, choose)
            prompt_of = list(range(len(asked)))
        else:
            number = {prompt: number for number, prompt in enumerate(prompts)}
            prompt_of = [number[prompt] for prompt in asked]
            ids, gates = greedy(self.model, batch, rooms, self.ends, self.pad_id, choose, prompt_of)
        texts = [self.shown(self.tokenizer.decode(row, skip_special_tokens=True).strip()) for row in ids]
        of_prompts = prompt_gates(gates, len(prompts))
        return [Answer(text, of_prompts[prompt]) for text, prompt in zip(texts, prompt_of, strict=True)]


def needs_generate(base: PreTrainedModel) -> str | None:
    """Why the model's own `generate` must be asked; None where `greedy` gives the same answers faster."""
    parameters = inspect.signature(base.forward).parameters
    own: Any = type(base)
    if base.config.is_encoder_decoder or not {"past_key_values", "position_ids"} <= set(parameters):
        return "its forward pass takes no key/value cache or no positions"
    if own.prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation or base.is_remote_code():
        return "it prepares the inputs of each step itself"
    if getattr(base, "_is_stateful", False) or not own._supports_default_dynamic_cache():
        return "it keeps other states than keys and values"
    if not all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=base.config).layers):
        return "not all of its blocks keep keys and values"
    return None


def greedy(
    model: Any,
    batch: Batch,
    rooms: Sequence[int],
    ends: Collection[int],
    pad_id: int,
    choose: Choose = most_probable,
    prompt_of: Sequence[int] | None = None,
) -> tuple[list[list[int]], dict[int, Tensor] | None]:
    """Most probable (or drawn) tokens of each answer, without the end token, and the gates at the prompts.

    Rows that have ended leave the batch, so steps get cheaper. The model is in evaluation mode, the batch of prompts
    padded on the left; `rooms` are the longest answers, tokens, `ends` the ids that end one, `prompt_of` the number of
    each answer's prompt (None: one answer to each). ModelError where logits are NaN.
    """
    last = context_length(base_of(model)) - 1
    out, mask, more = run_prompts(model, batch, pad_id)
    cache = more["past_key_values"]
    position = batch.attention_mask.sum(1)  # of the next token, [rows]
    gates = {block: gate[:, -1:] for block, gate in (getattr(out, "gates", None) or {}).items()}
    logits = out.logits[:, -1]
    if prompt_of is not None and list(prompt_of) != list(range(len(mask))):
        repeated = torch.tensor(prompt_of, device=mask.device)
        cache.batch_select_indices(repeated)
        mask, position, logits = mask[repeated], position[repeated], logits[repeated]
    answers: list[list[int]] = [[] for _ in rooms]
    rows = list(range(len(rooms)))  # answer that each row of the batch belongs to
    ended = [False] * len(rooms)
    while True:
        tokens, found = _next_tokens(choose, logits, rows)
        for row, token in zip(rows, found, strict=True):
            if not ended[row] and token not in ends:
                answers[row].append(token)
            ended[row] |= token in ends or len(answers[row]) == rooms[row]
        going_on = [place for place, row in enumerate(rows) if not ended[row]]
        if not going_on:
            return answers, gates
        if len(rows) - len(going_on) >= DROPPED * len(rows):
            kept = torch.tensor(going_on, device=tokens.device)
            cache.batch_select_indices(kept)
            tokens, mask, position = tokens[kept], mask[kept], position[kept]
            rows = [rows[place] for place in going_on]
        mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
        at = position.clamp_max(last).unsqueeze(1)  # a row that has ended may go on for some steps
        logits = model(input_ids=tokens.unsqueeze(1), attention_mask=mask, position_ids=at, **more).logits[:, -1]
        position = position + 1


def _next_tokens(choose: Choose, logits: Tensor, rows: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The next tokens on the device, and read by the host once; ModelError of logits that are NaN."""
    logits = logits.float()  # as `generate`
    tokens = choose(logits, rows)
    found: list[int] = torch.where(logits.isnan().any(-1), NAN, tokens).tolist()
    if NAN in found:
        raise ModelError(NOT_FINITE)
    return tokens, found


class PromptsRun(NamedTuple):
    """A batch of prompts that were run."""

    out: Any
    """The model's output at their ends."""
    mask: Tensor
    """Of what is in the cache, int64 [rows, columns]."""
    more: dict[str, Any]
    """Arguments of passes that go on: the cache, and that logits are those of the last token."""


def run_prompts(model: Any, batch: Batch, pad_id: int) -> PromptsRun:
    """Run prompts, padded on the left, into a new cache, once what all of them begin with.

    The model is in evaluation mode, and one that `needs_generate` allows.
    """
    more: dict[str, Any] = {"past_key_values": DynamicCache(config=base_of(model).config), "use_cache": True}
    if "logits_to_keep" in inspect.signature(base_of(model).forward).parameters:
        more["logits_to_keep"] = 1
    ids, mask = batch.input_ids, batch.attention_mask
    lengths = mask.sum(1)
    shared = _shared_start(ids, mask)
    if shared < SHARED or len(ids) == 1 or _writes_prompts(model):
        return PromptsRun(_pass(model, ids, mask, lengths, more), mask, more)
    first, column = int(lengths.argmax()), ids.shape[1] - int(lengths.max())
    start = ids[first : first + 1, column : column + shared]
    _pass(model, start, torch.ones_like(start), lengths[first : first + 1], more)
    more["past_key_values"].batch_repeat_interleave(len(ids))
    # What is left of each row is padded by as much as the row was.
    padding = ids.shape[1] - lengths
    rest = (torch.arange(ids.shape[1] - shared, device=ids.device) >= padding.unsqueeze(1)).to(mask.dtype)
    mask = torch.cat((mask.new_ones(len(ids), shared), rest), dim=1)
    ids = ids[:, shared:].masked_fill(rest == 0, pad_id)  # else tokens that are shared already
    return PromptsRun(_pass(model, ids, mask, lengths - shared, more), mask, more)


def _writes_prompts(model: Any) -> bool:
    """Whether edits are written before the end of a prompt, by a gate that is asked there: in one pass alone."""
    return isinstance(model, GrunModel) and model.rule.write == PROMPT


def _shared_start(ids: Tensor, mask: Tensor) -> int:
    """Tokens that all rows of a batch, padded on the left, begin with; of each row at least one is left.

    0 where tokens within a prompt are masked.
    """
    if not bool((mask.diff(dim=1) >= 0).all()):
        return 0
    lengths = mask.sum(1)
    columns = torch.arange(int(lengths.min()) - 1, device=ids.device)
    starts = ids.gather(1, columns + (ids.shape[1] - lengths).unsqueeze(1))
    alike = (starts == starts[:1]).all(0)
    return int(alike.long().cumprod(0).sum())


def _pass(model: Any, ids: Tensor, mask: Tensor, prompt_lengths: Tensor, more: Mapping[str, Any]) -> Any:
    """One forward pass over (a part of) prompts; `mask` covers what is in the cache too."""
    of_prompt = {"prompt_lengths": prompt_lengths} if takes_prompt_lengths(model) else {}
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **of_prompt, **more)


def _generate(
    model: Any, batch: Batch, rooms: Sequence[int], ends: Collection[int], pad_id: int, choose: Choose
) -> tuple[list[list[int]], dict[int, Tensor] | None]:
    """The same as `greedy` from the model's own `generate`, for prompts that have the same room."""
    base, plain = base_of(model), {"pad_token_id": pad_id, "eos_token_id": list(ends) or None}
    shipped = base.generation_config
    try:
        base.generation_config = GenerationConfig()  # `generate` fills up from it what it is not given
        ids = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=GenerationConfig(max_new_tokens=max(rooms), do_sample=False, **plain),
            logits_processor=LogitsProcessorList([_Chosen(choose)]),
        )
    finally:
        base.generation_config = shipped
    new = ids[:, batch.input_ids.shape[1] :].tolist()
    # What follows an end token is padding, which a tokenizer may not know as special.
    answers = [[*itertools.takewhile(lambda token: token not in ends, row)] for row in new]
    return answers, getattr(model, "last_gates", None)


class _Chosen(LogitsProcessor):
    """Leaves `generate` nothing but the chosen token of each row."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, _ = _next_tokens(self.choose, scores, range(len(scores)))
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.unsqueeze(1), 0.0)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of the model's generation config and the tokenizer's own."""
    configured = getattr(base_of(model).generation_config, "eos_token_id", None)
    ids = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    wrong = next((token for token in ids if not isinstance(token, int | None)), None)
    if wrong is not None:
        raise ModelError(
            f"eos_token_id in the model's generation_config.json must be an id or a list of ids, not {kind_of(wrong)}"
        )
    return sorted({token for token in ids if token is not None})


def _batches(
    questions: Sequence[Question], batch_size: int, max_new_tokens: int, limit: int
) -> Iterator[tuple[list[Question], int]]:
    """Batches of questions that have the same room for an answer, so that no prompt's answer depends on another."""
    rooms = [min(max_new_tokens, limit - len(prompt)) for prompt, _ in questions]
    start = 0
    while start < len(questions):
        if not questions[start][0]:
            raise DataError("an empty prompt cannot be answered: the template and the question give no token")
        if rooms[start] < 1:
            raise DataError(
                f"a prompt of {len(questions[start][0])} tokens leaves no room for an answer in a context of {limit}; "
                "shorten it or use a model with a longer context"
            )
        end = start
        while end < len(questions) and end - start < batch_size and rooms[end] == rooms[start]:
            end += 1
        yield list(questions[start:end]), rooms[start]
        start = end
