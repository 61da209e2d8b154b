"""What an adapter, a model or a store says of itself wins over every default and profile, and results say so."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_model import save_chat_model
from demo import own_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun.cli import main
from grun.config.options import DataConfig, ModelConfig, RequestsConfig, SequentialConfig, SweepConfig, UnlearnConfig
from grun.config.values import describe
from grun.data.templates import TEMPLATES, Template, load, store
from grun.errors import ConfigError
from grun.experiments.sequential.plan import make_plan as sequence_plan
from grun.experiments.sweep.plan import make_plan as sweep_plan
from grun.loading.models import stored_template
from grun.loading.resolve import in_force, resolve
from grun.method.model import GrunModel, resolve_blocks
from grun.runtime.files import read_json, write_json

JSONL = ["data.name=jsonl", "data.forget=f.jsonl", "data.retain=r.jsonl"]
CHAT = {"name": "chat", "kind": "chat", "system_prompt": "Be brief.", "date": "1 Jan 2024"}


def folder_of(folder: Path, template: dict[str, Any] | None = None, **run: Any) -> Path:
    """A model's folder as far as options go: a template, a run.json with `run`."""
    folder.mkdir(parents=True)
    if template is not None:
        write_json(folder / "grun_template.json", template)
    if run:
        write_json(folder / "run.json", run)
    return folder


def adapter_of(folder: Path, template: dict[str, Any] | None = None, base: str = "some/base", **config: Any) -> Path:
    """An adapter's folder as far as options go."""
    folder_of(folder, None, **({"command": "unlearn", "profile": None, "config": config} if config else {}))
    own = {"peft_type": "GRUN", "template": template, "base_model_name_or_path": base, "base_revision": "c0ffee"}
    write_json(folder / "adapter_config.json", own)
    return folder


def taught_by_demo(folder: Path, **data: Any) -> Path:
    rows = {"name": "demo", "demo": {"seed": 5}, "heldout": 0, **data}
    template = TEMPLATES.get("tiny").to_dict()
    return folder_of(folder, template, command="finetune", profile="demo", config={"data": rows})


# -- which profile, and which rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "given"),
    [(command, "model.path=some/model") for command in ("finetune", "unlearn", "evaluate", "generate")]
    + [(command, "adapter=some/adapter") for command in ("evaluate", "generate")],
)
def test_no_profile_stands_behind_a_command_that_was_given_a_model_or_an_adapter(command: str, given: str) -> None:
    config = resolve(command, [given, *JSONL, *(["design=published"] if command == "unlearn" else [])])
    plain = DataConfig(name="jsonl", forget="f.jsonl", retain="r.jsonl")
    assert (config.profile, config.data, config.seed) == (None, plain, 42)
    assert resolve(command, []).profile == "demo", "with neither, the demo as ever"
    if command == "unlearn":
        assert config.train == UnlearnConfig().train and config.method == UnlearnConfig().method
        pooled = resolve(command, [given, *JSONL])
        assert (pooled.design, pooled.method.gate_fit, pooled.train.epochs) == ("pooled", "logistic", 20)
        robust = resolve(command, [given, *JSONL, "design=robust"])
        assert (robust.method.edit_write, robust.method.gate) == ("every_token", "noisy_mlp_3")


@pytest.mark.parametrize(
    "given",
    [
        "method.parametrization=lora",
        *("method.gate=mlp_3", "method.edit_write=every_token", "loss.gate=bce_max", "loss.retain_weight=2"),
        *("objective=rmu", "objective=pdu", "loss.forget=rmu", "compat=grun-paper", "data.name=corpora"),
    ],
)
def test_the_pooled_design_gives_way_where_it_cannot_be(given: str) -> None:
    of_terms = {
        "objective=rmu": ["loss.rmu_block=1", "loss.steering=1"],
        "objective=pdu": ["loss.epsilon=1", "loss.eta=1"],
    }
    of_terms["loss.forget=rmu"] = of_terms["objective=rmu"]
    arguments = ["model.path=some/model", *JSONL, given, *of_terms.get(given, [])]
    config = resolve("unlearn", arguments)
    assert (config.design, config.method.gate_blocks, config.method.gate_fit) == ("published", None, "joint")
    assert resolve("unlearn", ["model.path=some/model", *JSONL, "method.rank=8"]).design == "pooled"


