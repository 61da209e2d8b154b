"""Scoring, generation, the table, metrics and the evaluation command, on tiny random models."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import demo
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from grun.config.options import DataConfig, EvaluateConfig, ModelConfig
from grun.data.encoding import EncodedRow
from grun.errors import ConfigError, DataError, ModelError, RunError
from grun.evaluation.evaluate import evaluate
from grun.evaluation.generation import end_tokens, generate_answers
from grun.evaluation.measure import gate_table, measure
from grun.evaluation.metrics import METRICS, auc, is_degenerate
from grun.evaluation.scoring import score, score_tokens
from grun.evaluation.table import GateRecord, GenerationRecord, ScoreRecord, Table
from grun.method.model import GrunModel

VOCABULARY = 64
PAD, EOS = 0, 1


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, context: int = 64) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,  # spreads the logits, so that wrong positions show
        bos_token_id=2,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, dtype)
    return model.eval()


def random_rows(count: int, seed: int = 0) -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(seed)

    def ids(least: int, most: int) -> tuple[int, ...]:
        length = int(torch.randint(least, most, (1,), generator=generator))
        return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())

    return [EncodedRow(ids(1, 9), (*ids(1, 7), EOS)) for _ in range(count)]


class Letters:
    """A tokenizer of one-token words: token 7 is "w7"."""

    pad_token_id = PAD
    eos_token_id = EOS

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " " + " ".join(f"w{token}" for token in ids)


# -- scoring ----------------------------------------------------------------------------------------------------------


def test_scores_equal_a_full_forward_of_each_row_alone() -> None:
    model, rows = tiny(), random_rows(9)
    for row, scored in zip(rows, score(model, rows, 4, PAD), strict=True):
        with torch.no_grad():
            logp = model(torch.tensor([row.prompt_ids + row.answer_ids])).logits[0].log_softmax(-1)
        for number, token in enumerate(row.answer_ids):
            at = logp[len(row.prompt_ids) + number - 1]
            p = at.exp()
            mean = (p * at).sum().item()
            # 1e-5: float32 sums in another order over 64 words
            assert scored.logp[number] == pytest.approx(at[token].item(), abs=1e-5)
            assert scored.hit[number] == (at.argmax().item() == token)
            assert scored.vocabulary_mean[number] == pytest.approx(mean, abs=1e-5)
            assert scored.vocabulary_variance[number] == pytest.approx((p * (at - mean) ** 2).sum().item(), abs=1e-4)
        assert scored.gates is None
        assert len(scored.logp) == len(row.answer_ids)


def test_batch_size_and_order_change_no_score() -> None:
    model, rows = tiny(), random_rows(11)
    alone, together = score(model, rows, 1, PAD), score(model, rows[::-1], 8, PAD)[::-1]
    for one, other in zip(alone, together, strict=True):
        assert one.hit == other.hit
        for field in ("logp", "vocabulary_mean"):
            # relative 1e-6: a few units in the last place of float32
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-6, abs=1e-6)


def test_each_distinct_row_is_scored_once() -> None:
    model, rows = tiny(), random_rows(3)
    seen: list[int] = []

    def count(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(len(kwargs["input_ids"]))

    model.register_forward_pre_hook(count, with_kwargs=True)
    done: list[int] = []
    scored = score(model, [*rows, *rows, rows[0]], 2, PAD, done.append)
    assert sum(seen) == 3
    assert sum(done) == 7
    assert scored[0] == scored[3] == scored[6]


def test_half_precision_logits_are_scored_in_float32_and_float64_stays() -> None:
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 8
    targets = torch.arange(5)
    for narrow, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        got = score_tokens(logits.to(narrow), targets)
        want = logits.to(narrow).to(wide).log_softmax(-1)
        assert got.logp.dtype == wide
        assert torch.equal(got.logp, want[torch.arange(5), targets])


def test_a_word_of_probability_zero_does_not_spoil_mean_and_variance() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    got = score_tokens(logits, torch.tensor([0]))
    assert got.vocabulary_mean.item() == pytest.approx(math.log(0.5))
    assert got.vocabulary_variance.item() == pytest.approx(0.0, abs=1e-12)


def test_slices_of_the_vocabulary_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, VOCABULARY, generator=torch.Generator().manual_seed(0))
    whole = score_tokens(logits, torch.arange(7))
    monkeypatch.setattr("grun.evaluation.scoring.LARGEST_SLICE", 2 * VOCABULARY)
    for one, other in zip(whole, score_tokens(logits, torch.arange(7)), strict=True):
        assert torch.equal(one, other)


def test_without_a_prompt_the_first_token_is_left_out() -> None:
    row = EncodedRow((), (5, 6, EOS))
    scored = score(tiny(), [row], 1, PAD)[0]
    same = score(tiny(), [EncodedRow((5,), (6, EOS))], 1, PAD)[0]
    assert scored.logp == pytest.approx(same.logp)


def test_a_model_of_nan_is_refused() -> None:
    model = tiny()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(ModelError, match="not finite"):
        score(model, random_rows(1), 1, PAD)


def test_gates_of_a_gated_model_are_those_of_the_row_alone() -> None:
    torch.manual_seed(1)
    model = GrunModel.wrap(tiny(dtype=torch.float64), blocks=[0, 1], rank=2)
    rows = random_rows(6)
    for row, scored in zip(rows, score(model, rows, 3, PAD), strict=True):
        ids, lengths = torch.tensor([row.prompt_ids + row.answer_ids]), torch.tensor([len(row.prompt_ids)])
        with torch.no_grad():
            out = model(input_ids=ids, prompt_lengths=lengths)
        assert scored.gates is not None
        assert list(scored.gates) == [0, 1]
        for block in (0, 1):
            # 1e-9: the model runs in float64
            assert scored.gates[block] == pytest.approx(out.gates[block].item(), abs=1e-9)
        logp = out.logits[0].log_softmax(-1)
        first = logp[len(row.prompt_ids) - 1, row.answer_ids[0]].item()
        assert scored.logp[0] == pytest.approx(first, abs=1e-9)


def test_the_model_keeps_its_mode() -> None:
    model = tiny().train()
    score(model, random_rows(1), 1, PAD)
    assert model.training


# -- generation -------------------------------------------------------------------------------------------------------


def greedy(model: PreTrainedModel, prompt: tuple[int, ...], steps: int) -> str:
    """Step by step, without a cache and without padding."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == EOS:
            break
        ids.append(token)
    return " ".join(f"w{token}" for token in ids[len(prompt) :])


