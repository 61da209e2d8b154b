"""Scoring on packed rows and our own greedy loop give what whole passes and `generate` give; lists of adapters."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from tiny import DEPTH, FAMILIES, PAD, WIDTH, WINDOW, Numbers, random_rows, tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from grun.cli import main
from grun.config.options import DataConfig, EvaluateConfig
from grun.data.encoding import EncodedRow, collate_prompts
from grun.errors import AdapterError, ConfigError
from grun.evaluation import generation, packed_scoring, shared_scoring
from grun.evaluation.evaluate import evaluate, evaluate_adapters
from grun.evaluation.generation import generate_answers, greedy, needs_generate
from grun.evaluation.scoring import ScoredRow, score
from grun.evaluation.shared_scoring import Subject, pieces, score_together
from grun.evaluation.table import Table
from grun.loading.checks import check
from grun.method.model import GrunModel

PACKED = [family for family in FAMILIES if family != "odd"]  # whose blocks do not speak transformers' attention
ROUNDING = 1e-9
"""Sums in another order in float64; variances are sums of squares of numbers up to 100."""
THRESHOLD = 0.01
"""Between the gates of the rows of one of the tests."""
COARSER = {"gemma2": 1e-5}
"""Families whose whole passes take the softmax of attention in float32."""


def question_rows(seed: int = 0) -> list[EncodedRow]:
    """Prompts with one to four answers of all lengths, a prompt beyond a window, one-token prompts and answers."""
    prompts = random_rows([5, 1, 2 * WINDOW + 3, 9, 3], seed)
    answers = random_rows([4, 1, 7, 2, WINDOW + 2, 3, 1, 6, 5, 12, 2, 1], seed + 1)
    owner = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4]
    return [EncodedRow(tuple(prompts[number]), tuple(answer)) for number, answer in zip(owner, answers, strict=True)]


def edited(base: PreTrainedModel, blocks: Sequence[int] = (1, 3), seed: int = 0) -> GrunModel:
    torch.manual_seed(seed)
    model = GrunModel.wrap(base, blocks=list(blocks), rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model.eval()


def apart(base: PreTrainedModel, blocks: Sequence[int], seed: int) -> GrunModel:
    """An adapter that was taken off its base again."""
    model = edited(base, blocks, seed)
    model.unwrap()
    return model


def assert_equal(found: Sequence[ScoredRow], wanted: Sequence[ScoredRow], tolerance: float = ROUNDING) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.hit == other.hit
        for field in ("logp", "vocabulary_mean", "vocabulary_variance"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=tolerance, abs=tolerance)
        if other.gates is None:
            assert one.gates is None
        else:
            assert one.gates == pytest.approx(other.gates, abs=tolerance)


@pytest.fixture
def no_whole_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is left for `score`, but for the row that is tried, must be rows that cannot be packed."""

    def refuse(model: Any, rows: Sequence[EncodedRow], *args: Any, **kwargs: Any) -> list[ScoredRow]:
        assert len(rows) == 1 or not any(row.prompt_ids and row.answer_ids for row in rows)
        return score(model, rows, *args, **kwargs)

    monkeypatch.setattr(shared_scoring, "score", refuse)


# -- scoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [(), (1, 3), (0,), (DEPTH - 1,)])
@pytest.mark.parametrize("family", PACKED)
@pytest.mark.usefixtures("no_whole_passes")
def test_packed_scores_are_those_of_whole_passes(family: str, blocks: tuple[int, ...]) -> None:
    base = tiny(family)
    model = edited(base, blocks) if blocks else base
    rows = question_rows()
    wanted = score(model, rows, 5, PAD)
    for size in (1, 4, 64):
        (found,) = score_together([Subject(model)], rows, size, PAD)
        assert_equal(found, wanted, COARSER.get(family, ROUNDING))


