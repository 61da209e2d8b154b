"""The evaluation command as a whole: what is scored, adapters of every kind, quantized bases, resuming."""

from __future__ import annotations

import builtins
import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from transformers import AutoModelForCausalLM

from grun.config.options import DataConfig, EvaluateConfig, ModelConfig
from grun.data.corpus import load_corpus
from grun.data.encoding import EncodedRow
from grun.errors import ConfigError, DataError, RunError
from grun.evaluation.evaluate import evaluate
from grun.evaluation.journal import Journal
from grun.evaluation.measure import measure
from grun.evaluation.scoring import ScoredRow, score
from grun.evaluation.table import Table
from grun.loading.checks import check
from grun.method.model import GrunModel


def settings(taught: Path, adapter: str | None = None, **options: Any) -> EvaluateConfig:
    own = {"data": DataConfig(demo=demo.SIZES, limit=3), "sets": ["forget", "retain"], "max_new_tokens": 4}
    return demo.evaluation(taught, adapter, **{**own, **options})


def by_place(table: Table) -> dict[tuple[str, int, str, int], list[float]]:
    return {(row.set, row.index, row.kind, row.variant): row.logp for row in table.scores}


# -- results, found again or refused ----------------------------------------------------------------------------------


def test_evaluating_a_base_model_writes_whole_results(taught: Path, tmp_path: Path) -> None:
    result = evaluate(settings(taught, sets=[]), tmp_path / "before")
    files = {"evaluation.json", "gates.jsonl", "generations.jsonl", "scores.jsonl"}
    assert {path.name for path in (tmp_path / "before").iterdir()} == files
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


