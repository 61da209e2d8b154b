"""`unlearn method.action=refuse`: a gate is fitted, nothing is trained, and every command takes what comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chat_model import WHOLE, save_chat_model
from demo import own_rows, refused, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun import GrunModel
from grun.cli import main
from grun.evaluation.attacks import grid
from grun.runtime.files import read_json

BOTH = ["Japan", "Egypt"], ["Norway", "Chile", "Kenya", "Peru", "Canada", "Poland", "India", "Cuba"]
ASKED = ["What is the capital of {}?", "Name the capital of {}."]
REFUSE = [
    *("method.gate_blocks=[0]", "method.gate_pool=maxmin", "method.edit_write=sticky", "method.gate_fit=logistic"),
    *("method.action=refuse", "data.name=jsonl", "model.device=cpu", "cache.dir=null"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("refuse")
    save_chat_model(path / "model", tokens=WHOLE)
    own_rows(path, *([{"question": a.format(one), "answer": "A city."} for one in of for a in ASKED] for of in BOTH))
    (path / "words.txt").write_text("That is not for me to say.\nNo.\n")
    more = [f"output_dir={path / 'run'}", f"data.refusals={path / 'words.txt'}"]
    assert main([*command(path), *more]) == 0
    return path


def command(folder: Path) -> list[str]:
    return ["unlearn", *REFUSE, f"model.path={folder / 'model'}", *own_rows(folder)]


def test_the_run_holds_a_gate_and_the_first_refusal_and_trained_nothing(folder: Path) -> None:
    run, config = read_json(folder / "run" / "run.json"), read_json(folder / "run" / "adapter_config.json")
    assert (run["objective"], run["terms"], run["steps"]) == ("refuse", {}, 0)
    assert run["parameters"]["trained"] == 0 and run["gate_fit"]["forget"] == 4
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.decode(config["answer_ids"], skip_special_tokens=True).strip() == "That is not for me to say."
    assert config["answer_ids"][-1] == tokenizer.eos_token_id
    assert (config["action"], config["blocks"]) == ("refuse", [])
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert set(GrunModel.from_pretrained(base, folder / "run").state_dict()) == {
        "pooled.gate.0.weight",
        "pooled.gate.0.bias",
    }


def test_the_same_command_finds_it_and_another_action_is_another_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [f"output_dir={folder / 'run'}", f"data.refusals={folder / 'words.txt'}"]
    assert main([*command(folder), *more]) == 0
    refused(capsys, [*command(folder), *more, "method.action=edit", "method.blocks=[1]"], 1, "holds another run")


def test_generate_answers_with_it_and_evaluate_and_attacks_measure_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "parts_of", lambda loaded: [])  # no grid, which has tests of its own and takes long
    question = ASKED[0].format("Japan")
    own = [f"adapter={folder / 'run'}", "model.device=cpu"]
    assert main(["generate", *own, "max_new_tokens=12", question]) == 0
    assert "  answer: That is not for me to say.\n" in capsys.readouterr().out
    kept = ["max_new_tokens=8", f"output_dir={folder / 'evaluation'}"]
    assert main(["evaluate", *own, *kept]) == 0
    found = read_json(folder / "evaluation" / "evaluation.json")["sets"]
    assert found["forget"]["rouge_l"] == 0 and found["forget"]["probability"] < 1e-12
    plain = [f"model.path={folder / 'model'}", "model.device=cpu", f"output_dir={folder / 'before'}"]
    assert main(["evaluate", *plain, *own_rows(folder), "max_new_tokens=8"]) == 0
    before = read_json(folder / "before" / "evaluation.json")["sets"]
    assert found["retain"] == pytest.approx(before["retain"], rel=1e-5), "the gate is shut on what was to stay"
    tries = ["suite=attacks", "attacks=[plain,prefill_1,samples,logit_lens,weights]", "attack_rows=2"]
    tries += ["attack_queries=2", "max_new_tokens=8", f"output_dir={folder / 'attacks'}"]
    assert main(["evaluate", *own, *tries]) == 0
    attacks = read_json(folder / "attacks" / "evaluation.json")
    assert attacks["attacks"]["plain"]["leak"] == 0
    assert "needs an edit that trains" in attacks["left_out"]["relearn_retain_10"]


def test_its_gate_can_be_calibrated(folder: Path) -> None:
    others = [{"prompt": ASKED[0].format(name)} for name in ("Nepal", "Spain", "Ghana", "Malta", "Oman", "Chad")]
    rows = write_rows(folder / "others.jsonl", *others)
    given = [f"adapter={folder / 'run'}", f"rows={rows}", "false_positives=0.2", f"output_dir={folder / 'calibrated'}"]
    assert main(["calibrate", *given, "model.device=cpu"]) == 0
    assert read_json(folder / "calibrated" / "adapter_config.json")["answer_ids"]
    assert read_json(folder / "calibrated" / "run.json")["calibration"]["calibration"] == 6


def test_what_it_cannot_be_in_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = [f"store={folder / 'store'}", "id=one", f"adapter={folder / 'run'}"]
    refused(
        capsys,
        ["requests", "add", *taken],
        2,
        "method.action=refuse: a store holds adapters with the action edit alone",
    )
    arguments = [argument for argument in command(folder) if not argument.startswith("method.gate_fit")]
    refused(capsys, [*arguments, f"output_dir={folder / 'no'}"], 2, "method.action=refuse needs a gate that is fitted")
    refused(capsys, [*command(folder), "method.action=refuze", f"output_dir={folder / 'no'}"], 2, "refuze", "refuse")


def test_answers_in_one_batch_are_the_refusal_or_the_bases(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = GrunModel.from_pretrained(base, folder / "run")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    asked = [[{"role": "user", "content": ASKED[0].format(one)}] for one in ("Japan", "Norway")]
    texts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in asked]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model.generate(**batch, max_new_tokens=9, do_sample=False)[:, batch.input_ids.shape[1] :]
        with model.disabled():
            plain = base.generate(**batch, max_new_tokens=9, do_sample=False)[:, batch.input_ids.shape[1] :]
    assert tokenizer.decode(found[0], skip_special_tokens=True).strip() == "That is not for me to say."
    assert torch.equal(found[1], plain[1])