def test_a_model_that_cannot_be_packed_is_scored_by_whole_passes(caplog: pytest.LogCaptureFixture) -> None:
    model, rows = edited(tiny("odd")), question_rows()
    with caplog.at_level(logging.INFO, logger="grun"):
        (found,) = score_together([Subject(model)], rows, 4, PAD)
    assert "rows are scored one whole pass each" in caplog.text and len(caplog.messages) == 1
    assert found == score(model, rows, 4, PAD)


def test_a_model_that_packing_computes_wrongly_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny()
    model, rows = edited(base), question_rows()
    wanted = score(model, rows, 4, PAD)
    logits = packed_scoring.PackedModel.logits
    monkeypatch.setattr(packed_scoring.PackedModel, "logits", lambda self, hidden: logits(self, hidden) * 1.01)
    with caplog.at_level(logging.INFO, logger="grun"):
        (found,) = score_together([Subject(model)], rows, 4, PAD)
    assert "log-probabilities differ" in caplog.text
    assert found == wanted


@pytest.mark.usefixtures("no_whole_passes")
def test_models_scored_together_score_as_alone() -> None:
    """The base, adapters with other blocks, and one with a threshold; each is as it was when scored by itself."""
    base, rows = tiny("gemma3"), question_rows()
    adapters = [apart(base, blocks, seed) for seed, blocks in enumerate([(2,), (1, 3), (3,)])]
    adapters[1].gate_threshold = THRESHOLD
    together = score_together([Subject(model) for model in (base, *adapters)], rows, 6, PAD)
    assert_equal(together[0], score(base, rows, 4, PAD))
    for model, found in zip(adapters, together[1:], strict=True):
        with Subject(model).put_on() as whole:
            assert_equal(found, score(whole, rows, 4, PAD))
    gates = [gate for row in together[2] for gate in (row.gates or {}).values()]
    assert min(gates) < THRESHOLD < max(gates)


def pooled(base: PreTrainedModel, seed: int, threshold: float | None, **options: Any) -> GrunModel:
    """An adapter, taken off its base again, with one gate for all edits that is asked at the last prompt token."""
    torch.manual_seed(seed)
    options = {"gate_blocks": [0, 1], "gate_pool": "maxmin", "edit_write": "sticky", **options}
    model = GrunModel.wrap(base, rank=2, **{"blocks": [2, 3], **options}).eval()
    with torch.no_grad():
        for edit in model.edits.parameters():
            edit.add_(torch.randn_like(edit))
    model.gate_threshold = threshold
    model.unwrap()
    return model


def whole(model: GrunModel, rows: Sequence[EncodedRow]) -> list[ScoredRow]:
    with Subject(model).put_on() as put:
        return score(put, rows, 4, PAD)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.usefixtures("no_whole_passes")