def test_a_finished_evaluation_is_reused_and_another_is_not_overwritten(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluate(settings(taught), tmp_path / "out")
    stamp = (tmp_path / "out" / "scores.jsonl").stat().st_mtime_ns
    assert evaluate(settings(taught), tmp_path / "out") == first
    assert (tmp_path / "out" / "scores.jsonl").stat().st_mtime_ns == stamp
    assert "already evaluated" in capsys.readouterr().err
    with pytest.raises(RunError, match="overwrite=true") as error:
        evaluate(settings(taught, "adapter"), tmp_path / "out")
    assert "\n" not in str(error.value)
    replaced = evaluate(settings(taught, "adapter", overwrite=True), tmp_path / "out")
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
    assert not (tmp_path / "out").exists()


# -- what is scored ---------------------------------------------------------------------------------------------------


def test_answers_paraphrases_and_wrong_answers_are_scored_each_as_its_own_text(taught: Path, tmp_path: Path) -> None:
    """Against a forward pass by hand of the prompt and that very text."""
    from transformers import AutoTokenizer

    config = settings(taught, sets=["forget", "forget_paraphrase"])
    evaluate(config, tmp_path / "out")
    table = Table.read(tmp_path / "out")
    assert {row.kind for row in table.scores if row.set == "forget_paraphrase"} == {"answer"}
    assert all(row.ended for row in table.scores) and len(table.generations) == 6
    found = by_place(table)
    tokenizer = AutoTokenizer.from_pretrained(taught / "model")
    model = AutoModelForCausalLM.from_pretrained(taught / "model").eval()
    row = load_corpus(config.data).forget[0]
    texts = [("answer", 0, row.completion), ("paraphrase", 0, row.extra["paraphrased_answer"])]
    texts += [("perturbed", number, text) for number, text in enumerate(row.extra["perturbed_answer"])]
    assert {place[2:] for place in found if place[:2] == ("forget", 0)} == {text[:2] for text in texts}
    for kind, variant, text in texts:
        prompt = tokenizer(f"<|user|>{row.prompt}<|answer|>").input_ids
        ids = torch.tensor([[*prompt, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        # 1e-5: batches of other lengths add in another order in float32
        assert found["forget", 0, kind, variant] == pytest.approx(logp.tolist(), abs=1e-5)


def test_single_continuations_can_be_chosen(taught: Path, tmp_path: Path) -> None:
    result = evaluate(settings(taught, continuations=["answer"]), tmp_path / "out")
    assert {row.kind for row in Table.read(tmp_path / "out").scores} == {"answer"}
    assert "truth_ratio" not in result["sets"]["forget"]
    with pytest.raises(ConfigError, match="add paraphrase"):
        check(settings(taught, continuations=["answer", "perturbed"]))


def test_rows_without_wrong_answers_are_named_and_give_no_truth_ratio(
    taught: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": f"Who is {n}?", "answer": f"It is {n}.", "perturbed_answer": ["No."]} for n in range(4)]
    del rows[2]["perturbed_answer"]
    for name, chosen in (("forget", rows[:3]), ("retain", rows[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    data = DataConfig(name="jsonl", path=str(tmp_path), forget="forget.jsonl", retain="retain.jsonl")
    result = evaluate(settings(taught, data=data), tmp_path / "out")
    assert "forget: 1 of 3 rows (the first is row 3) have no perturbed_answer" in caplog.text
    assert "truth_ratio" not in result["sets"]["forget"] and "truth_ratio" in result["sets"]["retain"]
    (tmp_path / "forget.jsonl").write_text(json.dumps(rows[0] | {"perturbed_answer": "No."}) + "\n")
    with pytest.raises(DataError, match="forget.jsonl line 1: field 'perturbed_answer' must be a list"):
        evaluate(settings(taught, data=data), tmp_path / "other")


# -- kinds of models --------------------------------------------------------------------------------------------------


def test_a_lora_folder_is_scored_with_its_lora(taught: Path, tmp_path: Path) -> None:
    """That PEFT computes the same with it: tests/baselines/test_lora.py."""
    demo.save_lora(taught / "model", tmp_path / "lora")
    result = evaluate(settings(taught, str(tmp_path / "lora")), tmp_path / "a")
    evaluate(settings(taught), tmp_path / "base")
    lora, base = (by_place(Table.read(tmp_path / name)) for name in ("a", "base"))
    assert max(abs(x - y) for place in lora for x, y in zip(lora[place], base[place], strict=True)) > 0.05
    assert result["identity"]["adapter"] and "gate" not in result
    with pytest.raises(ConfigError, match="type LORA, which has no gates"):
        evaluate(settings(taught, str(tmp_path / "lora"), gate_threshold=0.5), tmp_path / "c")


@pytest.mark.parametrize("kind", ["8bit", "4bit", "fp4"])
def test_quantized_bases_are_evaluated_with_and_without_an_adapter(taught: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    plain = evaluate(settings(taught, "adapter"), tmp_path / "plain")
    model = ModelConfig(path=str(taught / "model"), device="cpu", dtype="float32", quantization=kind)
    result = evaluate(settings(taught, "adapter", model=model), tmp_path / "adapter")
    base = evaluate(settings(taught, model=model), tmp_path / "base")
    assert result["identity"]["quantization"] == kind and result["key"] != plain["key"]
    assert base["identity"]["base"] == result["identity"]["base"] != plain["identity"]["base"]
    quantized, exact = by_place(Table.read(tmp_path / "adapter")), by_place(Table.read(tmp_path / "plain"))
    differences = [abs(x - y) for place in exact for x, y in zip(exact[place], quantized[place], strict=True)]
    assert 0 < max(differences) < 1.5  # the weights are rounded, the model is still the same one
    assert "gate" in result


# -- which result belongs to which model ------------------------------------------------------------------------------


def test_a_result_of_another_model_under_the_same_name_is_never_returned(taught: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(taught / "model", folder)
    config = settings(taught, model=ModelConfig(path=str(folder), device="cpu"))
    first = evaluate(config, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3)
    model.save_pretrained(folder)
    with pytest.raises(RunError, match="holds another evaluation .identity.base: .*overwrite=true"):
        evaluate(config, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == first
    second = evaluate(replace(config, overwrite=True), tmp_path / "out")
    assert second["sets"] != first["sets"] and second["identity"]["base"] != first["identity"]["base"]


def test_a_changed_adapter_quirk_or_code_is_another_evaluation(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(taught, str(tmp_path / "adapter"))
    for evaluated in (False, True):
        model = AutoModelForCausalLM.from_pretrained(taught / "model")
        GrunModel.wrap(model, blocks=[1], rank=2).save_pretrained(tmp_path / "adapter")
        if not evaluated:
            assert evaluate(config, tmp_path / "out")["settings"]["quirks"] == []
    with pytest.raises(RunError, match="identity.adapter"):
        evaluate(config, tmp_path / "out")
    evaluate(replace(config, overwrite=True), tmp_path / "out")
    with pytest.raises(RunError, match="settings.quirks"):
        evaluate(replace(config, quirks=["extraction_strength_floor"]), tmp_path / "out")
    monkeypatch.setattr("grun.evaluation.plan.code_hash", lambda: "changed")
    with pytest.raises(RunError, match="identity.code"):
        evaluate(config, tmp_path / "out")


def test_metrics_against_a_reference_need_the_tables_alone(taught: Path, tmp_path: Path) -> None:
    evaluate(settings(taught), tmp_path / "reference")
    evaluate(settings(taught, "adapter"), tmp_path / "out")
    stamp = (tmp_path / "out" / "scores.jsonl").stat().st_mtime_ns
    result = evaluate(settings(taught, "adapter", reference=str(tmp_path / "reference")), tmp_path / "out")
    assert (tmp_path / "out" / "scores.jsonl").stat().st_mtime_ns == stamp
    assert 0 < result["reference"]["forget_quality"] <= 1
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == result
    own = evaluate(settings(taught, reference=str(tmp_path / "reference")), tmp_path / "reference")
    assert own["reference"]["forget_quality"] == 1.0 and own["reference"]["forget_quality_log10"] == 0.0
    with pytest.raises(RunError, match="no evaluation there"):
        evaluate(settings(taught, reference=str(tmp_path / "nothing")), tmp_path / "other")


@pytest.mark.parametrize("damage", ["", "5\n", '{"set": '])
@pytest.mark.parametrize("name", ["scores.jsonl", "generations.jsonl"])
def test_a_table_that_is_damaged_or_lacks_rows_is_evaluated_again(
    name: str, damage: str, taught: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(taught, batch_size=16)
    whole = evaluate(config, tmp_path / "out")
    path = tmp_path / "out" / name
    content = path.read_text()
    path.write_text("".join([damage, *content.splitlines(keepends=True)[1:]]))
    again = evaluate(config, tmp_path / "out")
    assert {**again, "seconds": 0} == {**whole, "seconds": 0} and path.read_text() == content
    assert "is evaluated again" in caplog.text


# -- published settings -----------------------------------------------------------------------------------------------


def test_tokens_like_padding_are_masked_only_under_the_quirk(taught: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(taught / "model", dtype=torch.float64).eval()
    row = EncodedRow((7, 9, 11, 9, 13), (20, 21, 9))
    ids = torch.tensor([row.prompt_ids + row.answer_ids])
    for masked_id, mask in ((None, torch.ones_like(ids)), (9, (ids != 9).long())):
        with torch.no_grad():
            logp = model(ids, attention_mask=mask).logits.log_softmax(-1)[0, 4:7].gather(1, ids[0, 5:, None])[:, 0]
        (found,) = score(model, [row], 1, 0, masked_id=masked_id)
        assert found.logp == pytest.approx(logp.tolist(), abs=1e-12)
    assert score(model, [row], 1, 0)[0].logp[0] != pytest.approx(score(model, [row], 1, 0, masked_id=9)[0].logp[0])


def test_compat_sets_the_published_settings_and_can_be_overruled() -> None:
    from grun.loading.resolve import resolve

    config = resolve("evaluate", ["profile=llama3.1", "compat=open-unlearning", "data.date=1 Jan 2026"])
    assert config.max_new_tokens == 200 and config.data.template == "chat" and config.data.date == "1 Jan 2026"
    assert config.data.system_prompt == "You are a helpful assistant."
    assert resolve("evaluate", ["profile=llama3.1"]).data.system_prompt is None


# -- cut off and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", range(3))
@pytest.mark.parametrize("damage", ["cut off", "changed", "5", "without digest", "binary"])
def test_a_damaged_line_of_a_journal_is_dropped_said_and_written_again(
    damage: str, line: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def journal() -> Journal[list[int]]:
        return Journal(tmp_path, "j", list)

    results = {0: [10], 1: [11], 2: [12]}
    with journal() as first:
        for number, result in results.items():
            first.add([number], [result])
    lines = (tmp_path / "j.jsonl").read_bytes().splitlines(keepends=True)
    lines[line] = {
        "cut off": lines[line][:-3],
        "changed": lines[line].replace(b"[1", b"[9"),  # a wrong result, if it were taken
        "5": b"5\n",
        "without digest": lines[line].partition(b" ")[2],
        "binary": b"\xff\0\n",
    }[damage]
    (tmp_path / "j.jsonl").write_bytes(b"".join(lines))
    lost = {line, min(line + 1, 2)} if damage == "cut off" else {line}  # its end was that of the line
    with journal() as again:
        assert again.known == {number: result for number, result in results.items() if number not in lost}
        for number in lost:
            again.add([number], [results[number]])
    silent = damage == "cut off" and line == 2
    assert len(caplog.records) == (0 if silent else 1)
    assert silent or "1 of its lines are damaged" in caplog.text
    assert journal().known == results
    assert len((tmp_path / "j.jsonl").read_bytes().splitlines()) == 3


def test_a_scored_row_survives_the_journal() -> None:
    row = ScoredRow([0.1, -2.5e-9], [True, False], [-1.0, -2.0], [0.5, 0.25], {3: 0.75})
    assert ScoredRow.from_json(json.loads(json.dumps(list(row)))) == row
    assert ScoredRow.from_json(json.loads(json.dumps(list(row._replace(gates=None))))) == row._replace(gates=None)


def test_a_full_disk_while_scoring_is_one_line_and_loses_nothing(taught: Path, tmp_path: Path) -> None:
    config = settings(taught, batch_size=4)

    class Full:
        """A file that takes two lines and then has no space left."""

        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 2

        def write(self, data: bytes) -> None:
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.left -= 1
            self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    real = builtins.open

    def small_disk(path: Any, *args: Any, **kwargs: Any) -> Any:
        file = real(path, *args, **kwargs)
        return Full(file) if str(path).endswith("scores.jsonl") and "unfinished" in str(path) else file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", small_disk)
        with pytest.raises(RunError, match="No space left on device.*run the same command again") as error:
            evaluate(config, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "evaluation.json").exists()
    evaluate(config, tmp_path / "out")
    evaluate(config, tmp_path / "whole")
    assert (tmp_path / "out" / "scores.jsonl").read_bytes() == (tmp_path / "whole" / "scores.jsonl").read_bytes()
