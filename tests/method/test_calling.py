"""Every way of calling a model that carries edits: edited as it should be, or refused. See docs/calling.md."""

from __future__ import annotations

import asyncio
import copy
import gc
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from edited_models import BLOCKS, PUBLISHED, agree, strong, whole_pass, wrapped
from tiny import RULES, greedy_by_hand, padded, random_rows, tiny
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from grun import GrunModel, GrunStack
from grun.errors import ModelError
from grun.training.recomputation import recompute_blocks

STEPS = 6


def four_dimensional(mask: Tensor, *, added: bool, window: int | None = None) -> Tensor:
    """Causal mask [batch, 1, tokens, tokens] of a mask [batch, tokens]."""
    length = mask.shape[1]
    allowed = torch.ones(length, length).tril().bool()
    if window is not None:
        allowed &= torch.ones(length, length).triu(1 - window).bool()
    allowed = allowed & (mask[:, None, None] != 0)
    return allowed if not added else torch.zeros(allowed.shape).double().masked_fill(~allowed, -1e9)


# -- one pass ----------------------------------------------------------------------------------------------------------


def placed(base: Any) -> Any:
    """As accelerate does for a device_map: what `forward` an instance has is replaced."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in (base, base.model, base.model.layers[0]):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    return base


def compiled(base: Any) -> Any:
    """As transformers' documentation does for a static cache."""
    base.forward = torch.compile(base.forward, backend="eager")
    return base


Batch = dict[str, Tensor]
PASSES: dict[str, Callable[[Any, Batch], Tensor]] = {
    "call": lambda base, batch: base(**batch).logits,
    "forward": lambda base, batch: base.forward(**batch).logits,
    "decoder and head": lambda base, batch: base.lm_head(base.model(**batch)[0]),
    "decoder's forward and head": lambda base, batch: base.lm_head(base.model.forward(**batch)[0]),
    "found decoder": lambda base, batch: base.lm_head(base.get_decoder()(**batch)[0]),
    "arguments by place": lambda base, batch: base(*batch.values()).logits,
    "tuple": lambda base, batch: base(**batch, return_dict=False)[0],
    "embeddings": lambda base, batch: (
        base(
            inputs_embeds=base.get_input_embeddings()(batch["input_ids"]),
            **{name: batch[name] for name in ("attention_mask", "position_ids")},
        ).logits
    ),
    "whole text as labels": lambda base, batch: base(**batch, labels=batch["input_ids"]).logits,
    "padding alone unlabeled": lambda base, batch: (
        base(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).logits
    ),
    "logits to keep": lambda base, batch: base(**batch, logits_to_keep=torch.arange(9)).logits,
    "mask of bool": lambda base, batch: (
        base(**{**batch, "attention_mask": four_dimensional(batch["attention_mask"], added=False)}).logits
    ),
    "mask that is added": lambda base, batch: (
        base(**{**batch, "attention_mask": four_dimensional(batch["attention_mask"], added=True)}).logits
    ),
    "functional call": lambda base, batch: (
        torch.func.functional_call(base, dict(base.named_parameters()), (), batch).logits
    ),
    "forward of the class": lambda base, batch: type(base).forward(base, **batch).logits,
    "compiled": lambda base, batch: torch.compile(base, backend="eager")(**batch).logits,
    "compiled in a function": lambda base, batch: torch.compile(lambda: base(**batch).logits, backend="eager")(),
    "forward compiled": lambda base, batch: compiled(base)(**batch).logits,
    "placed by accelerate": lambda base, batch: placed(base)(**batch).logits,
    "data parallel on one device": lambda base, batch: nn.DataParallel(base)(**batch).logits,
    "shallow copy": lambda base, batch: copy.copy(base)(**batch).logits,
    "deep copy": lambda base, batch: copy.deepcopy(base)(**batch).logits,
    "thread": lambda base, batch: ThreadPoolExecutor(1).submit(base, **batch).result().logits,
}


def expected(
    model: GrunModel, rule: tuple[str, str, str], rows: list[list[int]], family: str = "llama"
) -> list[Tensor]:
    return [whole_pass(model, rule, row, len(row) - 1, family)[0] for row in rows]


