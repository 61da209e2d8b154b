"""The command line: what it prints, what it refuses and how, and runs from finetune to an adapter."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import demo
import pytest
from demo import refused
from transformers import AutoTokenizer
from watched import files_limited_to

import grun
from grun.cli import COMMANDS, main
from grun.commands.listing import KINDS, REGISTRIES, known_names
from grun.config.values import COMMANDS as SCHEMAS
from grun.config.values import describe

ROOT = Path(__file__).resolve().parents[2]
Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def subprocess_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


# -- help, lists, versions --------------------------------------------------------------------------------------------


def test_help_names_every_command(capsys: Captured) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        for command in COMMANDS:
            assert re.search(rf"^  {command} +\w", printed, re.MULTILINE)


@pytest.mark.parametrize("command", list(SCHEMAS))
def test_help_of_a_command_lists_every_option_with_its_default_and_meaning(command: str, capsys: Captured) -> None:
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    options = list(describe(SCHEMAS[command]))
    for key, default, text in options:
        assert f"\n  {key}={'unset' if default is None else default}\n      {text}" in printed
    assert len(re.findall(r"^  [\w.]+=", printed, re.MULTILINE)) == len(options)


def test_help_shows_the_defaults_of_the_command_and_not_of_the_class_they_share(capsys: Captured) -> None:
    main(["finetune", "--help"])
    assert "train.lr=1e-05\n" in capsys.readouterr().out
    main(["unlearn", "--help"])
    assert "train.lr=0.004\n" in capsys.readouterr().out


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"grun {grun.__version__}\n"


@pytest.mark.parametrize("kind", list(KINDS))
def test_list_prints_one_name_a_line_with_a_line_of_text(kind: str, capsys: Captured) -> None:
    assert main(["list", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    for line in lines:
        assert re.match(r"^\S+ {2,}\S.*$", line), line
    if kind in REGISTRIES:
        module, _, attribute = REGISTRIES[kind].partition(":")
        registry = getattr(__import__(module, fromlist=[attribute]), attribute)
        assert [line.split()[0] for line in lines] == registry.names()


def test_list_without_a_kind_prints_them_all(capsys: Captured) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^# (\w+)$", printed, re.MULTILINE) == list(KINDS)
    for name in ("llama3.1", "npo", "bce_row", "mlp_5", "rouge_l", "grun_paper", "reft"):
        assert re.search(rf"^{re.escape(name)}  ", printed, re.MULTILINE)


def test_info_names_versions_devices_and_caches(capsys: Captured) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in ("grun", "python", "torch", "transformers", "pyvene", "platform", "devices", "hub cache", "TOFU data"):
        assert re.search(rf"^{name}: \S", printed, re.MULTILINE)


def test_print_config_runs_nothing(capsys: Captured, tmp_path: Path) -> None:
    assert main(["unlearn", "--print-config", "objective=npo"]) == 0
    assert "objective: npo" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_print_config_and_a_wrong_option_need_no_heavy_package() -> None:
    program = """
import sys
from grun.cli import main
for command in ("finetune", "unlearn", "evaluate", "generate", "report", "sweep"):
    assert main([command, "--print-config"]) == 0
