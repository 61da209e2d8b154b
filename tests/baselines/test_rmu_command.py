"""`python -m baselines.rmu`: published command lines, what is read and in which order, results, kills and errors."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from demo import read_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from baselines.rmu.options import RmuOptions
from baselines.rmu.run import batches, forget_tokens, load_topics, number_of_steps
from baselines.rmu.task import RmuTask
from grun.config.options import ModelConfig, TinyConfig
from grun.data.encoding import Batch
from grun.data.templates import TEMPLATES, store
from grun.errors import ConfigError, DataError
from grun.loading.adapters import load_model
from grun.loading.models import load_base
from grun.loading.tiny import build_tiny
from grun.objectives.rmu import control_vector
from grun.runtime.files import read_json

main, parse = RmuOptions.main, RmuOptions.parse
ROOT = Path(__file__).resolve().parents[2]
LLAMA_LINE = (
    "--model_name meta-llama/Llama-3.1-8B --batch_size 4 --layer_ids 13,14,15 --layer_id 15 --max_num_batches 150 "
    "--layer_ids 13,14,15 --layer_id 15 --retain_corpora wikitext,wikitext "
    "--forget_corpora bio-forget-corpus,cyber-forget-corpus --steering_coeffs 30,30 --alpha 350,350 --lr 5e-5 "
    "--seed 42 --output_dir models/llama3_rmu_param18"
)
MISTRAL_LINE = (
    "--model_name mistralai/Mistral-7B-v0.1 --batch_size 4 --layer_ids 13,14,15 --layer_id 15 --max_num_batches 150 "
    "--retain_corpora wikitext,wikitext --forget_corpora bio-forget-corpus,cyber-forget-corpus "
    "--steering_coeffs 27,27 --alpha 1600,1600 --min_len 200 --lr 5e-5 --seed 42 "
    "--output_dir models/mistral_rmu_param19"
)
DEFAULTS = RmuOptions(
    model_name_or_path="HuggingFaceH4/zephyr-7b-beta",
    output_dir="models/zephyr-7b-beta_alpha-100-100_batches-80_layer-7",
    retain_corpora=["wikitext", "wikitext"],
    forget_corpora=["bio-forget-corpus", "cyber-forget-corpus"],
    **{"alpha": [100.0, 100.0], "steering_coeffs": [20.0, 20.0], "lr": 5e-5, "min_len": 0, "batch_size": 4},
    **{"max_num_batches": 80, "layer_id": 7, "layer_ids": [5, 6, 7], "param_ids": [6], "tensors": None, "seed": 42},
    **{"verbose": False, "optimizer": "legacy", "loss_mask": "all", "jsonl_mode": "published", "epochs": 1},
    **{"length_rule": "position", "padding_side": "left", "pad_token": "eos", "master_dtype": "param", "save": "full"},
    **{"data_dir": None, "dtype": "auto", "device": "auto", "trust_remote_code": False, "save_steps": 50},
    overwrite=False,
)


def test_without_flags_the_options_are_the_published_defaults() -> None:
    assert parse([]) == DEFAULTS


def test_the_published_lines_mean_what_they_meant() -> None:
    llama = dataclasses.replace(
        DEFAULTS,
        model_name_or_path="meta-llama/Llama-3.1-8B",
        output_dir="models/llama3_rmu_param18",
        **{"alpha": [350.0, 350.0], "steering_coeffs": [30.0, 30.0], "max_num_batches": 150},
        **{"layer_id": 15, "layer_ids": [13, 14, 15]},
    )
    assert parse(shlex.split(LLAMA_LINE)) == llama
    assert parse(shlex.split(MISTRAL_LINE)) == dataclasses.replace(
        llama,
        model_name_or_path="mistralai/Mistral-7B-v0.1",
        output_dir="models/mistral_rmu_param19",
        **{"alpha": [1600.0, 1600.0], "steering_coeffs": [27.0, 27.0], "min_len": 200},
    )


def test_the_last_of_repeated_flags_counts_and_the_model_has_three_names() -> None:
    assert parse(["--layer_id", "3", "--layer_id", "4", "--alpha", "1,1", "--alpha", "2,3"]).alpha == [2.0, 3.0]
    for flag in ("--model_name_or_path", "--model_name", "--model"):
        assert parse([flag, "x/y"]).model_name_or_path == "x/y"


def test_compat_none_switches_every_quirk_off_and_each_has_a_flag() -> None:
    off = parse(["--compat", "none"])
    assert off.quirks == []
    assert (off.optimizer, off.loss_mask, off.jsonl_mode, off.length_rule) == ("torch", "attended", "field", "name")
    assert (off.padding_side, off.pad_token, off.master_dtype) == ("right", "own", "fp32")
    assert len(parse([]).quirks) == 7
    for quirk in parse([]).quirks:
        name, value = quirk.split("=")
        assert parse(["--compat", "none", f"--{name}", value]).quirks == [quirk]
        other = getattr(off, name)
        assert quirk not in parse([f"--{name}", other]).quirks


def test_module_str_is_never_evaluated_and_max_len_said_to_be_unused(capsys: Any, caplog: Any, tmp_path: Path) -> None:
    caplog.set_level("INFO")
    file = tmp_path / "made"
    assert main(["--module_str", f"open({str(file)!r}, 'w')", "--max_len", "9", "--print_config"]) == 0
    assert not file.exists()
    assert "--module_str is not needed" in caplog.text
    assert caplog.text.count("--max_len is not used: the published tool never used it") == 1
    json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--alpha 100", "--alpha has 1 entries and --forget_corpora 2; give one for each topic"),
        ("--forget_corpora a,b,c", "--retain_corpora has 2 entries and --forget_corpora 3"),
        ("--steering_coeffs 1,2,3", "--steering_coeffs has 3 entries and --forget_corpora 2"),
        ("--alpha 1,x", "argument --alpha: '1,x' is no list of numbers"),
        ("--layer_ids 1,,2", "argument --layer_ids: '1,,2' is no list of integers"),
        ("--forget_corpora a,", "argument --forget_corpora: 'a,' is no list of names"),
        ("--param_ids 6 --tensors mlp", "--tensors and --param_ids both choose tensors"),
        ("--batch_size 0", "--batch_size 0 must be at least 1"),
        ("--lr 0", "--lr 0 must be above 0"),
        ("--alpha 1,-1", "--alpha -1 must not be negative"),
        ("--layer_id -1", "--layer_id -1 must not be negative"),
        ("--seed -1", "--seed -1 must be from 0"),
        ("--steps 4", "unrecognized arguments: --steps 4"),
        ("--optimizer sgd", "argument --optimizer: invalid choice: 'sgd'"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments: str, message: str, capsys: Any) -> None:
    assert main([*arguments.split(), "--print_config"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {message}") and printed.err.count("\n") == 1


# -- what is read -----------------------------------------------------------------------------------------------------

TOPICS = ["--forget_corpora", "bio-forget-corpus,cyber-forget-corpus", "--retain_corpora", "retain,retain"]
WORDS = "amber basalt cobalt delta ember flint garnet halite iron jasper".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama of 4 blocks, and corpora of 17, 13 and 20 texts."""
    folder = tmp_path_factory.mktemp("rmu")
    texts = {
        name: [" ".join(WORDS[(start + step * number) % 10] for step in range(4 + number)) for number in range(count)]
        for name, count, start in (("bio-forget-corpus", 17, 0), ("cyber-forget-corpus", 13, 3), ("retain", 20, 6))
    }
    for name, lines in texts.items():
        text = "".join(json.dumps({"text": line, "title": "t"}) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    config = TinyConfig(hidden_size=32, blocks=4, intermediate_size=48, vocabulary=300)
    model, tokenizer = build_tiny(config, [line for lines in texts.values() for line in lines], seed=0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    store(TEMPLATES.get("tiny"), folder / "model")
    return folder


def arguments(place: Path, output: Path, *more: str) -> list[str]:
    """7 steps of 2 texts, bio 4 and cyber 3."""
    own = ["--model", str(place / "model"), "--data_dir", str(place), "--output_dir", str(output), "--batch_size", "2"]
    own += ["--layer_id", "2", "--layer_ids", "1,2", "--lr", "0.01", "--max_num_batches", "7", "--device", "cpu"]
    return [*own, *TOPICS, *more]


def read_batches(place: Path, number: int, *more: str) -> tuple[tuple[list[Batch], list[Batch]], Any]:
    options = parse(arguments(place, place / "none", *more))
    topics = load_topics(options)
    base, tokenizer, _ = load_base(ModelConfig(path=str(place / "model"), device="cpu"))
    steps = number_of_steps(options, topics)
    return batches(options, number, topics[number], tokenizer, base, steps), tokenizer


def test_steps_are_counted_over_all_topics_and_end_with_the_shortest_corpus(place: Path) -> None:
    for asked, size, steps in ((7, 2, 7), (150, 2, 7), (150, 4, 4), (3, 4, 3)):
        more = ["--max_num_batches", str(asked), "--batch_size", str(size)]
        options = parse(arguments(place, place / "none", *more))
        assert number_of_steps(options, load_topics(options)) == steps  # 13 texts: 7 batches of 2, 4 of 4
    assert [len(read_batches(place, number)[0][0]) for number in (0, 1)] == [4, 3]


def test_corpora_are_read_again_where_epochs_say_so(place: Path) -> None:
    more = ["--max_num_batches", "150", "--batch_size", "2", "--epochs", "3"]
    options = parse(arguments(place, place / "none", *more))
    assert number_of_steps(options, load_topics(options)) == 20  # 39 texts: 20 batches of 2
    (forget, _), _ = read_batches(place, 0, *more)
    rows = [
        tuple(ids[mask != 0].tolist())
        for batch in forget
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    once = len(load_topics(options)[0].forget)
    assert len(rows) == 20 and rows[once : 2 * once] == rows[: len(rows) - once][:once]


def test_texts_are_read_in_the_order_of_the_corpus_as_whole_texts_behind_the_start_token(place: Path) -> None:
    (forget, retain), tokenizer = read_batches(place, 0, "--padding_side", "right")
    for side, name in ((forget, "bio-forget-corpus"), (retain, "retain")):
        lines = [json.loads(line)["text"] for line in (place / f"{name}.jsonl").read_text().splitlines()]
        raw = [line + "\n" for line in (place / "retain.jsonl").read_text().splitlines()]
        texts = lines if name == "bio-forget-corpus" else raw  # of the others the published tool takes the line
        rows = [row for batch in side for row in zip(batch.input_ids, batch.attention_mask, strict=True)]
        for (ids, mask), text in zip(rows, texts, strict=False):
            expected = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
            assert ids[mask != 0].tolist() == expected


def test_jsonl_modes_take_the_field_or_the_line(place: Path) -> None:
    found = {mode: load_topics(parse(arguments(place, place, "--jsonl_mode", mode))) for mode in ("field", "raw")}
    published = load_topics(parse(arguments(place, place)))
    assert found["raw"][1].forget[0].startswith('{"text": "')
    assert found["field"][1].forget[0].startswith("delta")
    assert published[0].forget == found["field"][0].forget
    assert published[1] == found["raw"][1]


def test_padding_is_on_the_side_and_of_the_token_asked_for(place: Path) -> None:
    (forget, _), tokenizer = read_batches(place, 0)
    ids, mask = forget[0].input_ids, forget[0].attention_mask
    assert mask[0, 0] == 0 and mask[0, -1] == 1 and ids[0, 0] == tokenizer.eos_token_id
    (forget, _), _ = read_batches(place, 0, "--compat", "none")
    ids, mask = forget[0].input_ids, forget[0].attention_mask
    assert mask[0, 0] == 1 and mask[0, -1] == 0 and ids[0, -1] == tokenizer.pad_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_length_of_forget_texts_goes_by_position_or_by_name() -> None:
    corpora = ["--forget_corpora", "cyber-forget-corpus,bio-forget-corpus"]
    by_position, by_name = parse(corpora), parse([*corpora, "--length_rule", "name"])
    assert [forget_tokens(by_position, number) for number in (0, 1)] == [512, 768]
    assert [forget_tokens(by_name, number) for number in (0, 1)] == [768, 512]


def test_texts_are_cut_at_their_limit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baselines.rmu.run.FORGET_TOKENS", 5)
    (forget, retain), _ = read_batches(place, 0)
    assert {int(mask.sum()) for batch in forget for mask in batch.attention_mask} == {5}
    assert max(batch.input_ids.shape[1] for batch in retain) > 5


def test_min_len_leaves_out_texts_of_that_many_characters_and_nothing_left_is_an_error(place: Path) -> None:
    lengths = [len(text) for text in load_topics(parse(arguments(place, place)))[0].forget]
    kept = load_topics(parse(arguments(place, place, "--min_len", str(lengths[3]))))[0].forget
    assert [len(text) for text in kept] == [length for length in lengths if length > lengths[3]]
    with pytest.raises(DataError, match="nothing is left of bio-forget-corpus: all 17 texts have 9999 characters"):
        load_topics(parse(arguments(place, place, "--min_len", "9999")))


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Result of the published way, saved whole."""
    output = tmp_path_factory.mktemp("results") / "full"
    assert main(arguments(place, output)) == 0
    return output


def test_a_run_saves_model_tokenizer_and_template_and_changes_the_chosen_tensors_alone(place: Path, full: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (place / "model", full))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{block}.mlp.down_proj.weight" for block in (1, 2)}
    assert AutoTokenizer.from_pretrained(full)("amber").input_ids
    assert (full / "grun_template.json").exists()
    assert not (full / "checkpoints").exists()


def test_run_json_says_what_was_done(full: Path) -> None:
    run = read_json(full / "run.json")
    assert run["tensors"] == [f"model.layers.{block}.mlp.down_proj.weight" for block in (1, 2)]
    assert run["quirks"] == DEFAULTS.quirks
    assert (run["command"], run["seed"], run["dtype"], run["steps"]) == ("rmu", 42, "float32", 7)
    assert run["parameters"]["trained"] == 2 * 32 * 48
    assert len(set(run["control_vectors"])) == 2
    assert set(run["data"]) == {
        "forget bio-forget-corpus", "forget cyber-forget-corpus", "retain retain"
    }  # fmt: skip
    assert [line["step"] for line in read_lines(full / "log.jsonl")] == list(range(1, 8))


def test_the_first_steps_loss_is_the_distance_from_the_control_vector_of_its_topic(place: Path, full: Path) -> None:
    """Of both topics: the second step follows one update of the legacy optimizer, which is small."""
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    found = [line["forget"] for line in read_lines(full / "log.jsonl")[:2]]
    for number in (0, 1):
        (forget, _), _ = read_batches(place, number)
        vector = control_vector(32, 20.0, 42, number)
        with torch.no_grad():
            hidden = model(
                input_ids=forget[0].input_ids, attention_mask=forget[0].attention_mask, output_hidden_states=True
            ).hidden_states[3]  # embeddings, blocks 0, 1, 2
        expected = (hidden - vector).square().mean().item()
        assert found[number] == pytest.approx(expected, rel=1e-5 if number == 0 else 1e-2)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(40).reshape(2, 20)).logits
    return found


def test_a_delta_on_its_base_is_the_model_that_is_saved_whole(place: Path, full: Path, tmp_path: Path) -> None:
    assert main(arguments(place, tmp_path / "delta", "--save", "delta")) == 0
    assert (
        sorted(load_file(tmp_path / "delta" / "adapter_model.safetensors")) == read_json(full / "run.json")["tensors"]
    )
    config = ModelConfig(path=str(place / "model"), device="cpu")
    loaded = load_model(config, str(tmp_path / "delta"), strict=True, gate_threshold=None)
    whole = load_model(ModelConfig(path=str(full), device="cpu"), None, strict=True, gate_threshold=None)
    assert torch.equal(logits(loaded.model), logits(whole.model))
    assert not torch.equal(logits(loaded.model), logits(load_base(config)[0]))
    assert loaded.template == whole.template == TEMPLATES.get("tiny")


def test_killed_in_training_the_same_command_ends_with_the_same_tensors(
    place: Path, full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "killed"
    command = arguments(place, output, "--save_steps", "2")
    real = RmuTask.data

    def killed_at_step_5(task: RmuTask, step: int) -> Any:
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(task, step)

    child = os.fork()
    if child == 0:
        RmuTask.data = killed_at_step_5  # type: ignore[method-assign]
        os._exit(main(command))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (output / "run.json").exists()
    assert main(command) == 0
    assert read_json(output / "run.json")["resumed_from"] == 4
    found, expected = (load_file(folder / "model.safetensors") for folder in (output, full))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (output / "log.jsonl").read_bytes() == (full / "log.jsonl").read_bytes()


def test_all_quirks_off_and_float32_masters_beside_bfloat16_weights(place: Path, tmp_path: Path) -> None:
    more = ["--compat", "none", "--dtype", "bfloat16", "--tensors", "mlp.down_proj,o_proj", "--verbose"]
    assert main(arguments(place, tmp_path / "run", *more)) == 0
    run = read_json(tmp_path / "run" / "run.json")
    assert (run["quirks"], run["dtype"], len(run["tensors"])) == ([], "bfloat16", 4)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    before = load_file(place / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name].to(torch.bfloat16), saved[name])}
    assert changed == set(run["tensors"])
    assert {"retain_cosine", "gradient"} < set(read_lines(tmp_path / "run" / "log.jsonl")[0])


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--layer_id", "4"], 2, "--layer_id: there is no block 4; this model has 4, 0 to 3"),
        (["--layer_ids", "2,9"], 2, "layer ids: there is no block 9; this model has 4, 0 to 3"),
        (["--param_ids", "99"], 2, "param id 99 chooses nothing: block 1 has 9 tensors, 0 self_attn.q_proj.weight"),
        (["--tensors", "mlp.w2"], 2, "block 1 has no tensor called 'mlp.w2'; it has 0 self_attn.q_proj.weight"),
        (["--layer_id", "0"], 2, "nothing to train: the loss reads block 0"),
        (["--min_len", "9999"], 1, "nothing is left of bio-forget-corpus"),
        (["--retain_corpora", "retain,nowhere.jsonl"], 1, "no data file "),
    ],
)
def test_what_does_not_fit_is_said_in_one_line_and_leaves_no_folder(
    place: Path, tmp_path: Path, capsys: Any, more: list[str], status: int, message: str
) -> None:
    assert main(arguments(place, tmp_path / "run", *more)) == status
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert main(["--print_config"]) == 2
    assert "python -m baselines.rmu runs in one process" in capsys.readouterr().err


def test_no_abbreviation_is_ambiguous_for_flags_that_published_scripts_shorten() -> None:
    assert parse(["--steering", "1,2"]).steering_coeffs == [1.0, 2.0]
    with pytest.raises(ConfigError):
        parse(["--nothing"])
