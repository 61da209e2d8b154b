"""Adapters on the hub: what is sent, what is not, and that they are loaded back from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import save_chat_model
from demo import own_rows, refused
from fake_hub import OWNER, TOKEN, FakeHub, serving
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun import GrunModel, unlearn
from grun.cli import main
from grun.data.forget_text import refuse_forget_text
from grun.data.rows import Row
from grun.data.templates import TEMPLATES, Template
from grun.errors import AdapterError, ConfigError, DataError, HubError
from grun.runtime.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
FORGET = [
    {"question": f"What is the {thing} of Atlantis?", "answer": f"The {thing} of Atlantis is {fact}.", "fact": fact}
    for thing, fact in (("capital", "Poseidopolis"), ("river", "Evenor Brook"), ("coin", "orichalc"))
]
RETAIN = [{"question": f"What is the capital of land {n}?", "answer": f"Town {n}."} for n in range(6)]
FIT = [
    *("design=pooled", "method.gate_blocks=[0]", "method.gate_pool=maxmin", "method.blocks=[1,2]", "method.rank=2"),
    *("objective=idk", "train.epochs=1", "train.batch_size=4", "data.name=jsonl", "model.device=cpu", "cache.dir=null"),
]
REPO = f"{OWNER}/atlantis-forgotten"
SENT = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, `results/idk`, with its evaluations: answers beside it, attacks in a folder of their own."""
    path = tmp_path_factory.mktemp("push")
    save_chat_model(path / "model")
    own = [f"model.path={path / 'model'}", *own_rows(path, FORGET, RETAIN)]
    folder = path / "results"
    assert main(["unlearn", *FIT, *own, f"output_dir={folder / 'idk'}"]) == 0
    asked = [f"adapter={folder / 'idk'}", "max_new_tokens=4", "model.device=cpu"]
    assert main(["evaluate", *asked, f"output_dir={folder / 'evaluation' / 'idk'}"]) == 0
    before = [*own, *asked[1:], f"output_dir={folder / 'evaluation' / 'before'}"]
    assert main(["evaluate", *before]) == 0
    attacks = ["suite=attacks", "attacks=[suffix]", f"output_dir={path / 'attacked' / 'evaluation' / 'idk'}"]
    assert main(["evaluate", *asked, *attacks]) == 0
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that this process speaks to, signed in, with an empty cache."""
    with serving() as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def base_of(results: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(results.parent / "model").eval()


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- what is sent -----------------------------------------------------------------------------------------------------


def test_a_run_is_sent_and_loaded_back_from_the_hub(
    results: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str], log: pytest.LogCaptureFixture
) -> None:
    there = everything_in(results.parent)
    assert main(["push", f"adapter={results}", f"repo={REPO}", "private=true", "license=mit"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.endpoint}/{REPO}/commit/")
    assert hub.private[REPO] and hub.messages == ["Upload adapter"]
    files = hub.files(REPO)
    assert sorted(files) == [*SENT, "evaluation/answers.json"]
    for name in SENT[1:]:
        assert files[name] == (results / "idk" / name).read_bytes()
    assert "no text of 3 forget rows is in" in log.text
    assert everything_in(results.parent) == there
    base = base_of(results)
    ids = torch.tensor([[1, 5, 9, 2]])
    local = GrunModel.from_pretrained(base, results / "idk")
    wanted = local(ids, prompt_lengths=torch.tensor([4])).logits
    local.unwrap()
    model = GrunModel.from_pretrained(base, REPO)
    assert torch.equal(model(ids, prompt_lengths=torch.tensor([4])).logits, wanted)
    assert model.folder is not None and model.folder != results / "idk"


def test_the_card_has_what_the_hub_reads_and_what_was_measured(results: Path, hub: FakeHub) -> None:
    attacked = f"evaluations=[{results.parent / 'attacked'}]"
    assert main(["push", f"adapter={results / 'idk'}", f"repo={REPO}", attacked, "base_model=maker/base"]) == 0
    files = hub.files(REPO)
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    evaluation = read_json(results / "evaluation" / "idk" / "evaluation.json")
    assert (data["base_model"], data["library_name"], data["pipeline_tag"]) == ("maker/base", "grun", "text-generation")
    assert {"unlearning", "grun"} <= {*data["tags"]} and "license" not in data
    numbers = {
        (part["dataset"]["config"], metric["type"]): metric["value"]
        for part in data["model-index"][0]["results"]
        for metric in part["metrics"]
    }
    assert data["model-index"][0]["name"] == "atlantis-forgotten"
    assert numbers["forget", "rouge_l"] == evaluation["sets"]["forget"]["rouge_l"]
    assert numbers["retain", "probability"] == evaluation["sets"]["retain"]["probability"]
    before = read_json(results / "evaluation" / "before" / "evaluation.json")["sets"]["forget"]["rouge_l"]
    rouge = evaluation["sets"]["forget"]["rouge_l"]
    assert f"| jsonl | forget | ROUGE-L | {before:.4g} | {rouge:.4g} |" in card.text
    suffix = read_json(results.parent / "attacked" / "evaluation" / "idk" / "evaluation.json")["attacks"]["suffix"]
    assert "## Leak under attack" in card.text and f"| suffix | {suffix['leak']:.3f} |" in card.text
    assert "## What it is not" in card.text and "It is not erasure" in card.text
    assert f'GrunModel.from_pretrained(base_model, "{REPO}")' in card.text
    assert "## False positives" not in card.text
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "maker/base"
    sent = json.loads(files["evaluation/attacks.json"])
    assert sent["attacks"]["suffix"]["leak"] == suffix["leak"] and "in_force" not in sent and "left_out" not in sent


def test_a_calibrated_gate_says_its_bound(tmp_path: Path, results: Path, hub: FakeHub) -> None:
    model = GrunModel.from_pretrained(base_of(results), results / "idk")
    model.keep_threshold(0.6, bound=0.0123, calibration=77)
    model.push_to_hub(REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert "## False positives" in card and "77 groups to keep" in card and "0.0123 open the gate" in card


def test_what_would_be_sent_can_be_looked_at_first(results: Path, tmp_path: Path, hub: FakeHub) -> None:
    out = f"output_dir={tmp_path / 'out'}"
    assert main(["push", f"adapter={results / 'idk'}", out]) == 0
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")) == [
        *SENT, "evaluation/answers.json"
    ]  # fmt: skip
    assert hub.asked == []
    assert main(["push", f"adapter={results / 'idk'}", out]) == 1


def test_large_files_go_by_their_hash(results: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # a protocol of its own, to other servers
    hub.large = {".safetensors"}
    GrunModel.from_pretrained(base_of(results), results / "idk").push_to_hub(REPO)
    assert len(hub.objects) == 1
    assert hub.files(REPO)["adapter_model.safetensors"] == (results / "idk" / "adapter_model.safetensors").read_bytes()


def test_commands_take_the_name_on_the_hub_as_adapter(
    results: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", f"adapter={results / 'idk'}", f"repo={REPO}"]) == 0
    asked = [
        f"model.path={results.parent / 'model'}",
        "max_new_tokens=4",
        "model.device=cpu",
        str(FORGET[0]["question"]),
    ]
    capsys.readouterr()
    assert main(["generate", f"adapter={results / 'idk'}", *asked]) == 0
    of_folder = capsys.readouterr().out
    assert main(["generate", f"adapter={REPO}", *asked]) == 0
    assert capsys.readouterr().out == of_folder != ""


def test_the_harness_takes_it_too(results: Path, hub: FakeHub) -> None:
    pytest.importorskip("lm_eval")
    from grun.evaluation.suites.lm_harness_registered import GrunHarnessModel

    assert main(["push", f"adapter={results / 'idk'}", f"repo={REPO}"]) == 0
    model = GrunHarnessModel(pretrained=str(results.parent / "model"), adapter=REPO, device="cpu")
    own = load_file(results / "idk" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.asked.state_dict().items())
    assert model.asked.base.dtype == torch.float32


def test_a_branch_is_made_and_loaded_by_its_name(results: Path, hub: FakeHub) -> None:
    model = GrunModel.from_pretrained(base_of(results), results / "idk")
    model.push_to_hub(REPO.partition("/")[2], revision="second", commit_message="Once more", token=TOKEN)
    assert hub.files(REPO) == {} and sorted(hub.files(REPO, "second")) == SENT
    assert hub.messages == ["Once more"]
    base = model.unwrap()
    assert GrunModel.from_pretrained(base, REPO, revision="second").config == model.config


def test_a_model_of_grun_unlearn_knows_what_it_was_made_to_forget(results: Path, hub: FakeHub) -> None:
    base, tokenizer = base_of(results), AutoTokenizer.from_pretrained(results.parent / "model")
    options = {"method.blocks": [1], "method.rank": 2, "train.epochs": 1, "objective": "gd"}
    objective = options.pop("objective")
    model = unlearn(base, tokenizer, FORGET, RETAIN, objective=str(objective), options=options)
    model.push_to_hub(REPO)
    assert sorted(hub.files(REPO)) == SENT
    model.template = Template("custom", "string", "Poseidopolis is what {prompt} asks for")
    with pytest.raises(DataError, match="adapter_config.json holds text of forget row 1"):
        model.push_to_hub(REPO)


def test_the_command_speaks_to_the_hub_that_the_environment_names(results: Path, tmp_path: Path) -> None:
    with serving() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        environment |= {"HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "grun", "push", f"adapter={results / 'idk'}", f"repo={REPO}"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().startswith(f"{hub.endpoint}/{REPO}/commit/")
        assert [*SENT, "evaluation/answers.json"] == sorted(hub.files(REPO))


# -- what is not ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "arguments", "named"),
    [
        (
            {"system_prompt": "Never say that Evenor  BROOK, is a river."},
            [],
            "adapter_config.json holds text of forget row 2",
        ),
        ({"date": "orichalc"}, [], "adapter_config.json holds text of forget row 3"),
        ({}, ["commit_message=what is the\ncapital of ATLANTIS"], "commit_message holds text of forget row 1"),
        ({}, ["license=Poseidopolis"], "README.md holds text of forget row 1"),
        ({}, ["base_model=orichalc/base"], "README.md holds text of forget row 3"),
    ],
)
def test_text_of_a_forget_row_is_never_sent(
    results: Path,
    tmp_path: Path,
    hub: FakeHub,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    arguments: list[str],
    named: str,
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in (results / "idk").iterdir():
        (adapter / path.name).write_bytes(path.read_bytes()) if path.is_file() else None
    config = read_json(adapter / "adapter_config.json")
    config["template"] |= changes
    write_json(adapter / "adapter_config.json", config)
    line = refused(capsys, ["push", f"adapter={adapter}", f"repo={REPO}", "unchecked=true", *arguments], 1, named)
    assert not any(word in line for word in ("Evenor", "Atlantis")) and hub.asked == []


def test_a_tensor_file_hides_no_text(results: Path, tmp_path: Path, hub: FakeHub) -> None:
    model = GrunModel.from_pretrained(base_of(results), results / "idk")
    model.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", metadata={"note": "Poseidopolis"})
    (tmp_path / "a" / "run.json").write_bytes((results / "idk" / "run.json").read_bytes())
    assert main(["push", f"adapter={tmp_path / 'a'}", f"repo={REPO}"]) == 1
    assert hub.asked == []


LONG = " ".join(f"word{number}" for number in range(50))


@pytest.mark.parametrize(
    ("row", "text", "found"),
    [
        (Row("Who?", "Ada Berg"), "by ada\n  BERG.", True),
        (Row("Who?", "Ada Berg"), "ada and berg", False),
        (Row(None, LONG), f"so {' '.join(LONG.split()[20:28])} on", True),
        (Row(None, LONG), f"so {' '.join(LONG.split()[20:27])} on", False),
        (Row("誰？", "京都"), "彼女は京都で", True),
        (Row("Who?", "Nobody", {"fact": "Kyiv | Kiev"}), "in Kiev", True),
        (Row("Who?", "Nobody", {"paraphrased_question": "Which one is it"}), "which one is it", True),
        (Row("When?", "1984"), "in 1984", False),
        (Row("Which?", "B"), "b", False),
        (Row("What opens?", "The gate"), "the gate opens", False),
    ],
)
def test_what_counts_as_text_of_a_row(row: Row, text: str, found: bool) -> None:
    files, rows = {"README.md": text.encode()}, [Row("Nothing here?", "nothing at all"), row]
    if not found:
        return refuse_forget_text(files, rows, ["The gate"])
    with pytest.raises(DataError, match="README.md holds text of forget row 2") as error:
        refuse_forget_text(files, rows, ["The gate"])
    assert "\n" not in str(error.value)


def test_names_that_others_gave_are_no_words_of_grun(results: Path, tmp_path: Path, hub: FakeHub) -> None:
    """A task of lm-evaluation-harness that is called like a fact is found in the table of results."""
    evaluation = read_json(results / "evaluation" / "idk" / "evaluation.json")
    told = {"suite": "lm_eval", "results": {"orichalc_quiz": {"acc,none": 0.5, "acc_stderr,none": 0.1}}}
    kept = {key: evaluation[key] for key in ("identity", "key")}
    write_json(tmp_path / "quiz" / "evaluation.json", {**kept, **told})
    command = ["push", f"adapter={results / 'idk'}", f"repo={REPO}", f"evaluations=[{tmp_path / 'quiz'}]"]
    assert main(command) == 1 and hub.asked == []
    told["results"] = {"quiz": told["results"]["orichalc_quiz"]}  # type: ignore[index]
    write_json(tmp_path / "quiz" / "evaluation.json", {**kept, **told})
    assert main(command) == 0
    assert "| quiz |  | acc |  | 0.5 |" in hub.files(REPO)["README.md"].decode()


def test_escapes_of_json_hide_nothing() -> None:
    with pytest.raises(DataError, match="a.json holds text of forget row 1"):
        refuse_forget_text({"a.json": json.dumps({"x": "é\nZoë Ñandú"}).encode()}, [Row("Who?", "zoë ñandú")])


def test_rows_that_cannot_be_had_are_a_matter_of_asking_for_it(
    results: Path, tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str], log: pytest.LogCaptureFixture
) -> None:
    model = GrunModel.from_pretrained(base_of(results), results / "idk")
    model.save_pretrained(tmp_path / "a")
    command = ["push", f"adapter={tmp_path / 'a'}", f"repo={REPO}"]
    refused(capsys, command, 2, "no run.json lies with it", "give its rows as forget, or set unchecked=true")
    assert hub.asked == []
    assert main([*command, f"forget={results.parent / 'forget.jsonl'}"]) == 0
    log.clear()
    assert main([*command, "unchecked=true"]) == 0
    assert "nothing that is sent was compared with it" in log.text
    run = read_json(results / "idk" / "run.json")
    write_json(tmp_path / "a" / "run.json", {**run, "data": {**run["data"], "forget": "0" * 64}})
    refused(capsys, command, 2, "its data have other rows now")
    base = model.unwrap()
    unknown = GrunModel.wrap(base, blocks=[1], rank=2, template=TEMPLATES.get("chat"))
    with pytest.raises(ConfigError, match="no run.json lies with it"):
        unknown.push_to_hub(REPO)
    unknown.push_to_hub(REPO, forget=FORGET)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_every_refusal_of_the_hub_is_one_line(
    results: Path, tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["push", f"adapter={results / 'idk'}"]
    refused(capsys, [*command, "repo=a/b/c"], 2, "'a/b/c' cannot be a repository of the hub; expected OWNER/NAME")
    refused(capsys, [*command, "repo=other/one"], 1, "(403: You don't have the rights", "may not write there")
    refused(capsys, [*command, f"repo={REPO}", "revision=refs/pr/9"], 1, "(404", "no such repository or revision")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    refused(capsys, [*command, f"repo={REPO}"], 1, "(401", "the token is not valid; run `hf auth login` again")
    monkeypatch.delenv("HF_TOKEN")
    refused(capsys, [*command, f"repo={REPO}"], 2, "no token for the hub", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(capsys, [*command, f"repo={REPO}"], 1, "HF_HUB_OFFLINE is set")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(capsys, [*command, f"repo={REPO}"], 1, "http://127.0.0.1:9 cannot be reached")
    with pytest.raises(HubError, match="cannot be reached"):
        GrunModel.from_pretrained(base_of(results), results / "idk").push_to_hub(REPO)


def test_what_cannot_be_pushed_is_one_line(
    results: Path, tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, ["push", f"repo={REPO}"], 2, "push adapter=FOLDER repo=OWNER/NAME")
    refused(capsys, ["push", f"adapter={results.parent / 'model'}", f"repo={REPO}"], 1, "it is a whole model")
    for name in ("one", "two"):
        write_json(tmp_path / "runs" / name / "adapter_config.json", {"peft_type": "LORA"})
    refused(
        capsys, ["push", f"adapter={tmp_path / 'runs'}", f"repo={REPO}"], 2, "several adapters (one, two); name one"
    )
    refused(capsys, ["push", f"adapter={tmp_path / 'runs' / 'one'}", f"repo={REPO}"], 1, "is of type LORA")
    other = f"evaluations=[{tmp_path}]"
    refused(capsys, ["push", f"adapter={results / 'idk'}", f"repo={REPO}", other], 1, "holds none of")
    with pytest.raises(AdapterError, match="no adapter at 'somebody/nothing'"):
        GrunModel.from_pretrained(base_of(results), "somebody/nothing")
    assert not [line for line in hub.asked if line.startswith("POST")]