def test_answers_equal_greedy_decoding_of_each_prompt_alone() -> None:
    model = tiny(seed=3)
    prompts = [row.prompt_ids for row in random_rows(10, seed=2)]
    answers = generate_answers(model, Letters(), [*prompts, prompts[0]], 4, 8, PAD)
    assert [answer.text for answer in answers[:-1]] == [greedy(model, prompt, 8) for prompt in prompts]
    assert answers[-1] == answers[0]
    assert answers[0].gates is None


def test_an_answer_ends_at_the_end_token() -> None:
    model = tiny()
    first = greedy(model, (5, 6), 3).split()
    model.generation_config.eos_token_id = [EOS, int(first[1][1:])]
    assert end_tokens(model, Letters()) == sorted({EOS, int(first[1][1:])})
    texts = [answer.text for answer in generate_answers(model, Letters(), [(5, 6), (9,)], 2, 8, PAD)]
    assert texts[0] == first[0]


def test_a_repetition_penalty_shipped_with_the_model_is_not_used() -> None:
    model = tiny(seed=3)
    prompts = [row.prompt_ids for row in random_rows(4)]
    model.generation_config.repetition_penalty = 5.0
    assert [answer.text for answer in generate_answers(model, Letters(), prompts, 4, 8, PAD)] == [
        greedy(model, prompt, 8) for prompt in prompts
    ]


