"""Fine-tuning on rows that stand one after another gives losses and gradients of the model itself, on padded rows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from tiny import PACKABLE, ragged_rows, tiny
from watched import Step, assert_same, whole_step

from grun.cache import unpadded
from grun.commands.finetune import FinetuneTask
from grun.config.options import FinetuneConfig, TrainConfig
from grun.training.recomputation import recompute_blocks
from pyvene_custom import find_blocks

ROWS = ragged_rows(16, seed=1)


def task(model: Any, *, packed: bool, recompute: bool = False, **options: Any) -> FinetuneTask:
    config = FinetuneConfig(train=TrainConfig(batch_size=16, micro_batch_size=6, **options), seed=3)
    made = FinetuneTask(model, ROWS, config, pad_id=0)
    if packed:
        made.packed = unpadded.unpadded(model, ROWS, 0, made.masters.forward(), recompute=recompute)
        assert made.packed is not None
    if recompute:
        recompute_blocks(find_blocks(model)[1])
    return made


def assert_close(found: Step, wanted: Step) -> None:
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    for name, gradient in wanted.gradients.items():
        assert float((found.gradients[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-7, name


@pytest.mark.parametrize("weight", [0.0, 0.3], ids=["answers", "questions too"])
@pytest.mark.parametrize("family", PACKABLE)
def test_losses_and_gradients_of_a_step_are_those_of_padded_rows(family: str, weight: float) -> None:
    still = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) if family == "gpt2" else {}
    found, wanted = (
        whole_step(task(tiny(family, **still), packed=packed, question_weight=weight)) for packed in (True, False)
    )
    if family.startswith("gemma"):  # whose norms are float32
        assert_close(found, wanted)
    else:
        assert_same(found, wanted)


def test_in_float32_they_agree_to_1e_5_and_blocks_that_run_again_change_nothing() -> None:
    wanted = whole_step(task(tiny(dtype=torch.float32), packed=False))
    found, again = (
        whole_step(task(tiny(dtype=torch.float32), packed=True, recompute=recompute)) for recompute in (False, True)
    )
    assert_close(found, wanted)
    for name in wanted.gradients:
        assert torch.equal(again.gradients[name], found.gradients[name]), name


def test_no_padding_is_run_and_the_head_only_where_a_token_is_labeled() -> None:
    made = task(tiny(), packed=True)
    assert made.packed is not None
    blocks, heads = list[int](), list[int]()
    made.packed.blocks[0].mlp.register_forward_hook(lambda _, args, __: blocks.append(args[0][0].shape[0]))
    logits = made.packed.logits
    made.packed.logits = lambda hidden: heads.append(len(hidden)) or logits(hidden)  # type: ignore[method-assign]
    data = made.data(0)
    for batch in data.micro_batches:
        made.loss(batch, data.counts, 0)
    batches = [batch["answer"] for batch in data.micro_batches]
    assert blocks == [sum(map(len, batch.encoded)) for batch in batches]
    assert any(tokens < batch.input_ids.numel() for tokens, batch in zip(blocks, batches, strict=True))
    assert sum(heads) == data.counts["answer"]


@pytest.mark.parametrize(
    ("family", "changes"), [("gpt2", {"attn_pdrop": 0.5}), ("odd", {})], ids=["dropout", "unknown structure"]
)
def test_a_model_that_it_does_not_fit_is_trained_on_padded_rows_and_a_line_says_why(
    family: str, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(family, **changes)
    with caplog.at_level(logging.WARNING):
        assert (
            unpadded.unpadded(
                model, ROWS, 0, FinetuneTask(model, ROWS, FinetuneConfig(), pad_id=0).masters.forward(), recompute=False
            )
            is None
        )
    (line,) = caplog.messages
    assert line.startswith("rows are padded, since passes without padding do not fit this model: ")


def test_the_command_takes_it_unless_plain_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    own = unpadded.token_logprobs
    monkeypatch.setattr(
        "grun.commands.finetune.token_logprobs", lambda packed, batch: passes.append(batch.rows) or own(packed, batch)
    )
    assert demo.finetune(tmp_path / "plain", "train.engine=plain", "train.epochs=1", "train.save_steps=0") == 0
    assert not passes
    assert demo.finetune(tmp_path / "packed", "train.epochs=1", "train.save_steps=0") == 0
    assert sum(passes) == 50
    losses = [[line["loss"] for line in demo.read_lines(tmp_path / name / "log.jsonl")] for name in ("plain", "packed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