@pytest.mark.parametrize("rule", [PUBLISHED, RULES[-1]], ids="-".join)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", PASSES)
@torch.no_grad()
def test_one_pass_is_edited_whichever_way_it_is_called(way: str, side: str, rule: tuple[str, str, str]) -> None:
    model, rows = wrapped(rule=rule), random_rows([9, 5])
    batch = padded(rows, side)
    logits = PASSES[way](model.base, batch)
    for got, mask, wanted in zip(logits, batch["attention_mask"], expected(model, rule, rows), strict=True):
        agree(got[mask != 0], wanted)
    if way in ("deep copy", "thread"):  # which are not within the block
        return
    with model.disabled():
        assert torch.equal(PASSES[way](model.base, batch), PASSES[way](tiny(), batch))


@pytest.mark.parametrize("prepare", [lambda base: torch.compile(base, backend="eager"), compiled, placed])
@torch.no_grad()
def test_a_model_prepared_and_run_before_it_is_wrapped_is_edited_afterwards(prepare: Callable[[Any], Any]) -> None:
    base, rows = tiny(), random_rows([7])
    ids = torch.tensor(rows)
    prepared = prepare(base)
    untouched = prepared(ids).logits
    for around in (base, prepared):
        model = wrapped(around)
        for called in (prepared, model):
            agree(called(ids).logits[0], expected(model, PUBLISHED, rows)[0])
        with model.disabled():
            assert torch.equal(prepared(ids).logits, untouched)
        model.unwrap()
        assert torch.equal(prepared(ids).logits, untouched)


@torch.no_grad()
def test_what_is_put_on_a_model_between_wrapping_and_unwrapping_stays() -> None:
    base, ids = tiny(), torch.tensor(random_rows([7]))
    for prepare in (placed, compiled):
        model = wrapped(base)
        prepare(base)
        model.unwrap()
        assert torch.equal(base(ids).logits, tiny()(ids).logits)
    model = wrapped(base)
    assert torch.equal(base(ids).logits, wrapped().base(ids).logits)


POOLED = {"gate_blocks": (0,), "gate_pool": "maxmin"}
"""One gate for all edits."""


def checkpointed(**options: Any) -> Callable[[Any], None]:
    """transformers' switch, which acts in training mode."""

    def prepare(base: Any) -> None:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        base.train()

    return prepare


def checkpointed_with_hooks(base: Any) -> None:
    """As FSDP and older transformers do: what the backward pass runs again has the hooks in it."""
    for number, block in enumerate(base.model.layers):
        base.model.layers[number] = checkpoint_wrapper(block)


def checkpointed_whole(base: Any) -> None:
    base.__dict__["forward"] = partial(checkpoint, base.forward, use_reentrant=False)