def test_an_answer_ends_where_the_context_is_full_whatever_else_is_in_the_batch() -> None:
    model = tiny(seed=3, context=12)
    prompts = [(5,) * 10, (6, 7), (8, 9)]
    texts = [answer.text for answer in generate_answers(model, Letters(), prompts, 3, 8, PAD)]
    assert texts == [greedy(model, prompt, min(8, 12 - len(prompt))) for prompt in prompts]
    assert len(texts[0].split()) <= 2
    with pytest.raises(DataError, match="no room"):
        generate_answers(model, Letters(), [(5,) * 12], 1, 8, PAD)
    with pytest.raises(DataError, match="empty prompt"):
        generate_answers(model, Letters(), [()], 1, 8, PAD)


def test_a_gated_model_answers_edited_and_gives_the_prompts_gates() -> None:
    torch.manual_seed(1)
    model = GrunModel.wrap(tiny(seed=3), blocks=[1], rank=2, gate_bias=1.0)
    rows = random_rows(5)
    answers = generate_answers(model, Letters(), [row.prompt_ids for row in rows], 2, 4, PAD)
    for answer, scored in zip(answers, score(model, rows, 5, PAD), strict=True):
        assert answer.gates is not None and scored.gates is not None
        assert answer.gates[1] == pytest.approx(scored.gates[1], abs=1e-5)  # float32, padded on the other side


# -- table ------------------------------------------------------------------------------------------------------------


def answer(text: str, fact: str | None = None, reference: str = "the cat sat") -> GenerationRecord:
    return GenerationRecord("forget", 0, "q", reference, fact, text)


def scores(*logps: list[float]) -> list[ScoreRecord]:
    return [
        ScoreRecord("forget", index, "answer", 0, 3, n := len(logp), True, 9, logp, [True] * n, [-1.0] * n, [0.5] * n)
        for index, logp in enumerate(logps)
    ]


def gates(name: str, *values: float) -> list[GateRecord]:
    """Two blocks: 4 has the value, 5 one minus half of it."""
    return [GateRecord(name, index, {4: value, 5: 1 - value / 2}) for index, value in enumerate(values)]


def test_the_table_on_disk_keeps_float32_exactly(tmp_path: Path) -> None:
    exact = torch.randn(50, generator=torch.Generator().manual_seed(0)).tolist()
    strange = 'line\u2028separators \x85 and "quotes" \n and 東京'
    table = Table(scores(exact), [answer(strange, None)], gates("forget", *torch.rand(3).tolist()))
    table.write(tmp_path)
    back = Table.read(tmp_path)
    assert torch.equal(torch.tensor(back.scores[0].logp), torch.tensor(exact))
    assert back.generations == table.generations
    assert [record.gates.keys() for record in back.gates] == [record.gates.keys() for record in table.gates]


def test_a_damaged_or_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="scores.jsonl"):
        Table.read(tmp_path)
    Table(scores([-1.0], [-2.0]), [answer("x")], []).write(tmp_path)
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write('{"set": "forget"\n')
    with pytest.raises(RunError, match="scores.jsonl, line 3") as error:
        Table.read(tmp_path)
    assert "\n" not in str(error.value)


# -- metrics ----------------------------------------------------------------------------------------------------------


def compute(name: str, table: Table, of: str = "forget") -> float | None:
    return METRICS.get(name).compute(table, of)


def test_probability_is_the_mean_over_rows_of_the_geometric_mean_over_tokens() -> None:
    table = Table(scores([math.log(0.5), math.log(0.125)], [math.log(0.75)]))
    assert compute("probability", table) == pytest.approx((0.25 + 0.75) / 2)
    assert compute("probability", table, "retain") is None


def test_rouge_l_is_the_recall_of_the_stemmed_longest_common_subsequence() -> None:
    # "cats sitting" stems to "cat sit": 2 of the reference's 4 words stand in the answer in the same order
    table = Table(generations=[answer("Cats sitting on a roof", reference="the cat sits outside")])
    assert compute("rouge_l", table) == pytest.approx(2 / 4)
    table.generations.append(answer("", reference="the cat"))
    assert compute("rouge_l", table) == pytest.approx(1 / 4)


