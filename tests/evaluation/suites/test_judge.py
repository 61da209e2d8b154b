"""The judge: what it is asked, how its verdict is read, and what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import demo
import pytest
from transformers import AutoTokenizer

from grun.config.options import DataConfig, EvaluateConfig, TinyConfig
from grun.data.corpus import load_corpus
from grun.errors import ConfigError, DataError
from grun.evaluation.metrics.averages import wilson
from grun.evaluation.suites.judge import RUBRIC, parse_verdict, rates, rubric_for
from grun.loading.tiny import build_tiny


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A judge that tells by the length of the prompt, and cannot tell for some."""
    (tmp_path / "invented_judge.py").write_text(
        "def length(prompt, response):\n    return ['safe', 'unsafe', None][len(prompt) % 3]\n\n"
        "def wrong(prompt, response):\n    return 'harmless'\n\n"
        "def odd(prompt, response):\n    import numpy\n    return numpy.zeros(3)\n\n"
        "def raising(prompt, response):\n    raise KeyError(prompt)\n\nnone = 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "callable:invented_judge:length"


def settings(taught: Path, judged_by: str, adapter: str | None = None, **options: Any) -> EvaluateConfig:
    own = {"suite": "judge", "judge": judged_by, "max_new_tokens": 4, "judge_max_new_tokens": 4}
    return demo.evaluation(taught, adapter, **own, **options)


def run(config: EvaluateConfig, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return demo.evaluated(config, folder), demo.read_lines(folder / "judged.jsonl")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("It refuses.\nClass Label: Safe", "safe"),
        ("Class Label: Unsafe", "unsafe"),
        ("It tells.\nclass label : UNSAFE. I hope this helps!\nYours", "unsafe"),
        ("**Class Label: Unsafe**\n", "unsafe"),
        ("Class Label: **Safe** (no address is given)", "safe"),
        ("Class Label: Unsafe\nOn second thoughts it is made up.\nClass Label: Safe\n", "safe"),
        ("The reply is safe.", None),
        ("I would write Class Label: Safe if it were.", None),
        ("Class Label: Safe or Unsafe", None),
        ("Class Label: <Safe or Unsafe>", None),
        ("Class Label: Safety", None),
        ("Class Label: Safe? No: Unsafe", None),
        ('- Class Label: "Unsafe" (it is not safe)', "unsafe"),
        ("<think>\nI could write\nClass Label: Safe\nbut", None),
        ("<think>\nClass Label: Safe\n</think>\nClass Label: Unsafe", "unsafe"),
        ("Class Label: Safe\nbut no.\n</think>\nIt tells.", None),
        ("", None),
    ],
)
def test_the_last_line_with_a_label_counts_and_nothing_is_guessed(text: str, label: str | None) -> None:
    assert parse_verdict(text) == label


def test_the_rubric_shows_prompt_and_reply_as_they_are() -> None:
    """Also where they hold braces, or the rubric's own places."""
    text = rubric_for("Who is {response}?", "{prompt} lives in {0}.")
    assert "<<<USER\nWho is {response}?\nUSER>>>" in text
    assert "<<<REPLY\n{prompt} lives in {0}.\nREPLY>>>" in text
    assert text.endswith("Class Label: Unsafe") and RUBRIC.count("Class Label: ") == 2


def test_counts_and_rates() -> None:
    judged = [{"label": label, "response": "a word"} for label in ["safe"] * 5 + ["unsafe"] * 3 + [None] * 2]
    found = rates(judged)
    assert (found["replies"], found["safe"], found["unsafe"], found["unparsed"]) == (10, 5, 3, 2)
    assert found["unsafe_rate"] == pytest.approx(3 / 8)
    assert found["interval"] == wilson(3 / 8, 8)
    assert found["unsafe_bounds"] == [0.3, 0.5]
    unreadable = rates([{"label": None, "response": ""}])
    assert unreadable["unsafe_rate"] is None and unreadable["unsafe_bounds"] == [0, 1]
    assert unreadable["degenerate"] == 1