@pytest.mark.parametrize(
    ("rule", "options"),
    [*((rule, {}) for rule in (PUBLISHED, RULES[0], RULES[-1])), *((rule, POOLED) for rule in (RULES[0], RULES[2]))],
    ids=str,
)
@pytest.mark.parametrize(
    "prepare",
    [
        checkpointed(use_reentrant=False),
        checkpointed(use_reentrant=True),
        checkpointed_with_hooks,
        checkpointed_whole,
        lambda base: recompute_blocks(base.model.layers),
    ],
    ids=["transformers", "reentrant", "with hooks", "whole", "ours"],
)
def test_gradients_of_several_passes_are_those_without_checkpointing(
    prepare: Callable[[Any], None], rule: tuple[str, str, str], options: dict[str, Any]
) -> None:
    ids = torch.tensor(random_rows([6, 6]))
    labels = ids.masked_fill(torch.arange(6) < 3, -100)
    found = []
    for prepared in (lambda base: None, prepare):
        model = wrapped(rule=rule, **options)
        prepared(model.base)
        losses = [model(ids, prompt_lengths=lengths).logits.square().mean() for lengths in ([2, 5], [4, 3])]
        losses.append(model.base(input_ids=ids, labels=labels).loss)
        with model.disabled():
            losses.append(model.base(input_ids=ids).logits.mean())
        thread = Thread(target=torch.stack(losses).sum().backward)  # on a GPU the backward pass has one of its own
        thread.start()
        thread.join()
        del losses, thread
        gc.collect()
        assert len(model.intervenable._given) <= len(BLOCKS)  # states of the last pass alone, whose gates are kept
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(one is not None and torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_states_that_two_passes_share_are_not_guessed_at_when_they_are_computed_again() -> None:
    model = wrapped()
    checkpointed_with_hooks(model.base)
    embeddings = model.base.get_input_embeddings()(torch.tensor(random_rows([6])))
    losses = [model(inputs_embeds=embeddings, prompt_lengths=[length]).logits.mean() for length in (2, 4)]
    with pytest.raises(ModelError, match="use_reentrant=False"):
        torch.stack(losses).sum().backward()


@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
@torch.no_grad()
def test_masks_by_kind_of_layer_are_read(added: bool) -> None:
    model, rows = wrapped(rule=RULES[-1], family="gemma3"), random_rows([9, 5])
    batch = padded(rows, "left")
    batch["attention_mask"] = {
        "sliding_attention": four_dimensional(batch["attention_mask"], added=added, window=8),
        "full_attention": four_dimensional(batch["attention_mask"], added=added),
    }
    logits = model.base(**batch).logits
    agree(logits[0], expected(model, RULES[-1], rows, "gemma3")[0])
    agree(logits[1, 4:], expected(model, RULES[-1], rows, "gemma3")[1])


def export(base: PreTrainedModel, ids: Tensor) -> Any:
    return torch.export.export(base, (), {"input_ids": ids, "use_cache": False})


def block_alone(base: Any, ids: Tensor) -> Any:
    states = base.get_input_embeddings()(ids)
    return base.model.layers[0](states, position_embeddings=base.model.rotary_emb(states, torch.arange(6)[None]))


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "block alone": (block_alone, "called outside a call"),
    "traced": (lambda base, ids: torch.jit.trace(base, (ids,), strict=False), "cannot be traced or exported"),
    "exported": (export, "cannot be traced or exported"),
    "replicas": (lambda base, ids: base._replicate_for_data_parallel(), "DataParallel cannot run"),
    "pickle": (lambda base, ids: pickle.dumps(base), "save_pretrained, and the base after unwrap"),
    "torch.save": (lambda base, ids: torch.save(base, io.BytesIO()), "save_pretrained, and the base after unwrap"),
    "positions that begin anew": (
        lambda base, ids: base(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]])), "packed into one row"
    ),
    "flash attention's packing": (
        lambda base, ids: base(ids, cu_seq_lens_q=torch.tensor([0, 3, 6])), "packed into one row"
    ),
    "continuous batching": (lambda base, ids: base.generate_batch(ids.tolist()), "packed into one row"),
    "mask of numbers": (
        lambda base, ids: base(ids, attention_mask=torch.ones(1, 1, 6, 6).long()), "torch.int64.*1 for tokens"
    ),
    "mask of another kind": (lambda base, ids: base(ids, attention_mask="causal"), "mask is a str,"),
    "lengths in generate": (lambda base, ids: base.generate(ids, prompt_lengths=[3]), "leave prompt_lengths out"),
}  # fmt: skip


@pytest.mark.parametrize("way", REFUSED)
@torch.no_grad()
def test_what_cannot_be_edited_is_refused_in_one_line_and_leaves_nothing_behind(way: str) -> None:
    model, rows = wrapped(), random_rows([6])
    ids = torch.tensor(rows)
    call, message = REFUSED[way]
    with pytest.raises(ModelError, match=message) as caught:
        call(model.base, ids)
    assert "\n" not in str(caught.value)
    agree(model.base(ids).logits[0], expected(model, PUBLISHED, rows)[0])
    with model.disabled():
        assert torch.equal(model.base(ids).logits, tiny()(ids).logits)


@pytest.mark.parametrize("dump", [pickle.dumps, copy.copy, lambda model: torch.save(model, io.BytesIO())])
def test_edits_cannot_be_taken_from_their_base(dump: Callable[[Any], Any]) -> None:
    with pytest.raises(ModelError, match="save_pretrained"):
        dump(wrapped())


def test_a_decoder_without_a_head_cannot_carry_edits() -> None:
    with pytest.raises(ModelError, match="LlamaModel holds no causal language model"):
        wrapped(tiny().model)


# -- threads and tasks -------------------------------------------------------------------------------------------------


def gates_of(model: GrunModel) -> list[Tensor]:
    return list(model.last_gates.values())