def test_fact_recall_ignores_case_and_white_space_and_needs_every_fact() -> None:
    table = Table(generations=[answer("born in  new\nYORK.", "New York"), answer("in Paris", "London")])
    assert compute("fact_recall", table) == pytest.approx(0.5)
    table.generations.append(answer("x", None))
    assert compute("fact_recall", table) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", True), (" \n", True), ("a a a", False), ("a a a a", True), ("b a a a a b", True), ("a b a b a b a b", False)],
)
def test_degenerate_is_empty_or_one_word_more_than_three_times_running(text: str, expected: bool) -> None:
    assert is_degenerate(text) is expected
    assert compute("degenerate", Table(generations=[answer(text)])) == float(expected)


def test_auc_equals_brute_force_over_all_pairs_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        positives = torch.randint(0, 5, (7,), generator=generator).tolist()
        negatives = torch.randint(0, 5, (11,), generator=generator).tolist()
        pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in itertools.product(positives, negatives)]
        assert auc(positives, negatives) == pytest.approx(sum(pairs) / len(pairs))
    assert auc([], [1.0]) is None
    assert auc([0.3, 0.3], [0.3]) == 0.5


def test_the_gate_table_by_block_and_over_blocks() -> None:
    table = Table(gates=gates("forget", 1.0, 0.8) + gates("retain", 0.0, 0.9) + gates("heldout", 0.2))
    found = gate_table(table)
    assert set(found["blocks"]) == {"4", "5"}
    block = found["blocks"]["4"]
    assert block["mean"] == pytest.approx({"forget": 0.9, "retain": 0.45, "heldout": 0.2})
    assert block["auc_heldout"] == 1.0
    assert block["auc_retain"] == pytest.approx(3 / 4)
    assert block["false_positive_rate"] == pytest.approx(1 / 3)
    assert block["open"] == {"forget": 1.0, "retain": 0.5, "heldout": 0.0}
    assert found["blocks"]["5"]["auc_heldout"] == 0.0
    # over blocks (v + 1 - v / 2) / 2: forget 0.75, 0.7; retain 0.5, 0.725; held-out 0.55; exactly 0.5 is not open
    assert found["mean"]["forget"] == pytest.approx(0.725)
    assert found["auc_retain"] == pytest.approx(3 / 4)
    assert found["false_positive_rate"] == pytest.approx(2 / 3)
    assert gate_table(Table()) == {}


def test_what_cannot_be_computed_is_left_out() -> None:
    measured = measure(Table(scores([-1.0, -2.0]), [answer("x", None)]))
    memorization = {"extraction_strength", "exact_memorization"}
    assert set(measured["sets"]["forget"]) == {"rouge_l", "probability", "degenerate", *memorization}
    assert "gate" not in measured
    assert measured["counts"] == {"forget": {"rows": 1, "answer_tokens": 2}}


def test_every_metric_says_its_range_and_which_way_is_good() -> None:
    assert {"rouge_l", "fact_recall", "probability", "degenerate", "gate_auc"} <= set(METRICS.names())
    for entry in METRICS:
        metric = METRICS.get(entry.name)
        assert metric.label and metric.help and "good" in metric.good
        assert entry.description.endswith(f"; {metric.range}, {metric.good}")


# -- the whole evaluation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.random_model(tmp_path_factory.mktemp("taught"))


def data(**options: object) -> DataConfig:
    return DataConfig(demo=demo.SIZES, **options)  # type: ignore[arg-type]


def settings(taught: Path, *, adapter: bool = False, **options: object) -> EvaluateConfig:
    options.setdefault("data", data(limit=3))
    return EvaluateConfig(
        model=ModelConfig(path=str(taught / "model"), device="cpu"),
        adapter=str(taught / "adapter") if adapter else None,
        max_new_tokens=4,
        **options,  # type: ignore[arg-type]
    )