assert main(["unlearn", "train.lrr=1"]) == 2
assert main(["list"]) == 0
heavy = {"torch", "transformers", "pyvene", "datasets", "tokenizers", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], env=subprocess_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["unlern"], ["unknown command 'unlern'", "did you mean 'unlearn'?", "finetune", "report"]),
        (["unlearn", "train.lrr=1"], ["unknown option 'train.lrr': did you mean 'train.lr'? --help lists all"]),
        (["unlearn", "lr=1"], ["unknown option 'lr': did you mean 'train.lr'? --help lists all"]),
        (["unlearn", "profile=lama"], ["unknown profile 'lama'", "llama3.1", "demo"]),
        (["unlearn", "--verbose"], ["unknown flag --verbose"]),
        (["unlearn"], ["model.path names no taught model"]),
        (["evaluate", "model.path=tiny"], ["model.path names no taught model"]),
        (["list", "gate"], ["unknown kind 'gate'", "gates"]),
        (["sweep", "sweep=demmo"], ["unknown sweep 'demmo'", "did you mean 'demo'?", "tofu_small"]),
        (["sweep", "cell=nowhere.json"], ["nowhere.json"]),
        (["finetune", "objective=gd"], ["unknown option 'objective'"]),
        (["finetune", "model.path=x", "data.name=demo", "model.quantization=8bit"], ["quantization"]),
        (["evaluate", "model.path=x", "data.name=demo", "model.quantization=2bit"], ["quantization"]),
        (["finetune", *demo.MODEL, "model.tiny.heads=5"], ["model.tiny.hidden_size", "multiple"]),
        (["finetune", *demo.MODEL, "model.tiny.vocabulary=10"], ["model.tiny.vocabulary must be at least"]),
    ],
)
def test_wrong_use_is_one_line_with_the_known_names_and_status_2(
    arguments: list[str], named: list[str], capsys: Captured, tmp_path: Path
) -> None:
    refused(capsys, arguments, 2, *named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["unlearn", "data.name=demo", "model.path=./nowhere"], ["./nowhere", "no such folder"]),
        (["unlearn", "data.name=demo", "model.path=some/model"], ["model 'some/model' cannot be loaded"]),
        (["unlearn", "data.demo.forget=0"], ["forget"]),
        (["unlearn", "profile=mistral", "data.forget=forget07", "model.path=x/y"], ["forget07", "forget05"]),
        (["unlearn", "profile=mistral", "data.path=./nowhere"], ["no folder nowhere", "data.path"]),
        (["report", "results_dir=nowhere"], ["nowhere"]),
    ],
)
def test_what_is_not_there_is_one_line_and_no_traceback(
    arguments: list[str], named: list[str], capsys: Captured
) -> None:
    status = 2 if "data.demo.forget=0" in arguments else 1
    refused(capsys, arguments, status, *named)


@pytest.mark.parametrize(
    ("command", "kind"), [("unlearn", "objectives"), ("unlearn", "gates"), ("evaluate", "attacks")]
)
def test_help_gives_the_names_that_an_option_takes(capsys: Captured, command: str, kind: str) -> None:
    assert main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{kind}: {', '.join(known_names(kind))}" in shown


