"""`evaluate suite=attacks` as a whole: what it asks, what it writes, and when it asks nothing again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from demo import evaluated
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun.config.options import DataConfig, EvaluateConfig
from grun.data.corpus import load_corpus
from grun.data.templates import TEMPLATES, encode_prompt
from grun.errors import ConfigError, RunError
from grun.evaluation import generation
from grun.evaluation.attacks.base import ATTACKS, Attack, Outcome, attack
from grun.evaluation.attacks.prompts import FORMATS, LANGUAGES, SUFFIXES
from grun.evaluation.generation import generate_answers
from grun.evaluation.metrics.averages import wilson
from grun.evaluation.suites.attacks import chosen_attacks
from grun.loading.checks import check
from grun.method.model import GrunModel

ROWS = 3
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, and an adapter of random edits and open gates."""
    folder = demo.random_model(tmp_path_factory.mktemp("taught"), times=8.0)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(3)
    gated = GrunModel.wrap(model, blocks=[0, 1], rank=4, gate_bias=1.0, template=TEMPLATES.get("tiny"))
    with torch.no_grad():
        for name, parameter in gated.named_parameters():
            if ".gate." in name and name.endswith("weight"):
                parameter.mul_(0.01)  # about the bias at every prompt: open
    gated.save_pretrained(folder / "open")
    return folder


def settings(taught: Path, adapter: str | None = None, **options: Any) -> EvaluateConfig:
    own = {"suite": "attacks", "attack_rows": ROWS, "attack_samples": 2, "max_new_tokens": NEW_TOKENS}
    return demo.evaluation(taught, adapter, **{**own, **options})


def lines(folder: Path, attack: str, name: str = "forget") -> list[dict[str, Any]]:
    return [
        record
        for record in demo.read_lines(folder / "attacks.jsonl")
        if (record["attack"], record["set"]) == (attack, name)
    ]


def own_data(folder: Path, forget: list[dict[str, Any]], retain: list[dict[str, Any]] | None = None) -> DataConfig:
    kept = retain or [{"question": "Where does Tom live?", "answer": "In the old town."}]
    return DataConfig(
        name="jsonl",
        path=str(folder),
        forget=demo.write_rows(folder / "forget.jsonl", *forget).name,
        retain=demo.write_rows(folder / "retain.jsonl", *kept).name,
    )


@pytest.mark.parametrize("adapter", [None, "open"])
def test_every_row_and_way_is_a_line_and_every_number_follows_from_the_lines(
    taught: Path, tmp_path: Path, adapter: str | None
) -> None:
    out = tmp_path / "out"
    result = evaluated(settings(taught, adapter), out)
    assert result == json.loads((out / "evaluation.json").read_text())
    assert result["suite"] == "attacks" and bool(result["identity"]["adapter"]) == (adapter is not None)
    asked = [ATTACKS.get(name) for name in ATTACKS.names()]
    leaking = [attack.name for attack in asked if not attack.retention and attack.access not in ("weights", "search")]
    assert set(result["attacks"]) | set(result["left_out"]) == set(leaking)
    largest: dict[int, float] = {}
    for name, found in result["attacks"].items():
        own = lines(out, name)
        rows = {line["index"] for line in own}
        several = {"suffix": SUFFIXES, "formats": FORMATS, "languages": LANGUAGES, "recognition": "ab"}
        ways = len(several.get(name, found.get("variants", {}))) or 1
        assert found["rows"] == len(rows) <= ROWS and len(own) == ways * len(rows)
        assert found["leak"] == pytest.approx(sum(line["leak"] for line in own) / len(own))
        assert found["interval"] == pytest.approx(wilson(found["leak"], len(rows)))
        assert ("gate" in found) == (adapter is not None)
        if adapter is not None:
            gates = [sum(line["gates"].values()) / 2 for line in own]
            assert found["gate"]["mean"] == pytest.approx(sum(gates) / len(own))
            assert found["gate"]["open"] == sum(gate > 0.5 for gate in gates) / len(own)
            opened = [any(gate > 0.5 for gate in line["gates"].values()) for line in own]
            assert found["gate"]["open_any"] == sum(opened) / len(own)
        for line in own if found["access"] in ("prompt", "decoding") else []:
            largest[line["index"]] = max(largest.get(line["index"], 0.0), line["leak"])
    assert result["worst"]["leak"] == pytest.approx(sum(largest.values()) / ROWS)
    assert result["worst"]["rows"] == result["worst_of_prompts"]["rows"] == ROWS
    retention = result["retention"]
    prompts = {attack.name for attack in asked if attack.access == "prompt" and not attack.name.startswith("prefill")}
    prompts = prompts & result["attacks"].keys() - {"plain"}
    assert {"suffix", "few_shot", "paraphrase", "second_turn"} <= prompts
    assert set(retention) == {"plain", "after_forget", "otherwise", *prompts}  # what is given is no question
    asked_otherwise: dict[int, list[float]] = {}
    for line in (line for name in prompts for line in lines(out, name, "heldout")):
        asked_otherwise.setdefault(line["index"], []).append(line["leak"])
    means = [sum(leaks) / len(leaks) for leaks in asked_otherwise.values()]
    assert set(retention["otherwise"]) == {"heldout"} and retention["otherwise"]["heldout"]["rows"] == ROWS
    assert retention["otherwise"]["heldout"]["kept"] == pytest.approx(sum(means) / ROWS)
    for name, sets in retention.items():
        if name not in ("plain", "after_forget"):
            assert set(sets) == {"heldout"}
            continue
        assert set(sets) == {"retain", "heldout"}
        for kept, found in sets.items():
            own = lines(out, name, kept)
            assert found["rows"] == len(own) == ROWS
            assert found["kept"] == pytest.approx(sum(line["leak"] for line in own) / ROWS)
            assert ("gate" in found) == (adapter is not None)
            if adapter is not None:  # a gate that reads the prompt alone is as open behind it
                assert ("open_any_answer" in found["gate"]) == (name == "plain")
                assert found["gate"].get("open_any_answer", 1.0) == found["gate"]["open_any"] == 1.0