def test_evaluating_a_base_model_writes_whole_results(taught: Path, tmp_path: Path) -> None:
    result = evaluate(settings(taught), tmp_path / "before")
    assert sorted(path.name for path in (tmp_path / "before").iterdir()) == [
        "evaluation.json",
        "gates.jsonl",
        "generations.jsonl",
        "scores.jsonl",
    ]
    assert json.loads((tmp_path / "before" / "evaluation.json").read_text()) == result
    assert list(result["sets"]) == ["forget", "forget_paraphrase", "retain", "heldout", "unknown"]
    answers = {"rouge_l", "fact_recall", "degenerate"}
    for metrics in result["sets"].values():
        assert answers | {"probability", "extraction_strength", "exact_memorization"} <= set(metrics)
    truth = {"truth_ratio", "truth_ratio_arithmetic", "truth_ratio_grun_paper", "probability_normalized"}
    assert truth <= set(result["sets"]["forget"]) and truth <= set(result["sets"]["retain"])
    assert "gate" not in result
    # metrics need the table alone (1e-7: it holds nine digits)
    again = measure(Table.read(tmp_path / "before"))
    assert again["sets"]["forget"] == pytest.approx(result["sets"]["forget"], abs=1e-7)
    assert result["counts"]["forget"]["rows"] == 3


def test_evaluating_an_adapter_adds_gates(taught: Path, tmp_path: Path) -> None:
    result = evaluate(settings(taught, adapter=True), tmp_path / "gd")
    assert set(result["gate"]["blocks"]) == {"0", "1"}
    assert 0 <= result["gate"]["auc_heldout"] <= 1
    assert set(result["gate"]["mean"]) == set(result["sets"])


def test_the_batch_size_changes_no_result(taught: Path, tmp_path: Path) -> None:
    one = evaluate(settings(taught, adapter=True, batch_size=1), tmp_path / "one")
    many = evaluate(settings(taught, adapter=True, batch_size=8), tmp_path / "many")
    assert one["key"] == many["key"]
    for name, metrics in one["sets"].items():
        assert metrics == pytest.approx(many["sets"][name], abs=1e-6)  # a few float32 roundings
    assert (tmp_path / "one" / "generations.jsonl").read_text() == (tmp_path / "many" / "generations.jsonl").read_text()


def test_a_finished_evaluation_is_reused_and_another_is_not_overwritten(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluate(settings(taught), tmp_path / "out")
    stamp = (tmp_path / "out" / "scores.jsonl").stat().st_mtime_ns
    assert evaluate(settings(taught), tmp_path / "out") == first
    assert (tmp_path / "out" / "scores.jsonl").stat().st_mtime_ns == stamp
    assert "already evaluated" in capsys.readouterr().err
    with pytest.raises(RunError, match="overwrite=true") as error:
        evaluate(settings(taught, adapter=True), tmp_path / "out")
    assert "\n" not in str(error.value)
    replaced = evaluate(settings(taught, adapter=True, overwrite=True), tmp_path / "out")
    assert replaced["key"] != first["key"]


def test_a_folder_of_something_else_is_not_replaced(taught: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="holds no evaluation.json"):
        evaluate(settings(taught), tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_wrong_options_are_named(taught: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'forget'"):
        evaluate(settings(taught, sets=["forgot"]), tmp_path / "out")
    with pytest.raises(ConfigError, match="batch_size=0 must be greater than 0"):
        evaluate(settings(taught, batch_size=0), tmp_path / "out")
    with pytest.raises(ConfigError, match="gate_threshold needs an adapter"):
        evaluate(settings(taught, gate_threshold=0.5), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gate_threshold_of_one_gives_the_base_answers(taught: Path, tmp_path: Path) -> None:
    base = evaluate(settings(taught, sets=["forget"]), tmp_path / "base")
    shut = evaluate(settings(taught, adapter=True, sets=["forget"], gate_threshold=1.0), tmp_path / "shut")
    for name, metrics in base["sets"].items():
        assert shut["sets"][name] == pytest.approx(metrics, abs=1e-6)  # passes are split at other blocks
    assert (tmp_path / "shut" / "generations.jsonl").read_text() == (
        tmp_path / "base" / "generations.jsonl"
    ).read_text()