@torch.no_grad()
def test_threads_and_tasks_that_generate_at_once_get_their_own_answers_and_gates() -> None:
    model = strong(wrapped())
    prompts = random_rows([5, 11, 7, 3, 9, 8, 6, 4] * 3)
    wanted = greedy_by_hand(tiny(), "llama", model.state_dict(), prompts, STEPS)

    def ask(prompt: list[int]) -> tuple[list[int], list[Tensor]]:
        answer = model.base.generate(torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False)
        return answer[0, len(prompt) :].tolist(), gates_of(model)

    alone = [ask(prompt)[1] for prompt in prompts]

    async def tasks() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(ask, prompt) for prompt in prompts))

    with ThreadPoolExecutor(8) as pool:
        for found in (list(pool.map(ask, prompts)), asyncio.run(tasks())):
            assert [answer for answer, _ in found] == wanted
            for (_, gates), own in zip(found, alone, strict=True):
                assert all(torch.equal(one, other) for one, other in zip(gates, own, strict=True))


@pytest.mark.parametrize("change", ["add", "remove", "unwrap"])
@pytest.mark.parametrize("called", ["pass", "generate"])
@torch.no_grad()
def test_a_change_of_what_is_in_force_waits_for_calls_in_progress_and_later_calls_for_it(
    called: str, change: str, tmp_path: Path
) -> None:
    strong(wrapped()).save_pretrained(tmp_path)
    base, ids = tiny(), torch.tensor(random_rows([6]))
    stack = GrunStack(base)
    stack.add("one", tmp_path)

    def ask() -> Tensor:
        if called == "pass":
            return base(ids).logits
        return base.generate(
            ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        ).logits[0]

    changes = {
        "add": lambda: stack.add("other", tmp_path),
        "remove": lambda: stack.remove("one"),
        "unwrap": stack.unwrap,
    }
    before, running, may_go_on = ask(), Event(), Event()

    def wait(*_: Any) -> None:
        running.set()
        may_go_on.wait(10)

    hook = base.model.layers[1].register_forward_hook(wait)  # between the two edited blocks
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask)
        assert running.wait(10)
        changed = pool.submit(changes[change])
        with pytest.raises(TimeoutError):
            changed.result(0.2)
        later = pool.submit(ask)
        may_go_on.set()
        changed.result(10)
        assert torch.equal(first.result(), before)
        hook.remove()
        assert torch.equal(later.result(), ask()) and not torch.equal(later.result(), before)


@torch.no_grad()
def test_a_change_within_a_call_is_refused() -> None:
    model = wrapped()
    model.base.lm_head.register_forward_hook(lambda *_: model.unwrap())
    with pytest.raises(ModelError, match="within a call"):
        model.base(torch.tensor(random_rows([6])))


@torch.no_grad()
def test_disabled_concerns_this_thread_alone() -> None:
    model, ids = wrapped(), torch.tensor(random_rows([6]))
    edited = model.base(ids).logits
    with ThreadPoolExecutor(1) as pool:
        with model.disabled():
            assert not torch.equal(model.base(ids).logits, edited)
            assert torch.equal(pool.submit(model.base, ids).result().logits, edited)
        assert torch.equal(model.base(ids).logits, edited)


@torch.no_grad()
def test_gates_of_a_pass_in_another_thread_are_there_where_none_was_made() -> None:
    model, ids = wrapped(), torch.tensor(random_rows([6]))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(model.generate, ids, max_new_tokens=2).result()  # as with a streamer
    found = gates_of(model)
    model(ids)
    assert len(found) == 2 and all(torch.equal(one, own) for one, own in zip(found, gates_of(model), strict=True))


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", ["base", "model"])
def test_a_deep_copy_is_edited_by_its_own_edits(copied: str) -> None:
    model, ids = wrapped(), torch.tensor(random_rows([6]))
    model(ids).logits.sum().backward()  # leaves gates with gradients
    before = model.base(ids).logits
    twin = copy.deepcopy(model) if copied == "model" else GrunModel.of(copy.deepcopy(model.base))
    assert twin is not None and GrunModel.of(twin.base) is twin and twin.base is not model.base
    assert torch.equal(twin.base(ids).logits, before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(model.base(ids).logits, before)
    assert not torch.equal(twin.base(ids).logits, before) and torch.equal(twin(ids).logits, twin.base(ids).logits)
    model.unwrap()
    assert torch.equal(model.base(ids).logits, tiny()(ids).logits)
    assert len(twin(ids).gates) == 2
    twin.unwrap()
    assert torch.equal(twin.base(ids).logits, tiny()(ids).logits)
    assert not any("forward" in module.__dict__ for module in twin.base.modules())