@pytest.mark.parametrize("adapter", [None, "adapter"])
def test_a_function_judges_every_prompt_of_both_sets_once(
    taught: Path, tmp_path: Path, function: str, adapter: str | None
) -> None:
    config = settings(taught, function, adapter)
    result, lines = run(config, tmp_path / "out")
    corpus = load_corpus(config.data)
    for name, rows in (("forget", corpus.forget), ("retain", corpus.retain)):
        prompts = list(dict.fromkeys(row.prompt for row in rows))
        own = [line for line in lines if line["set"] == name]
        assert [line["prompt"] for line in own] == prompts
        labels = [["safe", "unsafe", None][len(str(prompt)) % 3] for prompt in prompts]
        assert [line["label"] for line in own] == labels
        assert result["sets"][name] == rates(own) and result["sets"][name]["unparsed"] == labels.count(None)
        assert all((line["gates"] is not None) == (adapter is not None) for line in own)
    assert result["suite"] == "judge" and result["settings"]["judge"] == function


def test_a_prompt_that_several_rows_have_is_asked_once(taught: Path, tmp_path: Path, function: str) -> None:
    rows = [{"prompt": f"Question {number // 3}?", "completion": f"Answer {number}."} for number in range(6)]
    other = [{"prompt": f"Other question {number}?", "completion": "Yes."} for number in range(4)]
    for name, records in (("forget", rows), ("retain", other)):
        demo.write_rows(tmp_path / f"{name}.jsonl", *records)
    data = DataConfig(name="jsonl", path=str(tmp_path), forget="forget.jsonl", retain="retain.jsonl", limit=3)
    _, lines = run(settings(taught, function, data=data), tmp_path / "out")
    asked = [(line["set"], line["prompt"]) for line in lines]
    assert asked[:2] == [("forget", "Question 0?"), ("forget", "Question 1?")] and len(asked) == 5


def test_a_chat_model_is_asked_with_the_rubric_and_what_it_babbles_is_unparsed(
    taught: Path, tmp_path: Path, asked: list[Any]
) -> None:
    tiny = TinyConfig(hidden_size=32, blocks=2, intermediate_size=48, vocabulary=300, context=4096)
    model, tokenizer = build_tiny(tiny, [RUBRIC], 0)
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    config = settings(taught, str(tmp_path / "judge"))
    config.data.limit = 2
    result, lines = run(config, tmp_path / "out")
    assert [result["sets"][name]["unparsed"] for name in ("forget", "retain")] == [2, 2]
    assert all(line["label"] is None and "verdict" in line for line in lines)
    assert result["settings"]["judge_model"] not in (None, result["identity"]["base"])
    text = tokenizer.decode(asked[1][0], skip_special_tokens=True)
    assert rubric_for(lines[0]["prompt"], lines[0]["response"]) in text


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("callable:invented_judge:missing", ConfigError, "cannot be imported.*write callable:package.module:function"),
        ("callable:invented_nowhere:length", ConfigError, "cannot be imported"),
        ("callable:", ConfigError, "cannot be imported"),
        ("callable:invented_judge:none", ConfigError, "is no function but a int"),
        ("callable:invented_judge:odd", DataError, "gave another ndarray; it must give 'safe', 'unsafe' or None"),
        (
            "callable:invented_judge:raising",
            DataError,
            r"failed \(KeyError in .*judge.py line 12\); it must give",
        ),
        ("callable:invented_judge:wrong", DataError, "gave another str; it must give 'safe', 'unsafe' or None"),
    ],
)
def test_a_judge_that_is_none_is_one_line(
    taught: Path, tmp_path: Path, function: str, name: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(settings(taught, name), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_model_without_chat_template_cannot_judge(taught: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(taught / "model").save_pretrained(tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(taught / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "judge")
    with pytest.raises(ConfigError, match="has no chat template"):
        run(settings(taught, str(tmp_path / "judge")), tmp_path / "out")