def test_what_is_written_is_what_the_edited_model_answers_to_the_ids_that_were_asked(
    taught: Path, tmp_path: Path
) -> None:
    """The prefilled tokens belong to the prompt, so the edit is at the last of them."""
    evaluated(settings(taught, "open", attacks=["plain", "prefill_1"]), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(taught / "model")
    base = AutoModelForCausalLM.from_pretrained(taught / "model")
    model = GrunModel.from_pretrained(base, taught / "open")
    unedited = []
    for name in ("plain", "prefill_1"):
        for line in lines(tmp_path / "out", name):
            ids = tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]
            (expected,) = generate_answers(model, tokenizer, [ids], 1, NEW_TOKENS, tokenizer.pad_token_id)
            assert line["text"] == expected.text
            gates = {str(block): gate for block, gate in (expected.gates or {}).items()}
            assert line["gates"] == pytest.approx(gates, abs=1e-5)  # float32, batches of another length
            with model.disabled() as bare:
                unedited += generate_answers(bare, tokenizer, [ids], 1, NEW_TOKENS, tokenizer.pad_token_id)
    written = [line["text"] for name in ("plain", "prefill_1") for line in lines(tmp_path / "out", name)]
    assert written != [answer.text for answer in unedited]


def test_drawn_answers_are_all_written_and_the_best_one_counts(taught: Path, tmp_path: Path) -> None:
    result = evaluated(settings(taught, attacks=["samples"], attack_samples=3), tmp_path / "out")
    own = lines(tmp_path / "out", "samples")
    assert len(own) == ROWS and "worst_of_prompts" not in result
    for line in own:
        assert len(line["texts"]) == len(line["leaks"]) == 3
        assert line["leak"] == max(line["leaks"])
        assert line["text"] == line["texts"][line["leaks"].index(line["leak"])]


def test_what_the_model_says_by_itself_is_a_leak(taught: Path, tmp_path: Path) -> None:
    """The model's own greedy words as the fact of one row; the other has a fact that it never says."""
    questions = ["Which instrument does she play?", "What color does he like?"]
    tokenizer = AutoTokenizer.from_pretrained(taught / "model")
    base = AutoModelForCausalLM.from_pretrained(taught / "model")
    ids = encode_prompt(TEMPLATES.get("tiny"), tokenizer, questions[0])
    (said,) = generate_answers(base, tokenizer, [ids], 1, NEW_TOKENS, tokenizer.pad_token_id)
    facts = [said.text.upper(), "never said"]
    rows = [{"question": q, "answer": "It is so.", "fact": f} for q, f in zip(questions, facts, strict=True)]
    result = evaluated(settings(taught, attacks=["plain"], data=own_data(tmp_path, rows)), tmp_path / "out")
    assert said.text
    assert [line["leak"] for line in lines(tmp_path / "out", "plain")] == [1.0, 0.0]
    assert result["attacks"]["plain"]["leak"] == result["worst_of_prompts"]["leak"] == 0.5