def test_what_a_command_that_prints_returns_is_not_printed(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grun.report.make.make_report", lambda config: print("the report") or {"rows": 1})
    assert main(["report"]) == 0
    assert capsys.readouterr().out == "the report\n"


# -- runs -------------------------------------------------------------------------------------------------------------


def test_stdout_of_a_run_is_its_folder_alone(
    taught: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a package prints meanwhile; tests/baselines/test_baselines.py looks at a process of its own."""
    from grun.method.gated import Grun

    prepare = Grun.prepare

    def talkative(self: Grun, *arguments: Any, **options: Any) -> None:
        print("a package says hello")
        prepare(self, *arguments, **options)

    monkeypatch.setattr(Grun, "prepare", talkative)
    capsys.readouterr()
    assert demo.unlearn(taught, tmp_path / "run", "train.epochs=1") == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'run'}\n"
    assert "a package says hello" in captured.err
    assert demo.finetune(tmp_path / "model", "train.epochs=1") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"


def test_a_run_leaves_an_adapter_a_log_and_what_it_was(adapter: Path, taught: Path) -> None:
    names = {path.name for path in adapter.iterdir()}
    assert names == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md"),
        *("log.jsonl", "run.json", "run_identity.json"),
    }
    run = json.loads((adapter / "run.json").read_text())
    assert (run["command"], run["objective"], run["parametrization"]) == ("unlearn", "gd", "grun")
    assert run["terms"] == {"forget": 1.0, "retain": 2.0, "gate": 10.0}
    assert run["quirks"] == [] and run["steps"] == 12 and run["resumed_from"] == 0
    assert run["parameters"]["trained"] == 879  # 3 blocks of 2 * 32 * 4 + 4 and a gate of 33
    assert run["seconds"] > 0 and run["peak_memory_bytes"] > 0 and run["versions"]["grun"] == grun.__version__
    assert run["config"]["train"]["epochs"] == 4 and run["data"].keys() >= {"forget", "retain"}
    assert run["base_fingerprint"] == json.loads((taught / "run.json").read_text())["fingerprint"]
    steps = [json.loads(line)["step"] for line in (adapter / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["template"]["name"] == "tiny"


def test_quirks_in_force_stand_in_the_run(taught: Path, tmp_path: Path) -> None:
    assert demo.unlearn(taught, tmp_path / "run", "compat=grun-paper", "train.epochs=1", "method.dropout=0.1") == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    of_rmu_and_kl = ["kl_row_sum", "rmu_answer_states", "rmu_hidden_state_index"]
    assert run["quirks"] == ["retain_fixed_pairing", "dropout_on_hidden", *of_rmu_and_kl]
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["dropout_on_hidden"] is True


def test_an_adapter_can_be_asked_and_evaluated(adapter: Path, taught: Path, capsys: Captured, tmp_path: Path) -> None:
    common = [*demo.DATA, f"model.path={taught}", f"adapter={adapter}", "max_new_tokens=4"]
    capsys.readouterr()
    assert main(["generate", *common, "Where does she live?", "x = 3?"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if not line.startswith(" ")] == ["Where does she live?", "x = 3?"]
    assert printed[1].startswith("  answer: ")
    assert re.fullmatch(r"  gates:  block 1: [01]\.\d{3}  block 2: [01]\.\d{3}  block 3: [01]\.\d{3}", printed[2])
    assert main(["evaluate", *common, "sets=[forget]", f"output_dir={tmp_path / 'evaluation'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'evaluation'}\n"
    assert (tmp_path / "evaluation" / "evaluation.json").is_file()
    refused(capsys, ["evaluate", *common, "sets=[forgot]"], 2, "'forgot'", "forget_paraphrase", "heldout")


def test_adapters_that_do_not_fit_are_refused(adapter: Path, taught: Path, capsys: Captured, tmp_path: Path) -> None:
    base = [*demo.DATA, f"model.path={taught}"]
    refused(capsys, ["evaluate", *base, f"adapter={tmp_path / 'nowhere'}"], 1, "no adapter at", "nowhere")
    refused(capsys, ["generate", *base, f"adapter={taught}", "Who?"], 1, "adapter_config.json is missing")
    cut = shutil.copytree(adapter, tmp_path / "cut")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(capsys, ["generate", *base, f"adapter={cut}", "Who?"], 1, "damaged or truncated")
    assert demo.finetune(tmp_path / "other", "seed=1", "train.epochs=1") == 0
    other = [*demo.DATA, f"model.path={tmp_path / 'other'}", f"adapter={adapter}", "strict=true"]
    refused(capsys, ["generate", *other, "Who?"], 1, "strict=true refuses")


# -- folders of runs --------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_found_and_not_repeated(
    taught: Path, adapter: Path, capsys: Captured, log: pytest.LogCaptureFixture
) -> None:
    before = contents(adapter)
    capsys.readouterr()
    assert demo.unlearn(taught, adapter) == 0
    assert contents(adapter) == before
    assert capsys.readouterr().out == f"{adapter}\n"
    assert "finished: nothing to do" in log.text


def test_a_taught_model_is_found_by_what_it_was_taught(capsys: Captured, log: pytest.LogCaptureFixture) -> None:
    def finetune(*arguments: str) -> Path:
        capsys.readouterr()
        assert main(["finetune", *demo.DATA, *demo.MODEL, "train.epochs=1", *arguments]) == 0
        return Path(capsys.readouterr().out.splitlines()[-1])

    first = finetune()
    assert re.fullmatch(r"models/demo-all-[0-9a-f]{12}", str(first))
    before = contents(first)
    assert finetune() == first
    assert contents(first) == before
    assert "finished: nothing to do" in log.text
    without = finetune("data.subset=without_forget")
    assert re.fullmatch(r"models/demo-without_forget-[0-9a-f]{12}", str(without))
    assert len({first, without, finetune("seed=1"), finetune("data.demo.seed=1"), finetune("train.lr=7e-4")}) == 5
    rows = [json.loads((folder / "run.json").read_text())["rows"] for folder in (first, without)]
    assert rows == [50, 40]  # 5 questions about each of two people to forget


def test_the_two_taught_models_share_a_tokenizer(taught: Path, tmp_path: Path) -> None:
    assert demo.finetune(tmp_path / "without", "data.subset=without_forget", "train.epochs=1") == 0
    assert (tmp_path / "without" / "tokenizer.json").read_bytes() == (taught / "tokenizer.json").read_bytes()


def test_another_config_is_refused_naming_the_first_option_that_differs(
    taught: Path, adapter: Path, capsys: Captured
) -> None:
    """A taught model's own config.json is not taken for the mark of a run."""
    before = contents(adapter), contents(taught)
    common = ["unlearn", *demo.DATA, *demo.TRAINING, f"model.path={taught}", f"output_dir={adapter}"]
    line = refused(capsys, [*common, "train.lr=0.5", "train.warmup=0.5"], 1, "holds another run", "overwrite=true")
    assert "(train.lr: 0.01 there, 0.5 asked for)" in line
    refused(capsys, [*common, "data.demo.seed=1"], 1, "holds another run (data.demo.seed: 0 there, 1 asked for)")
    finetune = ["finetune", *demo.DATA, *demo.MODEL, "train.epochs=3", f"output_dir={taught}"]
    refused(capsys, finetune, 1, "(train.epochs: 2 there, 3 asked for)")
    assert (contents(adapter), contents(taught)) == before


def test_overwrite_replaces_another_run_but_only_once_the_new_one_can_start(
    taught: Path, adapter: Path, capsys: Captured, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "run")
    (folder / "notes.txt").write_text("of the user")
    before = contents(folder)
    again = ["unlearn", *demo.DATA, *demo.TRAINING, f"model.path={taught}", f"output_dir={folder}", "overwrite=true"]
    refused(capsys, [*again, "method.blocks=[9]"], 2, "blocks [9]", "4 blocks")
    refused(capsys, [*again, "method.activation=foo"], 2, "unknown activation 'foo'")
    refused(capsys, [*again, "data.max_length=5"], 1, "leaves no room for an answer within 5")
    assert contents(folder) == before
    assert main([*again, "train.epochs=1"]) == 0
    assert (folder / "notes.txt").read_text() == "of the user"
    assert json.loads((folder / "run.json").read_text())["steps"] == 3


def test_a_run_that_could_not_start_leaves_the_folder_free(taught: Path, capsys: Captured, tmp_path: Path) -> None:
    wrong = ["unlearn", *demo.DATA, *demo.TRAINING, f"model.path={taught}", f"output_dir={tmp_path / 'run'}"]
    refused(capsys, [*wrong, "method.blocks=[1,4]"], 2, "0..3 or -4..-1")
    refused(capsys, [*wrong, "method.blocks=[3,-1]"], 2, "block 3 is named twice")
    refused(capsys, [*wrong, "method.rank=99"], 2, "rank 99", "hidden size 32")
    assert not (tmp_path / "run").exists()
    assert demo.unlearn(taught, tmp_path / "run", "method.blocks=[-1]", "train.epochs=1") == 0


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_a_folder_of_something_else_is_never_touched(
    overwrite: str, taught: Path, capsys: Captured, tmp_path: Path
) -> None:
    """Not even a model's folder, which holds a config.json."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "thesis.tex").write_text("precious")
    before = contents(folder)
    unlearn = ["unlearn", f"model.path={taught}", *demo.TRAINING, *demo.DATA]
    for command in (unlearn, ["finetune", *demo.MODEL, *demo.DATA], ["corpora", "source=lore"]):
        arguments = [*command, f"output_dir={folder}", f"overwrite={overwrite}"]
        refused(capsys, arguments, 1, "is not empty and holds no run of GRUN")
    assert contents(folder) == before


def test_an_output_folder_that_is_a_file_or_lies_in_one_is_refused(
    taught: Path, capsys: Captured, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    common = ["unlearn", *demo.DATA, *demo.TRAINING, f"model.path={taught}"]
    refused(capsys, [*common, f"output_dir={tmp_path / 'file'}"], 1, "is a file")
    refused(capsys, [*common, f"output_dir={tmp_path / 'file' / 'run'}"], 1, "Not a directory")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_disk_that_is_full_when_the_result_is_saved_loses_no_training(
    taught: Path, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint stays until the adapter is whole. Real failing writes: no file may grow beyond 1 KB."""
    from grun.method.gated import Grun

    folder = tmp_path / "run"
    save = Grun.save

    def on_a_full_disk(self: Grun, where: Path) -> None:
        with files_limited_to(1024):
            save(self, where)

    monkeypatch.setattr(Grun, "save", on_a_full_disk)
    common = ["unlearn", *demo.DATA, *demo.TRAINING, f"model.path={taught}", f"output_dir={folder}"]
    refused(capsys, common, 1, "writing to", "failed", "free space there and run the same command again")
    assert not (folder / "adapter_model.safetensors").exists()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-12"]
    monkeypatch.setattr(Grun, "save", save)
    assert main(common) == 0
    assert json.loads((folder / "run.json").read_text())["resumed_from"] == 12
    assert not (folder / "checkpoints").exists()


# -- data and models --------------------------------------------------------------------------------------------------


@pytest.fixture
def own_data(tmp_path: Path) -> list[str]:
    """Arguments that name a user's own files; two rows to forget, three to keep."""
    forget = [{"question": f"Who is {name}?", "answer": "A baker."} for name in ("Ann", "Bo")]
    return demo.own_rows(tmp_path, forget, [{"prompt": f"Where is {name}?", "completion": "Here."} for name in "XYZ"])


def test_broken_data_is_named_by_file_and_line(
    own_data: list[str], taught: Path, capsys: Captured, tmp_path: Path
) -> None:
    arguments = ["unlearn", *own_data, f"model.path={taught}", "method.blocks=[1]"]
    retain = tmp_path / "retain.jsonl"
    whole = retain.read_text()
    retain.write_text(whole + '{"question": "Wh\n')
    refused(capsys, arguments, 1, f"{retain} line 4", "not valid JSON")
    retain.write_text(whole + (tmp_path / "forget.jsonl").read_text())
    refused(capsys, arguments, 1, "2 of 2 forget rows also stand in the retain set", "data.allow_overlap=true")
    refused(capsys, [*arguments, "data.retain="], 2, "data.retain")
    assert not (tmp_path / "results").exists()


def test_a_prompt_beyond_the_context_is_named(
    own_data: list[str], taught: Path, capsys: Captured, tmp_path: Path
) -> None:
    demo.write_rows(
        tmp_path / "forget.jsonl", *[{"question": "Who?", "answer": "No."}, {"question": "Who " * 600, "answer": "I."}]
    )
    arguments = ["unlearn", *own_data, f"model.path={taught}", "method.blocks=[1]"]
    refused(capsys, arguments, 1, "row 2 of 2", "no room for an answer within 512")


def test_a_tokenizer_without_pad_token_is_no_obstacle(taught: Path, tmp_path: Path, adapter: Path) -> None:
    padless = shutil.copytree(taught, tmp_path / "padless")
    tokenizer = AutoTokenizer.from_pretrained(padless)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(padless)
    assert AutoTokenizer.from_pretrained(padless).pad_token_id is None
    assert demo.unlearn(padless, tmp_path / "run") == 0
    # Padding is masked, so which token pads changes nothing.
    weights = "adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (adapter / weights).read_bytes()


def test_finetune_goes_on_from_a_model_in_a_folder(taught: Path, tmp_path: Path) -> None:
    arguments = ["finetune", *demo.DATA, f"model.path={taught}", "train.epochs=1", f"output_dir={tmp_path / 'more'}"]
    assert main(arguments) == 0
    assert (tmp_path / "more" / "model.safetensors").read_bytes() != (taught / "model.safetensors").read_bytes()
