"""lm-evaluation-harness through our scorer: the same numbers, choice by choice, whatever lies on the model."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from chat_model import save_chat_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun.cli import main
from grun.config.options import DataConfig, EvaluateConfig, ModelConfig
from grun.data.choices import ChoiceRow
from grun.data.encoding import EncodedRow
from grun.data.rows import Row
from grun.data.templates import Template
from grun.data.templates import store as store_template
from grun.errors import ConfigError
from grun.evaluation.multiple_choice import score_choices
from grun.evaluation.scoring import score
from grun.loading.changed_tensors import save_changed
from grun.method.fingerprint import fingerprint
from grun.method.model import GrunModel
from grun.requests.store import RequestStore

pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

ROWS = [
    ChoiceRow(
        f"Which stone is number {number}?", tuple(f"stone {number + place}" for place in range(4)), number % 4, "m"
    )
    for number in range(9)
]
CHOICES = """
task: invented_minerals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about m.\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\n{options}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
{more}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
OPTIONS = r"\n".join(f"{letter}. {{{{choices[{place}]}}}}" for place, letter in enumerate("ABCD"))
ROLLING = """
task: invented_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
GENERATED = """
task: invented_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "a stone"
generation_kwargs: {{until: ["\\n\\n\\n"], max_gen_toks: 5}}
metric_list: [{{metric: exact_match}}]
"""
TEXTS = ["One line of text, and more of it.", "word " * 300]
"""The second is longer than the model's context."""


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, an adapter whose gates are open, and tasks of our own."""
    folder = demo.random_model(tmp_path_factory.mktemp("taught"))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    GrunModel.wrap(model, blocks=[0, 1], rank=8, gate_bias=20.0).save_pretrained(folder / "open")
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [{"question": row.question, "choices": row.choices, "answer": row.answer} for row in ROWS]
    demo.write_rows(tasks / "rows.jsonl", *rows)
    demo.write_rows(tasks / "texts.jsonl", *({"text": text} for text in TEXTS))
    (tasks / "choices.yaml").write_text(CHOICES.format(folder=tasks, options=OPTIONS, more=""))
    pinned = CHOICES.format(folder=tasks, options=OPTIONS, more="num_fewshot: 0").replace(
        "invented_minerals", "pinned_minerals"
    )
    (tasks / "pinned.yaml").write_text(pinned)
    (tasks / "rolling.yaml").write_text(ROLLING.format(folder=tasks))
    (tasks / "generated.yaml").write_text(GENERATED.format(folder=tasks))
    return folder


@pytest.fixture(autouse=True)
def _apart(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own tasks alone, since to read the harness' thousands takes ten seconds each time; a cache of our own."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # which runs `pip list`, for a second
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def settings(taught: Path, adapter: str | None, *tasks: str, **options: Any) -> EvaluateConfig:
    own = {"suite": "lm_eval", "task_folder": str(taught / "tasks"), "data": DataConfig(), "tasks": list(tasks)}
    return demo.evaluation(taught, adapter, **{**own, **options})


def run(taught: Path, folder: Path, adapter: str | None, *tasks: str, **options: Any) -> tuple[Any, list[Any]]:
    result = demo.evaluated(settings(taught, adapter, *tasks, **options), folder)
    return result, demo.read_lines(folder / "samples.jsonl")


def loaded(taught: Path, adapter: str | None) -> tuple[Any, Any]:
    base = AutoModelForCausalLM.from_pretrained(taught / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(taught / "model")
    return (GrunModel.from_pretrained(base, taught / adapter) if adapter else base), tokenizer


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("adapter", [None, "open"])
def test_every_choice_of_the_harness_is_our_scorers(
    taught: Path, tmp_path: Path, adapter: str | None, batch_size: int
) -> None:
    result, samples = run(taught, tmp_path / "out", adapter, "invented_minerals", batch_size=batch_size)
    expected = score_choices(*loaded(taught, adapter), ROWS)
    assert [sample["doc"] for sample in samples] == list(range(len(ROWS)))
    for sample, score_of_row in zip(samples, expected, strict=True):
        found = [logp for logp, _ in sample["responses"]]
        assert found == pytest.approx(score_of_row.logp, abs=1e-4)  # float32, batches of another length
    right = [float(one.chosen == row.answer) for one, row in zip(expected, ROWS, strict=True)]
    assert result["results"]["invented_minerals"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert result["num_fewshot"] == {"invented_minerals": 0}
    assert result["suite"] == "lm_eval" and result["lm_eval"]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == result


def test_an_open_adapter_and_a_lora_change_what_the_harness_sees(taught: Path, tmp_path: Path) -> None:
    demo.save_lora(taught / "model", taught / "lora")
    of = {}
    for adapter in (None, "open", "lora"):
        _, samples = run(taught, tmp_path / str(adapter), adapter, "invented_minerals")
        of[adapter] = [logp for sample in samples for logp, _ in sample["responses"]]
    for adapter in ("open", "lora"):
        assert max(abs(x - y) for x, y in zip(of[adapter], of[None], strict=True)) > 0.01


def test_without_an_adapter_the_harness_own_model_says_the_same(taught: Path, tmp_path: Path) -> None:
    """Long texts in windows too, which the harness cuts so that the context is full."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    result, samples = run(taught, tmp_path / "out", None, "invented_minerals", "invented_texts")
    model, tokenizer = loaded(taught, None)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=["invented_minerals", "invented_texts"],
        task_manager=TaskManager(include_path=str(taught / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    assert result["results"]["invented_texts"]["word_perplexity,none"] == pytest.approx(
        theirs["results"]["invented_texts"]["word_perplexity,none"], rel=1e-4
    )
    found = [logp for sample in samples if sample["task"] == "invented_minerals" for logp, _ in sample["responses"]]
    expected = [logp for s in theirs["samples"]["invented_minerals"] for logp, _ in s["filtered_resps"]]
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_texts_likelihood_is_edited_at_the_start_token(taught: Path, tmp_path: Path) -> None:
    _, samples = run(taught, tmp_path / "out", "open", "invented_texts")
    model, tokenizer = loaded(taught, "open")
    ids = tokenizer(TEXTS[0], add_special_tokens=False).input_ids
    # The harness puts the start token before what the tokenizer gives, which has one of its own.
    whole = [tokenizer.bos_token_id, *tokenizer(TEXTS[0]).input_ids]
    (row,) = score(model, [EncodedRow(tuple(whole[:1]), tuple(whole[1:]))], 1, 0)
    assert len(row.logp) == len(ids) + 1
    (found,) = samples[0]["responses"] if isinstance(samples[0]["responses"], list) else (samples[0]["responses"],)
    assert found == pytest.approx(sum(row.logp), abs=1e-3)


def test_generation_goes_through_the_edited_base(taught: Path, tmp_path: Path) -> None:
    _, samples = run(taught, tmp_path / "open", "open", "invented_answers", batch_size=3)
    _, without = run(taught, tmp_path / "base", None, "invented_answers", batch_size=3)
    model, tokenizer = loaded(taught, "open")
    for sample, row in zip(samples, ROWS, strict=True):
        ids = tokenizer(row.question, return_tensors="pt")
        (out,) = model.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert sample["responses"] == [tokenizer.decode(out[ids.input_ids.shape[1] :], skip_special_tokens=True)]
    assert [x["responses"] for x in samples] != [x["responses"] for x in without]


def test_a_chat_model_is_asked_in_its_chat_template_unless_another_is_named(taught: Path, tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for name, data in (("chat", DataConfig(system_prompt="Be brief.")), ("plain", DataConfig(template="text"))):
        options: dict[str, Any] = {"model": ModelConfig(path=str(folder), device="cpu"), "data": data, "batch_size": 3}
        result, samples = run(taught, tmp_path / name, None, "invented_answers", **options)
        for sample, row in zip(samples, ROWS, strict=True):
            ids = tokenizer(row.question, return_tensors="pt").input_ids
            if name == "chat":
                messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row.question}]
                ids = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                ).input_ids
            (out,) = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=2)
            assert sample["responses"] == [tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True)]
        assert (result["settings"]["template"] or {}).get("system_prompt") == data.system_prompt


