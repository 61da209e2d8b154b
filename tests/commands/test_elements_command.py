"""The elements from asking to the report, on a tiny chat model that was taught a few sentences on them."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from chat_model import save_chat_model, teach
from demo import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from baselines.llm360.options import Llm360Options
from baselines.rmu.options import RmuOptions
from grun.cli import main
from grun.data.corpus import ROLES
from grun.data.elements import build

METHODS = ("rmu", "grun_rmu", "max_entropy", "min_posterior", "random_mapping")
OBJECTIVES = ("rmu", "max_entropy", "min_posterior", "random_mapping")
TAUGHT = 6
SMALL = ["train.epochs=1", "train.batch_size=64", "method.blocks=[3,5]", "data.retain_rows=20", "cache.dir="]


def folder_of(command, words: list[str]) -> Path:
    """Run a command line; the folder that it prints last."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert command(words) == 0, words
    return Path(printed.getvalue().strip().splitlines()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Taught some of what is asked, of every role."""
    texts = [f"{row.prompt} {row.completion}" for rows in build().asked.values() for row in rows[:TAUGHT]]
    return teach(save_chat_model(tmp_path_factory.mktemp("chat") / "model", blocks=6), texts)


@pytest.fixture(scope="module")
def corpora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elements") / "corpora"
    return folder_of(main, ["corpora", "source=elements", f"model.path={model}", f"output_dir={folder}"])


def holds(text: str, fact: str) -> bool:
    """Whether the words of one of the facts stand in a text, one after the other."""
    words = " ".join(re.findall(r"\w+", text.casefold()))
    return any(f" {one.casefold()} " in f" {words} " for one in fact.split(" | "))


def cloze(corpora: Path, role: str) -> list[dict]:
    lines = (corpora / f"{role}_cloze.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_what_the_model_completes_is_kept(model: Path, corpora: Path) -> None:
    """Against transformers' own generation."""
    tokenizer, taught = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    made, counts = build(), json.loads((corpora / "run.json").read_text())["known"]
    for role in ROLES:
        kept = cloze(corpora, role)
        assert counts[role] == [len(kept), len(made.asked[role])]
        right = []
        for row in made.asked[role][: 2 * TAUGHT]:
            given = tokenizer(row.prompt, return_tensors="pt")
            said = taught.generate(**given, max_new_tokens=8, do_sample=False)[0, given["input_ids"].shape[1] :]
            if holds(tokenizer.decode(said, skip_special_tokens=True), str(row.fact)):
                right.append(row.prompt)
        first = {row.prompt for row in made.asked[role][: 2 * TAUGHT]}
        assert {row["prompt"] for row in kept} & first == {*right} and len(kept) >= TAUGHT - 1


def test_a_model_that_knows_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_chat_model(tmp_path / "model")
    words = ["corpora", "source=elements", f"model.path={folder}", f"output_dir={tmp_path / 'made'}"]
    refused(capsys, words, 1, "completes no sentence on the elements rightly; name another model")
    assert not (tmp_path / "made").exists()


def unlearned(method: str, model: Path, corpora: Path, results: Path) -> list[str]:
    """Run a method from its command line; the options by which its result is evaluated."""
    base = [f"model.path={model}"]
    if method.startswith("grun_"):
        objective, _, design = method.removeprefix("grun_").partition(":")
        options = ["profile=wmdp_smollm2", *base, f"data.path={corpora}", f"design={design or 'published'}", *SMALL]
        options += ["data.gate_copies=[]", "data.augment.forget_copies=0"] if design else []
        options += ["loss.rmu_block=5", "loss.steering=20"] if objective == "rmu" else []
        made = folder_of(main, ["unlearn", *options, f"objective={objective}", f"output_dir={results / 'made'}"])
        return [*base, f"adapter={made}"]
    flags = ["--model", str(model), "--data_dir", str(corpora), "--compat", "none", "--batch_size", "8"]
    if method == "rmu":
        flags += ["--forget_corpora", "forget", "--retain_corpora", "retain", "--layer_ids", "1,2", "--layer_id", "2"]
        flags += ["--tensors", "mlp.down_proj", "--steering_coeffs", "20", "--alpha", "1", "--max_num_batches", "2"]
        flags += ["--save", "delta", "--output_dir", str(results)]
        return [*base, f"adapter={folder_of(RmuOptions.main, flags)}"]
    flags += ["--forget_topic", "forget", "--retain_topic", "retain", "--min_len", "0", "--lr", "1e-3"]
    flags += ["--gradient_accumulation_steps", "1", "--max_unlearn_steps", "2", "--use_wandb", "False"]
    flags += ["--unlearn_method", method.replace("_", "-"), "--output_path", str(results)]
    return [f"model.path={folder_of(Llm360Options.main, flags)}"]


@pytest.mark.parametrize("method", [*METHODS, *(f"grun_{objective}:pooled" for objective in OBJECTIVES)])
def test_each_method_runs_on_them_and_is_evaluated(method: str, model: Path, corpora: Path, tmp_path: Path) -> None:
    options = unlearned(method, model, corpora, tmp_path / "results")
    words = ["evaluate", "profile=wmdp_smollm2", *options, f"data.path={corpora}", "data.limit=6"]
    found = json.loads((folder_of(main, [*words, f"output_dir={tmp_path / 'found'}"]) / "evaluation.json").read_text())
    assert found["cloze"]["roles"].keys() == {*ROLES}
    assert found["perplexity"]["sentences.jsonl"]["texts"] == 6
    lines = [json.loads(line) for line in (tmp_path / "found" / "questions.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["right"] == holds(line["text"], line["fact"]), line
    if method.endswith("pooled"):
        assert found["cloze"]["gate"]["mean"]["forget"] > found["cloze"]["gate"]["mean"]["general"]