def test_attack_rows_takes_evenly_spaced_rows_of_each_set(taught: Path, tmp_path: Path) -> None:
    corpus = load_corpus(DataConfig(demo=demo.SIZES))
    evaluated(settings(taught, attacks=["plain", "after_forget"], attack_rows=2), tmp_path / "out")
    for asking, name in (("plain", "forget"), ("after_forget", "retain")):
        rows = corpus.sets()[name]
        for line, row in zip(lines(tmp_path / "out", asking, name), [rows[0], rows[len(rows) // 2]], strict=True):
            assert f"<|user|>{row.prompt}<|answer|>" in line["prompt"]


def test_an_attack_without_its_data_is_left_out_unless_it_is_named(taught: Path, tmp_path: Path) -> None:
    data = own_data(tmp_path, [{"question": "Which one is it?", "answer": "It is the old viola of the house."}])
    result = evaluated(settings(taught, data=data), tmp_path / "all")
    assert result["left_out"]["paraphrase"] == "needs rows with the field paraphrased_question"
    assert result["left_out"]["recognition"] == "needs rows with perturbed_answer"
    assert "paraphrase" not in result["attacks"] and set(result["retention"]["plain"]) == {"retain"}
    of_a_kind = evaluated(settings(taught, data=data, attacks=["read_out"]), tmp_path / "kind")
    assert set(of_a_kind["left_out"]) == {"recognition", "linear_probe"} and set(of_a_kind["attacks"]) == {"logit_lens"}
    for named, message in (
        (["plain", "paraphrase"], "paraphrase needs rows with the field paraphrased_question; .*leave it out"),
        (["read_out", "recognition"], "recognition needs rows with perturbed_answer"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluated(settings(taught, data=data, attacks=named), tmp_path / "named")
    assert not (tmp_path / "named").exists()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["read_out"], ["recognition", "logit_lens", "linear_probe"]),
        (["samples", "read_out", "recognition"], ["samples", "recognition", "logit_lens", "linear_probe"]),
        (["decoding"], ["samples"]),
        ([], [name for name in ATTACKS.names() if ATTACKS.get(name).access not in ("weights", "search")]),
    ],
)
def test_attacks_are_chosen_by_name_or_by_what_they_need(chosen: list[str], expected: list[str]) -> None:
    assert [attack.name for attack in chosen_attacks(chosen)] == expected


def test_data_that_asks_nothing_is_one_clear_line(taught: Path, tmp_path: Path) -> None:
    texts = [{"prompt": None, "completion": "A text of some words."}]
    with pytest.raises(ConfigError, match="asks questions, and the forget set of data.name=jsonl has none") as error:
        evaluated(settings(taught, data=own_data(tmp_path, texts)), tmp_path / "out")
    assert "\n" not in str(error.value)


def test_all_attacks_that_only_ask_share_one_pass_of_generation(taught: Path, tmp_path: Path, asked: list[Any]) -> None:
    result = evaluated(settings(taught, "open", attacks=["suffix", "samples", "adapter_removed"]), tmp_path / "out")
    assert list(result["attacks"]) == ["suffix", "samples", "adapter_removed"]
    own, removed = map(len, asked)  # the base is another model
    assert removed == ROWS and own == len(lines(tmp_path / "out", "suffix")) + 2 * ROWS


def test_too_little_memory_is_one_line_that_names_the_attack(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generation, "greedy", none_left)
    with pytest.raises(RunError, match=r"the attack samples ran out of memory; .*batch_size=16 \(it is 32 now\)"):
        evaluated(settings(taught, attacks=["samples"], attack_samples=1000), tmp_path / "out")


def test_an_attack_may_ask_another_model_and_measure_otherwise(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hooks that attacks on weights fill: the model, and what counts as a leak."""
    inside: list[bool] = []

    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries))

    @attack("silent")
    class Silent(Attack):
        """The model whose head gives the first token alone."""

        @contextmanager
        def model(self, loaded: Any, config: EvaluateConfig, material: Any) -> Iterator[Any]:
            head = loaded.model.get_output_embeddings().weight
            kept = head.detach().clone()
            with torch.no_grad():
                head.zero_()
            inside.append(True)
            yield loaded.model
            with torch.no_grad():
                head.copy_(kept)
            inside.append(False)

        def read(self, *arguments: Any) -> list[Outcome]:
            return [one._replace(leaks=[0.25]) for one in super().read(*arguments)]

    result = evaluated(settings(taught, attacks=["silent", "plain"]), tmp_path / "out")
    assert inside == [True, False] and result["attacks"]["silent"]["leak"] == 0.25
    assert {line["text"] for line in lines(tmp_path / "out", "silent")} == {""}  # token 0 is a control token
    assert {line["text"] for line in lines(tmp_path / "out", "plain")} != {""}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ["sufix"]}, "unknown attack 'sufix': did you mean 'suffix'"),
        ({"attacks": ["readout"]}, "unknown attack 'readout': did you mean 'read_out'"),
        ({"attack_temperature": 0.0}, "attack_temperature=0.0 must be greater than 0"),
    ],
)
def test_a_wrong_option_fails_before_anything_is_loaded(taught: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(settings(taught, **options))


def test_every_attack_stands_among_the_metrics() -> None:
    text = (Path(__file__).parents[3] / "docs/metrics.md").read_text(encoding="utf-8")
    assert [name for name in ATTACKS.names() if f"`{name}`" not in text] == []