def test_rows_on_which_a_gate_decided_once_is_shut_have_the_bases_scores_and_are_run_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows = tiny(family), [*question_rows(), EncodedRow((4,), (5, 6, 7, 8, 9, 10))]
    turn = rows[0].prompt_ids[2:4]  # a pool starts again within a prompt
    models = [
        pooled(base, 0, 0.5, reset_ids=turn),
        pooled(base, 1, 0.5, blocks=[1, 3], gate_blocks=[1], gate_pool="mean"),
        pooled(base, 2, 0.5, gate_pool="last", edit_write="last_prompt"),
        pooled(base, 3, 1.0),
        pooled(base, 4, None),
        pooled(base, 5, 0.5, gate_blocks=None, gate_pool="last"),  # each edit with a gate of its own
    ]
    for model in models[:3]:  # in the middle of the gates of these rows
        gates = sorted({gate for row in whole(model, rows) for gate in (row.gates or {}).values()})
        model.gate_threshold = (gates[len(gates) // 2 - 1] + gates[len(gates) // 2]) / 2
    wanted = [score(base, rows, 4, PAD), *(whole(model, rows) for model in models)]
    run: list[int] = []
    states = packed_scoring.SuffixRunner.states

    def counted(self: Any, frozen: Any, *more: Any, **options: Any) -> Any:
        run.append(len(frozen))
        return states(self, frozen, *more, **options)

    monkeypatch.setattr(packed_scoring.SuffixRunner, "states", counted)
    found = score_together([Subject(base), *map(Subject, models)], rows, 64, PAD)
    for one, other in zip(found, wanted, strict=True):
        assert_equal(one, other)
    shut = [
        [number for number, row in enumerate(of) if max((row.gates or {}).values()) < (model.gate_threshold or 0)]
        for model, of in zip(models, found[1:], strict=True)
    ]
    count = len(rows)
    assert run[1:] == [count, *(count - len(of) for of in shut[:3]), count, count]  # the first is one row, tried
    assert all(0 < len(of) < count for of in shut[:3]) and len(shut[3]) == count and not shut[4]
    for of, one in zip(shut[:4], found[1:5], strict=True):
        for number, row in enumerate(one):  # to the bit
            assert (row._replace(gates=None) == found[0][number]) == (number in of)
    alone = score_together([Subject(models[0])], rows, 64, PAD, first=1)
    assert alone == [found[1]]  # without the base too


def test_a_gate_that_is_asked_at_every_token_is_scored_by_whole_passes(caplog: pytest.LogCaptureFixture) -> None:
    base, rows = tiny(), question_rows()
    model = pooled(base, 0, 1.0, gate_read="every_token", edit_write="every_token")
    with caplog.at_level(logging.INFO, logger="grun"):
        found = score_together([Subject(base), Subject(model)], rows, 4, PAD)
    assert "acts before the last token of the prompt" in caplog.text
    assert found == [score(base, rows, 4, PAD), whole(model, rows)]


def test_rows_without_a_prompt_are_scored_too() -> None:
    base = tiny()
    rows = [*question_rows(), EncodedRow((), (5, 6, 7))]
    (found,) = score_together([Subject(base)], rows, 4, PAD)
    assert_equal(found, score(base, rows, 4, PAD))
    assert len(found[-1].logp) == 2


def test_masked_tokens_are_masked_by_whole_passes() -> None:
    base, rows = tiny(), question_rows()
    inside = rows[0].prompt_ids[1]
    (found,) = score_together([Subject(base)], rows, 4, PAD, masked_id=inside)
    assert found == score(base, rows, 4, PAD, masked_id=inside)


def test_half_precision_is_within_its_rounding() -> None:
    model = edited(tiny(dtype=torch.bfloat16))
    (found,) = score_together([Subject(model)], question_rows(), 4, PAD)
    for one, other in zip(found, score(model, question_rows(), 4, PAD), strict=True):
        # eight bits in every state of four blocks, with logits as large as 100
        assert one.logp == pytest.approx(other.logp, abs=0.5)


def test_logits_exist_for_a_slice_of_the_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    base, rows = tiny(), question_rows()
    (whole,) = score_together([Subject(base)], rows, 64, PAD)
    monkeypatch.setattr("grun.evaluation.scoring.LARGEST_SLICE", 3 * 64)
    seen: list[int] = []
    logits = packed_scoring.PackedModel.logits

    def watched(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(packed_scoring.PackedModel, "logits", watched)
    (sliced,) = score_together([Subject(base)], rows, 64, PAD)
    assert max(seen) == 3
    assert_equal(sliced, whole)


def test_modes_stay_and_dropout_is_off() -> None:
    base = tiny("gpt2")
    model = edited(base)
    model.train()
    base.train()  # gpt2 has dropout
    (one,), (other,) = (score_together([Subject(model)], question_rows(), 4, PAD) for _ in range(2))
    assert one == other
    assert model.training and base.training


def test_pieces_keep_the_answers_of_a_prompt_together() -> None:
    rows = question_rows()
    found = list(pieces(rows, 4))
    assert sorted(map(hash, rows)) == sorted(hash(row) for piece in found for row in piece)
    assert max(map(len, found)) <= 4
    for prompt in {row.prompt_ids for row in rows}:
        assert sum(any(row.prompt_ids == prompt for row in piece) for piece in found) == 1
    assert max(len(row) for row in found[0]) == max(map(len, rows))


# -- generation -------------------------------------------------------------------------------------------------------


PROMPTS = [tuple(row) for row in random_rows([3, 1, 2 * WINDOW + 3, 9, 3, 9, 9, WINDOW, 2 * WINDOW, 5], seed=7)]
"""Of lengths around a sliding window."""


def one_by_one(model: Any, ends: list[int], steps: int) -> list[list[int]]:
    """The model's own generate, a prompt at a time."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False, pad_token_id=PAD,
            eos_token_id=ends or None,
        )[0, len(prompt) :].tolist()  # fmt: skip
        cut = [place for place, token in enumerate(out) if token in ends]
        answers.append(out[: cut[0]] if cut else out)
    return answers


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_generate(family: str, adapter: bool) -> None:
    uncapped = {"final_logit_softcapping": None} if family == "gemma2" else {}  # capped at 5, the largest are equal
    base = tiny(family, **uncapped)
    model = edited(base) if adapter else base
    endless = one_by_one(model, [], 12)
    ends = sorted({1, *(endless[number][2 + number] for number in (0, 3, 6))})  # so that rows end at different steps
    wanted = one_by_one(model, ends, 12)
    assert len({len(answer) for answer in wanted}) > 1
    base.generation_config.eos_token_id = ends
    for size in (1, 3, 16):
        for expected in (None, [len(answer) for answer in wanted], list(range(len(PROMPTS)))):
            answers = generate_answers(model, Numbers(), PROMPTS, size, 12, PAD, expected=expected)
            assert [answer.text for answer in answers] == [" ".join(map(str, answer)) for answer in wanted]
    if adapter:
        scored = score(model, [EncodedRow(prompt, (2,)) for prompt in PROMPTS], 4, PAD)
        for answer, row in zip(answers, scored, strict=True):
            assert answer.gates == pytest.approx(row.gates, abs=ROUNDING)


def test_rows_that_have_ended_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny()
    sizes: list[int] = []
    base.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    rooms = [1, 2, 3, 4, 5, 6, 7, 8]
    batch = collate_prompts(random_rows([4] * 8), PAD)
    answers, _ = greedy(base, batch, rooms, (), PAD)
    assert [len(answer) for answer in answers] == rooms
    assert sizes == [8, 7, 6, 5, 4, 3, 2, 1]
    monkeypatch.setattr(generation, "DROPPED", 0.5)
    sizes.clear()
    assert greedy(base, batch, rooms, (), PAD)[0] == answers
    assert sizes == [8, 8, 8, 8, 4, 4, 2, 1]


@pytest.mark.parametrize(
    "shipped",
    [
        {"no_repeat_ngram_size": 2, "repetition_penalty": 3.0, "min_new_tokens": 30},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 9.0},
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["3"], "max_length": 2, "max_time": 1e-9},
        {"suppress_tokens": list(range(2, 40)), "begin_suppress_tokens": [1], "forced_eos_token_id": 50},
    ],
)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_answers_are_greedy_whatever_a_generation_config_asks_for(family: str, shipped: dict[str, Any]) -> None:
    model = tiny(family)
    assert bool(needs_generate(model)) == (family == "phi3")  # which prepares the inputs of each step itself
    wanted = [answer.text for answer in generate_answers(model, Numbers(), PROMPTS[:3], 3, 20, PAD)]
    model.generation_config.update(**shipped)
    assert [answer.text for answer in generate_answers(model, Numbers(), PROMPTS[:3], 3, 20, PAD)] == wanted
    assert all(getattr(model.generation_config, name) == value for name, value in shipped.items())


# -- several adapters -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with adapters a, b (other blocks) and c."""
    folder = demo.random_model(tmp_path_factory.mktemp("taught"))
    for seed, (name, blocks) in enumerate({"a": [0, 1], "b": [1], "c": [0]}.items()):
        edited(AutoModelForCausalLM.from_pretrained(folder / "model"), blocks, seed).save_pretrained(folder / name)
    return folder


def settings(taught: Path, *adapters: str, **options: Any) -> EvaluateConfig:
    own = {"data": DataConfig(demo=demo.SIZES, limit=3), "sets": ["forget", "retain"], "max_new_tokens": 4}
    return demo.evaluation(taught, adapters=[str(taught / name) for name in adapters], **{**own, **options})


def alone(taught: Path, name: str, folder: Path, **options: Any) -> dict[str, Any]:
    return evaluate(settings(taught, adapter=str(taught / name), **options), folder)


def contents(folder: Path) -> dict[str, Any]:
    found = {path.name: path.read_text() for path in folder.glob("*.jsonl")}
    return found | {"evaluation": {**json.loads((folder / "evaluation.json").read_text()), "seconds": None}}


def test_each_adapter_and_the_base_get_the_folder_they_get_alone(taught: Path, tmp_path: Path) -> None:
    names = ["before", "a", "b", "c"]
    results = evaluate_adapters(settings(taught, *"abc", with_base="before", suffix="-x"), tmp_path / "list")
    assert list(results) == [str(tmp_path / "list" / f"{name}-x") for name in names]
    for name in names:
        own = {} if name == "before" else {"adapter": str(taught / name)}
        evaluate(settings(taught, **own), tmp_path / "alone" / name)
        folders = tmp_path / "list" / f"{name}-x", tmp_path / "alone" / name
        one, other = map(contents, folders)
        assert one["evaluation"]["key"] == other["evaluation"]["key"]
        assert one["evaluation"]["adapter"] == own.get("adapter")
        assert one["generations.jsonl"] == other["generations.jsonl"]
        if name in "ac":  # the others' lowest block is not the list's, so that their passes are split elsewhere
            assert one == other
        for first, second in zip(*(Table.read(folder).scores for folder in folders), strict=True):
            assert first.logp == pytest.approx(second.logp, abs=1e-4)  # float32
    assert not Table.read(tmp_path / "list" / "before-x").gates
    assert evaluate(settings(taught), tmp_path / "list" / "before-x") == results[str(tmp_path / "list" / "before-x")]


def test_a_list_that_was_cut_off_goes_on_and_ends_bit_identical(taught: Path, tmp_path: Path) -> None:
    """Cut off in scoring, behind two targets of a piece, and between the generations of two adapters."""
    config = settings(taught, "b", "a", batch_size=4)
    evaluate_adapters(config, tmp_path / "whole")
    scored: list[EncodedRow] = []
    for where, calls in (("grun.evaluation.packed_scoring.scored_rows", 4), ("grun.evaluation.generation.greedy", 2)):
        with pytest.MonkeyPatch.context() as patch:
            module, _, name = where.rpartition(".")
            real, left = getattr(__import__(module, fromlist=[name]), name), [calls]

            def until(*args: Any, real: Any = real, left: list[int] = left, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            patch.setattr(where, until)
            with pytest.raises(KeyboardInterrupt):
                evaluate_adapters(config, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        freeze = packed_scoring.Freezer.freeze

        def count(self: Any, rows: Sequence[EncodedRow], *more: Any) -> Any:
            scored.extend(rows)
            return freeze(self, rows, *more)

        patch.setattr(packed_scoring.Freezer, "freeze", count)
        evaluate_adapters(config, tmp_path / "out")
    assert not scored  # all scores were in the journals
    for name in "ab":
        assert contents(tmp_path / "out" / name) == contents(tmp_path / "whole" / name)
    assert not list((tmp_path / "out").glob(".*"))


def test_lists_on_the_command_line(taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["data.demo.forget=2", "data.demo.retain=4", "data.demo.heldout=2", "data.demo.unknown=2"]
    arguments = [*sizes, "data.demo.refused=2", "data.demo.questions=2", "data.demo.seed=1", "max_new_tokens=2"]
    command = ["evaluate", *arguments, f"model.path={taught / 'model'}", "sets=[forget]", f"output_dir={tmp_path}"]
    assert main([*command, f"adapters=[{taught / 'a'},{taught / 'c'}]", "suffix=-x"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a-x'}\n{tmp_path / 'c-x'}\n"
    assert (tmp_path / "c-x" / "evaluation.json").is_file()


def test_an_adapter_of_peft_in_a_list_is_evaluated_by_itself(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.save_lora(taught / "model", tmp_path / "lora")
    config = settings(taught, "a", sets=["forget"])
    config.adapters.insert(0, str(tmp_path / "lora"))
    results = evaluate_adapters(config, tmp_path / "out")
    assert "one after another, since only GRUN adapters share passes: 1" in capsys.readouterr().err
    assert [Path(folder).name for folder in results] == ["lora", "a"]
    assert "gate" not in results[str(tmp_path / "out" / "lora")]
    with pytest.raises(ConfigError, match="type LORA, which has no gates"):
        evaluate_adapters(replace(config, gate_threshold=0.5), tmp_path / "other")


def test_wrong_lists_are_named_before_anything_is_loaded(taught: Path, tmp_path: Path) -> None:
    for options, told in (
        ({"adapter": "x", "adapters": ["a"]}, "adapter and adapters are both given"),
        ({"adapters": ["x/a", "y/a/"]}, "two are called a"),
        ({"suffix": "-8bit"}, "suffix is for adapters"),
        ({"adapter": "x", "with_base": "before"}, "with_base is for adapters"),
        ({"adapters": ["x/a"], "with_base": "a"}, "two are called a"),
        ({"gate_threshold": 0.5}, "gate_threshold needs an adapter"),
    ):
        with pytest.raises(ConfigError, match=told) as error:
            check(EvaluateConfig(**options))
        assert "\n" not in str(error.value)
    with pytest.raises(AdapterError):
        evaluate_adapters(settings(taught, "a", "nothing"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- answers that no gate opens for -----------------------------------------------------------------------------------


def test_an_adapter_with_one_gate_gets_in_a_list_what_it_gets_alone(taught: Path, tmp_path: Path) -> None:
    """Three of six gates are shut: these prompts the base has answered, and they are asked no more."""
    base = AutoModelForCausalLM.from_pretrained(taught / "model")
    for seed in range(2):
        model = pooled(base, seed, 0.5, gate_blocks=[0], blocks=[1])
        model.save_pretrained(tmp_path / f"p{seed}")
        evaluate(settings(taught, adapter=str(tmp_path / f"p{seed}")), tmp_path / "gates")
        gates = sorted(max(record.gates.values()) for record in Table.read(tmp_path / "gates").gates)
        model.keep_threshold((gates[2] + gates[3]) / 2)
        model.save_pretrained(tmp_path / f"p{seed}")
        shutil.rmtree(tmp_path / "gates")
    own = [str(tmp_path / f"p{seed}") for seed in range(2)]
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "greedy", lambda m, batch, *more: asked.append(batch.rows) or greedy(m, batch, *more))
        evaluate_adapters(settings(taught, *own, with_base="before"), tmp_path / "list")
    assert sum(asked) == 6 + 3 + 3
    for folder in own:
        evaluate(settings(taught, adapter=folder), tmp_path / "alone" / Path(folder).name)
        assert contents(tmp_path / "list" / Path(folder).name) == contents(tmp_path / "alone" / Path(folder).name)
    before, first = (Table.read(tmp_path / "list" / name).scores for name in ("before", "p0"))
    assert 0 < sum(one == other for one, other in zip(before, first, strict=True)) < len(before)


def test_an_adapter_that_is_put_on_again_is_the_same(taught: Path) -> None:
    base = tiny()
    model = edited(base)
    model.gate_threshold = 0.25
    ids = torch.tensor(random_rows([7]))
    with torch.no_grad():
        wanted, plain = model(input_ids=ids).logits, model.unwrap()(input_ids=ids).logits
        for _ in range(2):
            with Subject(model).put_on() as again:
                assert again.gate_threshold == 0.25
                assert torch.equal(again(input_ids=ids).logits, wanted)
            assert torch.equal(base(input_ids=ids).logits, plain)
    assert not torch.equal(wanted, plain) and WIDTH == base.config.hidden_size
