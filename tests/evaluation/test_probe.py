"""A model is asked once: answers are kept, new questions are asked alone, and an interrupted call goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_model import save_chat_model

from grun.config.options import CountriesConfig, DataConfig, EvaluateConfig, ModelConfig
from grun.data.answers import FILE, kept_answers
from grun.data.benchmarks.countries import to_ask
from grun.errors import ConfigError
from grun.evaluation import generation, probe
from grun.evaluation.probe import answers_key, asked_first, keep_answers
from grun.runtime import processes

QUESTIONS = {f"What is the capital of country {number}?": f"City{number}" for number in range(10)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "chat")


@pytest.fixture
def config(model: Path) -> EvaluateConfig:
    return EvaluateConfig(model=ModelConfig(path=str(model), device="cpu"), data=DataConfig(name="countries"))


def test_questions_are_asked_once(config: EvaluateConfig, tmp_path: Path, asked: list[Any]) -> None:
    folder = tmp_path / "known"
    keep_answers(config, dict(list(QUESTIONS.items())[:6]), folder)
    first = kept_answers(folder)
    keep_answers(config, QUESTIONS, folder)
    keep_answers(config, QUESTIONS, folder)
    assert [*map(len, asked)] == [6, 4]
    assert kept_answers(folder).keys() == QUESTIONS.keys()
    assert {question: kept_answers(folder)[question] for question in first} == first
    assert json.loads((folder / "asked.json").read_text())["model"]["path"] == config.model.path


def test_another_fact_is_judged_anew_without_asking(config: EvaluateConfig, tmp_path: Path, asked: list[Any]) -> None:
    keep_answers(config, QUESTIONS, tmp_path / "known")
    question, found = next(iter(kept_answers(tmp_path / "known").items()))
    assert not found.right
    keep_answers(config, {question: f"nothing | {found.answer[:3]}"}, tmp_path / "known")
    assert [*map(len, asked)] == [10]
    assert kept_answers(tmp_path / "known")[question].right


def test_an_interrupted_call_goes_on(
    config: EvaluateConfig, tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of two questions; the third is interrupted, and of the file's last line half is lost."""
    monkeypatch.setattr(probe, "BATCH", 2)
    monkeypatch.setattr(probe, "BATCHES", 1)
    folder, counting = tmp_path / "known", generation.generate_answers

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        return counting(*arguments, **named)

    monkeypatch.setattr(generation, "generate_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        keep_answers(config, QUESTIONS, folder)
    monkeypatch.setattr(generation, "generate_answers", counting)
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:-10])
    keep_answers(config, QUESTIONS, folder)
    assert sum(map(len, asked)) == 4 + 7
    lines = (folder / FILE).read_bytes().splitlines()
    assert len(lines) == 10 and all(json.loads(line) for line in lines)


def test_the_folder_is_of_model_template_and_how_it_is_loaded(config: EvaluateConfig, tmp_path: Path) -> None:
    other = save_chat_model(tmp_path / "other", seed=1)
    keys = {
        answers_key(config.model, config.data),
        answers_key(ModelConfig(path=str(other)), config.data),
        answers_key(ModelConfig(path=config.model.path, dtype="float16"), config.data),
        answers_key(config.model, DataConfig(name="countries", system_prompt="Be brief.")),
    }
    assert len(keys) == 4
    assert answers_key(ModelConfig(path=config.model.path, device="cpu"), DataConfig()) in keys


def test_data_that_need_no_answers_and_folders_that_are_named_stay(config: EvaluateConfig) -> None:
    config.data.path = "somewhere"
    assert asked_first(config) is config
    assert asked_first(plain := EvaluateConfig(model=config.model)) is plain


def test_a_config_gets_the_folder_of_the_answers(
    config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    monkeypatch.setenv("GRUN_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "LONGEST", 1)
    config.data.countries = CountriesConfig(forget=["Japan"], count=8)
    changed = asked_first(config)
    folder = Path(str(changed.data.path))
    assert folder.parent == tmp_path / "known" and config.data.path is None
    assert sum(map(len, asked)) == len(kept_answers(folder)) == len(to_ask(config.data))


def test_several_processes_do_not_ask(config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ConfigError, match="without torchrun or accelerate"):
        keep_answers(config, QUESTIONS, tmp_path / "known")