def test_examples_are_refused_where_a_task_pins_none(taught: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_fewshot=3: pinned_minerals pins 0 examples") as error:
        run(taught, tmp_path / "out", None, "pinned_minerals", num_fewshot=3)
    assert "\n" not in str(error.value)
    result, _ = run(taught, tmp_path / "out", None, "pinned_minerals", num_fewshot=0)
    assert result["num_fewshot"] == {"pinned_minerals": 0}


def test_limit_and_what_is_there_already(taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"data": DataConfig(limit=3)}
    result, samples = run(taught, tmp_path / "out", None, "invented_minerals", **options)
    assert len(samples) == 3 and result["samples"]["invented_minerals"] == {"original": 9, "effective": 3}
    again, _ = run(taught, tmp_path / "out", None, "invented_minerals", **options)
    assert again == result and "already evaluated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["invented_mineral"]}, "knows no task 'invented_mineral'"),
        ({"tasks": ["invented_minerals"], "task_folder": "/nowhere/at/all"}, "no such folder"),
    ],
)
def test_unknown_tasks_and_folders_are_one_line(
    taught: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    names = options.pop("tasks")
    with pytest.raises(ConfigError, match=message) as error:
        run(taught, tmp_path / "out", None, *names, **options)
    assert "\n" not in str(error.value)


def test_a_missing_harness_says_how_to_get_it(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    with pytest.raises(ConfigError, match=r"pip install 'grun-unlearning\[harness\]'"):
        run(taught, tmp_path / "out", None, "invented_minerals")
    demo.refused(capsys, ["lm_eval", "--model", "grun"], 2, "pip install 'grun-unlearning[harness]'")


# -- the harness' own command line ------------------------------------------------------------------------------------

TASKS = ("invented_minerals", "invented_texts", "invented_answers")


def by_command(taught: Path, folder: Path, *arguments: str, tasks: str = ",".join(TASKS)) -> dict[str, list[Any]]:
    """Responses by task of `python -m grun lm_eval --model grun`."""
    where = ["--tasks", tasks, "--include_path", str(taught / "tasks"), "--output_path", str(folder), "--log_samples"]
    where += ["--device", "cpu"]
    assert main(["lm_eval", "--model", "grun", *where, *arguments]) == 0
    found = {}
    for path in folder.rglob("samples_*.jsonl"):
        lines = sorted(demo.read_lines(path), key=lambda line: line["doc_id"])
        found[path.name.removeprefix("samples_").rpartition("_")[0]] = [line["filtered_resps"] for line in lines]
    return found


def log_likelihoods(responses: list[Any]) -> list[float]:
    """Of every choice, or text; the harness writes numbers as texts."""
    rows = [row if isinstance(row, list) else [row] for row in responses]
    numbers = [float(one[0] if isinstance(one, list) else one) for row in rows for one in row]
    assert numbers
    return numbers


def make_adapter(taught: Path, folder: Path, kind: str) -> str:
    """What `adapter=`, or `store=`, is given."""
    base, _ = loaded(taught, None)
    if kind == "store":
        store = RequestStore.create(folder / "store")
        store.add("first", taught / "open", forget_rows=[Row("Who?", "Nobody.")], config={})
        return f"store={store.folder}"
    if kind == "lora":
        demo.save_lora(taught / "model", folder / "lora")
    if kind == "changed":
        name = "model.layers.0.mlp.down_proj.weight"
        tensors = {name: 3.0 * base.get_parameter(name).detach()}
        save_changed(folder / "changed", tensors, base_name=None, base_fingerprint=fingerprint(base))
    return f"adapter={taught / kind if kind == 'open' else folder / kind}"


@pytest.mark.parametrize("kind", [None, "open", "store", "lora", "changed"])
def test_the_harness_own_command_line_gives_what_our_suite_gives(
    taught: Path, tmp_path: Path, kind: str | None
) -> None:
    adapter = None if kind is None else make_adapter(taught, tmp_path, kind)
    arguments = ",".join([f"pretrained={taught / 'model'}", *filter(None, [adapter])])
    found = by_command(taught, tmp_path / "theirs", "--model_args", arguments, "--batch_size", "4")
    place = adapter and adapter.partition("=")[2]
    config = {"adapter": place, "batch_size": 4}
    result = demo.evaluated(dataclasses.replace(settings(taught, None, *TASKS), **config), tmp_path / "ours")
    ours: dict[str, list[Any]] = {}
    for line in demo.read_lines(tmp_path / "ours" / "samples.jsonl"):
        ours.setdefault(line["task"], []).append(line["responses"])
    assert found.keys() == ours.keys() == {*TASKS}
    for task in TASKS[:2]:
        # samples.jsonl has nine digits, of which the sum over a long text fills all
        assert log_likelihoods(found[task]) == pytest.approx(log_likelihoods(ours[task]), abs=1e-6, rel=1e-8)
    assert found[TASKS[2]] == ours[TASKS[2]]
    (written,) = (tmp_path / "theirs").rglob("results_*.json")
    for task, metrics in json.loads(written.read_text())["results"].items():
        own = result["results"][task]
        assert {name: metrics[name] for name in own} == pytest.approx(own, abs=1e-6)


def test_a_chat_model_is_asked_in_its_template_where_the_harness_is_told_so(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], log: pytest.LogCaptureFixture
) -> None:
    folder = save_chat_model(tmp_path / "model")
    store_template(Template("chat", "chat", system_prompt="Be brief."), folder)
    model = ModelConfig(path=str(folder), device="cpu")
    options: dict[str, Any] = {"model": model, "data": DataConfig(system_prompt="Be brief."), "batch_size": 3}
    _, ours = run(taught, tmp_path / "ours", None, "invented_answers", **options)
    arguments = ("--model_args", f"pretrained={folder}", "--batch_size", "3")
    told = by_command(taught, tmp_path / "told", *arguments, "--apply_chat_template", tasks="invented_answers")
    assert [[answer] for answer in (line["responses"][0] for line in ours)] == told["invented_answers"]
    assert "apply_chat_template" not in log.text and "takes the place" not in log.text
    _, ours = run(taught, tmp_path / "described", None, "invented_minerals", **options)
    told_so = ("--apply_chat_template", "--system_instruction", "Be brief.")
    found = by_command(taught, tmp_path / "both", *arguments, *told_so, tasks="invented_minerals")["invented_minerals"]
    assert log_likelihoods(found) == pytest.approx(log_likelihoods([line["responses"] for line in ours]), abs=1e-6)
    assert "takes the place" not in log.text
    by_command(taught, tmp_path / "lost", *arguments, "--apply_chat_template", tasks="invented_minerals")
    assert log.text.count("takes the place of the system prompt") == 1
    plain = by_command(taught, tmp_path / "plain", *arguments, tasks="invented_answers")
    assert plain != told and log.text.count("add --apply_chat_template") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (
            ["--model_args", "pretrained=MODEL,adaptor=x"],
            2,
            "unknown argument of the model grun 'adaptor': did you mean",
        ),
        (["--model_args", "pretrained=MODEL,adapter=a,store=b"], 2, "adapter and store are both given"),
        (["--model_args", "pretrained=MODEL", "--batch_size", "auto"], 2, "batch_size=auto is not known"),
        (["--model_args", "dtype=float32"], 2, "model_args name no model; give pretrained=MODEL"),
        (["--model_args", "pretrained=MODEL,adapter=/nowhere"], 1, "no adapter at '/nowhere'"),
        (["--model_args", "pretrained=/no/where"], 1, "model.path=/no/where: no such folder"),
        (
            ["--model_args", "pretrained=MODEL", "--apply_chat_template"],
            2,
            "template 'tiny', which is no chat template",
        ),
        (
            ["--model_args", "pretrained=MODEL", "--tasks", "invented_mineral"],
            1,
            "lm_eval: Tasks not found: invented_mi",
        ),
    ],
)
def test_what_is_wrong_on_the_harness_command_line_is_one_line(
    taught: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, named: str
) -> None:
    given = [argument.replace("MODEL", str(taught / "model")) for argument in arguments]
    tasks = [] if "--tasks" in given else ["--tasks", "invented_answers"]
    where = [*tasks, "--include_path", str(taught / "tasks"), "--limit", "1", "--device", "cpu"]
    assert main(["lm_eval", "--model", "grun", *where, *given]) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and named in lines[0]


def test_other_models_and_unknown_arguments_are_the_harness_own_matter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["lm_eval", "run", "--no_such_argument", "1"])
    assert ended.value.code == 2 and "lm-eval: error: unrecognized arguments: --no_such" in capsys.readouterr().err