@pytest.mark.parametrize("profile", ["demo", "tofu_small", "llama3.1"])
def test_a_profile_of_published_settings_has_the_published_design(profile: str) -> None:
    config = resolve("unlearn", [f"profile={profile}", "model.path=some/model"])
    assert (config.design, config.method.gate_blocks) == ("published", None)


@pytest.mark.parametrize("command", ["finetune", "unlearn", "evaluate"])
def test_rows_are_asked_for_where_nothing_names_them(command: str) -> None:
    with pytest.raises(ConfigError, match="data.name is not set, and neither the model nor an adapter says"):
        resolve(command, ["model.path=some/model"])
    assert resolve("generate", ["model.path=some/model"]).profile is None


@pytest.mark.parametrize(("command", "name"), [("sweep", "sweep"), ("sequential", "sequence")])
def test_a_grid_on_a_given_model_is_named(command: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not named"):
        resolve(command, ["model=some/model"])
    assert getattr(resolve(command, ["model=some/model", f"{name}=demo"]), name) == "demo"


def test_a_model_that_a_profile_taught_goes_on_with_it_and_with_its_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = taught_by_demo(tmp_path / "model")
    with caplog.at_level(logging.INFO, "grun"):
        config = resolve("unlearn", [f"model.path={model}", "objective=npo", "design=robust"])
    assert (config.profile, config.method.blocks, config.train.epochs) == ("demo", [4, 5, 6], 60)
    assert (config.data.name, config.data.demo.seed, config.data.template) == ("demo", 5, "tiny")
    (line,) = [record.message for record in caplog.records]
    assert line == f"stored with model {model}, and in force: data.demo.seed=5, profile=demo"
    assert config.label() == "demo"
    mine = resolve("unlearn", [f"model.path={model}", *JSONL, "profile=llama3.1"])
    assert (mine.profile, mine.data.demo.seed, mine.method.blocks) == ("llama3.1", 1, [20, 25, 31])
    assert (mine.label(), resolve("unlearn", [f"model.path={model}", *JSONL, "profile="]).label()) == (
        "llama3.1",
        "model",
    )


def test_rows_of_a_model_do_not_become_the_demos_by_its_profile(tmp_path: Path) -> None:
    model = taught_by_demo(tmp_path / "model", name="jsonl", forget="mine.jsonl", retain="rest.jsonl", path="rows")
    config = resolve("unlearn", [f"model.path={model}"])
    assert (config.profile, config.data.name, config.data.forget, config.data.path) == (
        *("demo", "jsonl", "mine.jsonl", "rows"),
    )
    other = resolve("unlearn", [f"model.path={model}", "data.name=tofu"])
    assert (other.data.forget, other.data.path, other.data.retain) == ("forget05", None, None), "of other data: nothing"


def test_an_evaluation_goes_on_with_what_its_adapter_was_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A held-out set of another size would hold rows that were used in training."""
    data = {"name": "tofu", "path": "tofu", "forget": "forget10", "heldout": 30, "limit": 2, "template": "llama2"}
    model = {"dtype": "float32", "quantization": "4bit", "trust_remote_code": True}
    adapter = adapter_of(tmp_path / "a", CHAT, data=data, model=model)
    with caplog.at_level(logging.INFO, "grun"):
        config = resolve("evaluate", [f"adapter={adapter}", "profile=llama3.1"])
    assert (config.model.path, config.model.revision) == ("some/base", "c0ffee")
    assert (config.model.dtype, config.model.quantization) == ("float32", "4bit")
    assert not config.model.trust_remote_code, "never from a file"
    found = config.data
    assert (found.name, found.path, found.forget, found.heldout, found.limit) == ("tofu", "tofu", "forget10", 30, None)
    assert (found.template, found.system_prompt, found.date) == ("chat", "Be brief.", "1 Jan 2024")
    (gave_way,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    for key in ("model.dtype=bfloat16", "data.forget=forget05", "data.template=question_answer"):
        assert key in gave_way
    assert config.max_new_tokens == 256, "what is not stored is the profile's"
    caplog.clear()
    mine = ["model.path=other/base", "model.dtype=bfloat16", "data.forget=forget01"]
    config = resolve("evaluate", [f"adapter={adapter}", *mine])
    assert (config.model.revision, config.model.dtype, config.data.forget) == (None, "bfloat16", "forget01")
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert re.match(
        r"model.dtype=bfloat16, data.forget=forget01: set by you; .* is model.dtype=float32, data.forget=forget10", line
    )


def test_the_adapter_counts_before_the_model_and_a_profile_last(tmp_path: Path) -> None:
    model = folder_of(tmp_path / "model", {"name": "llama2", "kind": "string", "text": "[INST] {prompt} [/INST]"})
    write_json(model / "config.json", {"dtype": "float16"})
    plain, own = adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "own", CHAT)
    common = [f"model.path={model}", *JSONL, "profile=llama3.1"]
    of_model = resolve("evaluate", common)
    assert (of_model.data.template, of_model.model.dtype) == ("llama2", "float16")
    assert resolve("evaluate", [*common, f"adapter={plain}"]).data.template == "llama2"
    assert resolve("evaluate", [*common, f"adapter={own}"]).data.template == "chat"
    both = resolve("evaluate", [*common, f"adapters=[{plain},{own}]"])
    assert both.data.template == "auto", "each in its own"
    assert resolve("evaluate", [*common, f"adapter={own}", "data.template=text"]).data.template == "text"
    sources = in_force(resolve("evaluate", [*common, f"adapter={own}", "data.limit=3"]))
    assert sources["set by you"]["data.limit"] == 3
    assert sources[f"stored with adapter {own}"]["data.system_prompt"] == "Be brief."
    assert sources["profile llama3.1"]["max_new_tokens"] == 256
    assert sources["default"]["model.quantization"] is None and "batch_size" not in sources["default"]


def test_requests_with_a_file_of_rows_each_leave_the_rows_to_the_profile(tmp_path: Path) -> None:
    data = {name: {"name": "jsonl", "forget": f"{name}.jsonl"} for name in ("a", "b")}
    one, other = (adapter_of(tmp_path / name, data=rows) for name, rows in data.items())
    asked = resolve("evaluate", [f"adapters=[{one},{other}]", "profile=smollm2"])
    assert asked.data.name == "countries"
    assert resolve("evaluate", [f"adapter={one}", "profile=smollm2"]).data.forget == "a.jsonl"


@pytest.mark.parametrize("key", ["data.forget", "data.retain", "data.path"])
def test_files_that_nobody_reads_are_not_passed_over_for_the_demos_rows(tmp_path: Path, key: str) -> None:
    model = taught_by_demo(tmp_path / "model")
    for given in ([], [f"model.path={model}"]):
        with pytest.raises(ConfigError, match=f"{key} is not read by data.name=demo, which nobody set here"):
            resolve("unlearn", [*given, f"{key}=mine.jsonl"])


def test_adapters_of_unlike_bases_are_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = adapter_of(tmp_path / "one", CHAT, data={}, model={"dtype": "float32"})
    two = adapter_of(tmp_path / "two", CHAT, data={}, model={"dtype": "bfloat16"})
    config = resolve("evaluate", [f"adapters=[{one},{two}]", *JSONL])
    assert (config.model.dtype, config.data.template) == ("auto", "chat")
    assert "trained with model.dtype=float32 (adapter" in caplog.text and "and bfloat16 (adapter" in caplog.text


COMMAND = re.compile(
    r"python -m grun (finetune|unlearn|evaluate|generate|requests|sweep|sequential|report|import) ([^`\n]*)"
)
ROOT = Path(__file__).parents[2]


def documented() -> list[tuple[str, list[str]]]:
    """Command lines of README and docs that have options: the command and its key=value words."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = [match for page in pages for match in COMMAND.finditer(page.read_text().replace("\\\n", " "))]
    lines = [(match[1], shlex.split(match[2].partition(" #")[0], posix=True)) for match in found if "|" not in match[2]]
    return [(command, words) for command, words in lines if any("=" in w for w in words) and "tofu-log" not in words]


def test_command_lines_of_the_documentation_mean_a_taught_model_or_a_chat_model(tmp_path: Path) -> None:
    """Options exist and are in range, and no line about a given model has a profile that nobody named."""
    chat, demo = folder_of(tmp_path / "chat"), taught_by_demo(tmp_path / "demo")
    mine = {"name": "jsonl", "forget": "forget.jsonl", "retain": "retain.jsonl"}
    adapter = adapter_of(tmp_path / "adapter", CHAT, base=str(chat), data=mine)
    assert len(documented()) > 40
    for model in (chat, demo):
        for command, words in documented():
            options = [word.replace("=MODEL", f"={model}") for word in words if "=" in word]
            options = [f"adapter={adapter}" if word.startswith("adapter=") else word for word in options]
            options = [f"adapters=[{adapter}]" if word.startswith("adapters=") else word for word in options]
            if command == "requests":
                own = {key for key, _, _ in describe(RequestsConfig)}
                training = [word for word in options if word.partition("=")[0] not in own or word.startswith("model.")]
                resolve("requests", [word for word in options if word.partition("=")[0] in own])
                command, options = ("unlearn", training) if "add" in words and len(training) > 1 else ("generate", [])
            names_data = any(word.startswith(("data.name=", "adapter=", "adapters=", "profile=")) for word in options)
            if model == chat and f"model.path={chat}" in options and not names_data:
                with pytest.raises(ConfigError, match="data.name is not set"):
                    resolve(command, options)
                continue
            config = resolve(command, options)
            if f"model.path={chat}" in options and not any(word.startswith("profile=") for word in options):
                assert config.profile is None and config.data.template in ("auto", "chat"), options


def test_a_damaged_run_json_beside_a_model_is_one_line(tmp_path: Path) -> None:
    model = folder_of(tmp_path / "model")
    (model / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run.json is damaged .* restore it"):
        resolve("unlearn", [f"model.path={model}", *JSONL])


@pytest.mark.parametrize("depth", [*range(1, 40), 80])
def test_blocks_that_nobody_names_are_as_deep_as_the_published_ones(depth: int) -> None:
    blocks = resolve_blocks(None, depth)
    assert blocks == sorted(set(blocks)) and len(blocks) == min(depth, 3)
    assert 0 <= blocks[0] and blocks[-1] == depth * 31 // 32
    assert resolve_blocks(None, 32) == [20, 25, 31]


# -- a chat model, end to end ----------------------------------------------------------------------------------------

QUESTIONS = [f"Where does {name} live?" for name in ("Ada", "Bo", "Cy", "Di")]
TRAINING = [
    *("objective=idk", "design=published", "train.epochs=6", "train.lr=0.02", "train.batch_size=4"),
    "cache.dir=null",
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a chat `model` and an `adapter` that was trained on it, the README's lines."""
    folder = tmp_path_factory.mktemp("chat")
    save_chat_model(folder / "model")
    both = (QUESTIONS, [f"What is {n} plus two?" for n in range(8)])
    rows = [[{"question": row, "answer": f"In place {n}."} for n, row in enumerate(side)] for side in both]
    own = [f"model.path={folder / 'model'}", *own_rows(folder, *rows), f"output_dir={folder}/adapter"]
    assert main(["unlearn", *own, *TRAINING]) == 0
    return folder


def gates_by_hand(folder: Path, question: str, **arguments: Any) -> list[float]:
    """Gates at the prompt that the tokenizer itself makes of a question."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    asked = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True, **arguments
    )["input_ids"]
    model = GrunModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "adapter")
    model.generate(input_ids=ids, max_new_tokens=1)
    assert model.last_gates is not None
    return [float(gate.max()) for _, gate in sorted(model.last_gates.items())]


def test_an_adapter_is_asked_in_the_template_it_was_trained_in_though_nobody_names_it(
    chat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = read_json(chat / "adapter/run.json")
    assert run["template"]["kind"] == "chat" and run["profile"] is None
    assert run["config"]["method"]["blocks"] == [0, 1, 2] == run["in_force"]["default"]["method.blocks"]
    assert run["in_force"]["default"]["data.template"] == "chat"
    by_hand = [gates_by_hand(chat, question) for question in QUESTIONS]
    assert all(min(gates) > 0.5 for gates in by_hand), "the gates learned their rows"
    with_model = [f"model.path={chat / 'model'}", f"adapter={chat / 'adapter'}"]
    for given in (with_model, with_model[1:]):  # the adapter knows its base
        capsys.readouterr()
        assert main(["generate", *given, "max_new_tokens=3", QUESTIONS[0]]) == 0
        printed = [float(value) for value in re.findall(r"block \d+: (\d\.\d+)", capsys.readouterr().out)]
        assert printed == pytest.approx(by_hand[0], abs=6e-4)  # three digits are printed
    assert main(["evaluate", *with_model, "max_new_tokens=3", f"output_dir={chat / 'evaluation'}"]) == 0
    result = read_json(chat / "evaluation/evaluation.json")
    assert result["template"] == run["template"]
    assert result["in_force"][f"stored with adapter {chat / 'adapter'}"]["data.forget"] == "forget.jsonl"
    lines = [json.loads(line) for line in (chat / "evaluation/gates.jsonl").read_text().splitlines()]
    gates = [list(line["gates"].values()) for line in lines if line["set"] == "forget"]
    assert gates == [pytest.approx(row, abs=1e-4) for row in by_hand]


def test_what_is_set_against_the_stored_template_is_a_line_or_an_error(
    chat: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    given = [f"model.path={chat / 'model'}", f"adapter={chat / 'adapter'}", "max_new_tokens=2"]
    assert main(["generate", *given, "data.template=question_answer", "q?"]) == 0
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("data.template=question_answer: set by you; stored is data.template=chat")
    for part in ("data.system_prompt=Be rude.", "data.date=1 May 1999", "data.template_arguments={a: 1}"):
        assert main(["generate", *given, part, "q?"]) == 2
        assert f"error: {part.partition('=')[0]}=" in capsys.readouterr().err
        caplog.clear()
        assert main(["generate", *given, part, "data.template=chat", "q?"]) == 0
        assert any(f"{part.partition('=')[0]}=" in record.message for record in caplog.records)
    caplog.clear()
    assert main(["generate", *given, "data.template=chat", "q?"]) == 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"], "named as it is stored"
    assert main(["generate", *given, "profile=demo", "q?"]) == 0
    assert any("data.template=tiny" in record.message for record in caplog.records)
    assert main(["generate", given[0], "profile=demo", "q?"]) == 2
    assert "data.template=tiny is for the demo's tokenizer" in capsys.readouterr().err


def test_a_tokenizer_that_was_changed_since_is_told(
    chat: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(chat / "model", model)
    given = ["generate", f"adapter={chat / 'adapter'}", f"model.path={model}", "max_new_tokens=2", "q?"]
    assert main(given) == 0 and "other tokens now" not in caplog.text
    jinja = model / "chat_template.jinja"
    jinja.write_text(jinja.read_text().replace("named SmolLM", "named Bob"))
    assert main(given) == 0
    assert "the template 'chat' was stored with: questions are other tokens now" in caplog.text


def test_what_runs_know_outlives_the_file_it_is_else_read_from(chat: Path, tmp_path: Path) -> None:
    """Adapters are moved without run.json, models without grun_template.json."""
    wide = ["model.dtype=float64", "data.template=llama2", f"output_dir={tmp_path}/wide"]
    assert main(["unlearn", f"model.path={chat / 'model'}", *own_rows(chat), *TRAINING, *wide]) == 0
    (tmp_path / "bare").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(tmp_path / "wide" / name, tmp_path / "bare" / name)
    config = resolve("generate", [f"adapter={tmp_path / 'bare'}"])
    assert (config.model.dtype, config.data.template) == ("float64", "llama2")
    used = read_json(tmp_path / "wide/run.json")["template"]
    write_json(tmp_path / "run.json", {"command": "finetune", "template": used})
    assert load(tmp_path) == TEMPLATES.get("llama2")


def test_a_template_comes_with_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--model/snapshots/c0ffee"
    folder_of(snapshot, CHAT)
    (tmp_path / "models--some--model/refs").mkdir()
    (tmp_path / "models--some--model/refs/main").write_text("c0ffee")
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert stored_template(ModelConfig(path="some/model")) == Template.from_dict(CHAT)
    assert stored_template(ModelConfig(path="some/other")) is None


def test_a_request_keeps_to_the_template_and_the_rows_of_its_store(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add, bare = ["requests", "add", f"store={tmp_path / 'store'}"], tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(chat / "adapter" / name, bare / name)
    files = [word for word in own_rows(chat) if word != "data.name=jsonl"]
    assert main([*add, "id=a", f"adapter={bare}", *files]) == 2, "these files were taken for the demo's rows"
    assert "name the data: data.name=jsonl" in capsys.readouterr().err
    assert main([*add, "id=a", f"adapter={bare}", *own_rows(chat)]) == 0
    (chat / "more.jsonl").write_text(json.dumps({"question": "Who is Flo?", "answer": "A baker."}))
    more = [f"model.path={chat / 'model'}", *own_rows(chat), "data.forget=more.jsonl", *TRAINING]
    assert main([*add, "id=b", *more]) == 0
    capsys.readouterr()
    assert main([*add, "id=b", "replace=true", "data.template=llama2"]) == 2
    assert "request b is asked with data.template=llama2, the other requests of" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sweep", "sequence"])
def test_a_grid_that_names_no_profile_has_none_on_a_given_model(chat: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "own.yaml"
    data = {"name": "jsonl", "path": str(chat), "retain": "retain.jsonl"}
    own: dict[str, Any] = {"axes": {"objective": ["idk"]}, "unlearn": {"data": {**data, "forget": "forget.jsonl"}}}
    if kind == "sequence":
        own = {"requests": [{"id": "x", "forget": "forget.jsonl"}], "data": data, "methods": ["grun"]}
    write_json(file, own)
    options: Any = {
        "unlearn": ["design=published"],
        kind: str(file),
        "model": str(chat / "model"),
        "results_dir": str(tmp_path / "results"),
    }
    plan: Any = sweep_plan(SweepConfig(**options)) if kind == "sweep" else sequence_plan(SequentialConfig(**options))
    config = plan.base if kind == "sweep" else plan.unlearn["grun"]
    assert (config.profile, config.data.template, config.method.blocks) == (None, "auto", None)
    assert (plan.evaluate.profile, plan.evaluate.data.forget != "forget05") == (None, True)


def test_a_store_is_asked_in_one_template_and_remembers_how_its_base_was_loaded(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_folder = tmp_path / "store"
    add = ["requests", "add", f"store={store_folder}"]
    trained = [f"model.path={chat / 'model'}", *own_rows(chat), *TRAINING, "model.dtype=float64"]
    assert main([*add, "id=a", *trained, "gate_threshold=0.4"]) == 0
    other = [*add, "id=b", *own_rows(chat), "data.forget=other.jsonl", *TRAINING]
    (chat / "other.jsonl").write_text(json.dumps({"question": "Who is Ed?", "answer": "A cook."}))
    capsys.readouterr()
    assert main([*other, "data.template=question_answer"]) == 2
    assert "a store has one template; leave data.template out" in capsys.readouterr().err
    assert main(other) == 0, "base, dtype and template are the store's"
    configs = [request["config"] for request in read_json(store_folder / "stack.json")["requests"]]
    assert [config["model"]["dtype"] for config in configs] == ["float64", "float64"]
    config = resolve("generate", [f"adapter={store_folder}"])
    assert (config.model.path, config.model.dtype, config.gate_threshold) == (str(chat / "model"), "float64", 0.4)
    assert resolve("generate", [f"adapter={store_folder}", "gate_threshold=0.1"]).gate_threshold == 0.1
    with pytest.raises(ConfigError, match="gate_threshold=0 skips no edit"):
        resolve("generate", [f"adapter={store_folder}", "gate_threshold="])
    assert main(["requests", "verify", f"store={store_folder}", "max_new_tokens=2"]) == 0
    figures = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "active" in line}
    assert "1.000" in figures["a"].split("|")[6], "its own gate opens at the prompts it was trained on"


def test_arguments_of_a_chat_template_are_stored_and_in_force_from_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path
    save_chat_model(folder / "model")
    path = folder / "model/chat_template.jinja"
    path.write_text(path.read_text() + "{% if enable_thinking is defined and not enable_thinking %}Now:{% endif %}")
    forget, retain = ([{"question": f"Who is {name}?", "answer": "A cook."}] for name in ("forget", "retain"))
    data = own_rows(folder, forget, retain)
    given = [f"model.path={folder / 'model'}", *data, *TRAINING, f"output_dir={folder / 'adapter'}"]
    assert main(["unlearn", *given, "data.template_arguments={enable_thinking: false, unread: 1}"]) == 0
    assert any("does not read the argument unread; it reads: " in record.message for record in caplog.records)
    stored = read_json(folder / "adapter/adapter_config.json")["template"]
    assert stored["arguments"] == {"enable_thinking": False, "unread": 1}
    assert main(["evaluate", f"adapter={folder / 'adapter'}", "max_new_tokens=2", f"output_dir={folder}/e"]) == 0
    assert read_json(folder / "e/evaluation.json")["template"] == stored
    lines = [json.loads(line) for line in (folder / "e/gates.jsonl").read_text().splitlines()]
    by_hand = gates_by_hand(folder, "Who is forget?", enable_thinking=False)
    assert list(lines[0]["gates"].values()) == pytest.approx(by_hand, abs=1e-4)
    assert by_hand != pytest.approx(gates_by_hand(folder, "Who is forget?"), abs=1e-4)


def test_a_template_without_arguments_is_written_as_before(tmp_path: Path) -> None:
    store(TEMPLATES.get("chat"), tmp_path)
    assert "arguments" not in read_json(tmp_path / "grun_template.json")
    assert Template.from_dict(CHAT) == Template("chat", "chat", system_prompt="Be brief.", date="1 Jan 2024")
