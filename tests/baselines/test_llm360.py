"""LLM360's command line: what its flags mean, the published order of texts, and short runs of every method."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny import random_rows, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from baselines.llm360 import run as llm360_run
from baselines.llm360.options import Llm360Options
from baselines.llm360.run import batches_of, run, texts_of
from baselines.llm360.task import PairedTask
from baselines.rmu.options import RmuOptions
from grun.config.options import LossConfig, ModelConfig, TinyConfig
from grun.data.encoding import EncodedRow, collate, encode_texts
from grun.errors import DataError, ModelError, RunError
from grun.loading.models import load_base
from grun.loading.tiny import build_tiny
from grun.method.plain import run_plain
from grun.objectives.objective import build_objective

main, parse = Llm360Options.main, Llm360Options.parse
ROOT = Path(__file__).resolve().parents[2]
DEMO = [
    *("--unlearn_method", "max-entropy", "--forget_topic", "bio-forget", "--lr", "5e-5", "--random_seed", "23597"),
    *("--min_len", "50", "--max_len", "1000", "--max_unlearn_steps", "100", "--use_wandb", "False"),
]
"""The one run whose numbers were published."""


# -- flags ------------------------------------------------------------------------------------------------------------


EVERY_FLAG = (
    "--random_seed 1 --use_wandb true --wandb_project p --model_name_or_path a/b --use_lora 0 --output_path o "
    "--forget_topic bio-retain --retain_topic wikitext-test --min_len 5 --max_len 6 --unlearn_method rmu "
    "--fix_vector False --warmup_steps 2 --max_unlearn_steps 8 --batch_size 3 --gradient_accumulation_steps 2 "
    "--lr 0.1 --module_str {model_name}.transformer.h[{layer_id}] --alpha 3 --steering_coeff 4 --layer_id 2 "
    "--layer_ids 1,2 --param_ids 0,1 --bad_weight 0.5 --random_weight 1 --normal_weight 1"
).split()


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        (
            DEMO,
            {"model_name_or_path": "LLM360/CrystalChat", "unlearn_method": "max-entropy", "forget_topic": "bio-forget"}
            | {"retain_topic": "wikitext-test", "lr": 5e-5, "random_seed": 23597, "max_len": 1000, "min_len": 50}
            | {"max_unlearn_steps": 100, "batch_size": 1, "gradient_accumulation_steps": 4, "updates": 25}
            | {"use_wandb": False, "use_lora": False, "fix_vector": True, "trust_remote_code": False}
            | {"folder": "models/max-entropy_bio-forget_CrystalChat", "final_weights": "averaged"}
            | {"quirks": ["dtype=bfloat16", "positions=all", "accumulation=published"]},
        ),
        (
            ["--lr", "1e-4"],
            {"random_seed": 42, "use_wandb": True, "wandb_project": "unlearn360", "output_path": "./models"}
            | {"min_len": 50, "max_len": 1000, "warmup_steps": 0, "max_unlearn_steps": 50, "batch_size": 1}
            | {"gradient_accumulation_steps": 4, "alpha": 10.0, "steering_coeff": 1.0, "layer_id": 7}
            | {"layer_ids": [5, 6, 7], "param_ids": [12, 13], "tensors": None},
        ),
        (
            EVERY_FLAG,
            {"folder": "o/rmu_bio-retain_b", "vector_seed": 1, "updates": 4, "use_wandb": True, "fix_vector": False},
        ),
    ],
    ids=["demo", "defaults", "every flag"],
)
def test_a_published_line_means_what_it_ran(line: list[str], meant: dict[str, Any]) -> None:
    options = parse(line)
    assert {name: getattr(options, name) for name in meant} == meant


@pytest.mark.parametrize("name", ["random-mapping", "random_matching", "random-matching", "random_mapping"])
def test_random_mapping_goes_by_both_of_its_names(name: str) -> None:
    assert parse(["--lr", "1", "--unlearn_method", name]).unlearn_method == "random-mapping"


def test_without_compat_no_quirk_is_on_and_each_can_be_set_alone() -> None:
    options = parse(["--lr", "1", "--compat", "none"])
    assert (options.positions, options.accumulation, options.dtype, options.quirks) == ("attended", "exact", "auto", [])
    alone = parse(["--lr", "1", "--compat", "none", "--positions", "all", "--final_weights", "last"])
    assert alone.quirks == ["positions=all", "final_weights=last"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "published run used 5e-5"),
        (["--lr", "1", "--use_wandb", "yes"], "'yes' is neither True nor False"),
        (["--lr", "1", "--fix_vector", "2"], "'2' is neither True nor False"),
        (["--lr", "1", "--unlearn_method", "llmu"], "never finished"),
        (["--lr", "1", "--unlearn_method", "entropy"], "choose one of max-entropy"),
        (["--lr", "1", "--max_unlearn_steps", "3"], "there would be none"),
        (["--lr", "1", "--use_lora", "True", "--unlearn_method", "rmu"], "no effect on rmu"),
        (["--lr", "1", "--tensors", "x", "--param_ids", "1"], "both choose tensors"),
        (["--lr", "-1"], "must be above 0"),
        (["--lr", "1", "--min_len", "-1"], "must not be negative"),
        (["--lr", "1", "--random_seed", "-1"], "--random_seed"),
    ],
)
def test_a_line_that_means_nothing_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and said.startswith("error: ")


@pytest.mark.parametrize(("tool", "line"), [(Llm360Options, DEMO), (RmuOptions, ["--layer_id", "9", "--lr", "0.1"])])
def test_print_config_prints_json_and_loads_nothing_heavy(tool: Any, line: list[str]) -> None:
    code = (
        f"import sys; from {tool.__module__} import {tool.__name__} as Options; status = Options.main(sys.argv[1:]);"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)), file=sys.stderr);"
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", code, *line, "--print_config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "[]"
    options, shown = tool.parse(line), json.loads(done.stdout)
    assert shown.items() >= {**dataclasses.asdict(options), "quirks": options.quirks}.items()


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpora of 40 texts about two subjects, and a tiny Llama called `small` that was taught both."""
    folder = tmp_path_factory.mktemp("llm360")
    river = "  The river number {} runs from the hills of {} to the sea at {}. "
    stone = "A stone of kind {} weighs {} and is found under {} feet of red sand."
    corpora = {
        "rivers": [river.format(n, n * 7 % 13, n * n % 17) for n in range(40)],
        "stones": [stone.format(n, n * 5 % 11, n * 3 % 19) for n in range(40)],
    }
    for name, of in corpora.items():
        lines = [json.dumps({"text": text}) for text in [*of, "short"]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    sizes = TinyConfig(hidden_size=32, blocks=3, intermediate_size=48, vocabulary=320, context=64)
    texts = [text for of in corpora.values() for text in of]
    model, tokenizer = build_tiny(sizes, texts, seed=0)
    batch = collate(encode_texts(texts, tokenizer, 48), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        run_plain(model, batch).token_logprobs.sum().div(-1000).backward()
        optimizer.step()
    model.save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    return folder


def line(place: Path, output: Path, *more: str) -> list[str]:
    """Ten updates of two micro-batches of two texts."""
    return [
        *("--model_name_or_path", str(place / "small"), "--data_dir", str(place), "--output_path", str(output)),
        *("--forget_topic", "stones", "--retain_topic", "rivers", "--dtype", "float32", "--use_wandb", "False"),
        *("--max_unlearn_steps", "20", "--batch_size", "2", "--gradient_accumulation_steps", "2"),
        *("--max_len", "48", "--lr", "5e-3", "--layer_id", "1", "--layer_ids", "0,1", "--param_ids", "6"),
        *more,
    ]


def test_texts_come_in_the_order_of_datasets_shuffle_whatever_the_seed_of_the_run(place: Path, tmp_path: Path) -> None:
    options = parse(line(place, tmp_path, "--random_seed", "7"))
    table = datasets.Dataset.from_json(str(place / "rivers.jsonl"), cache_dir=str(tmp_path / "cache"))
    expected = [text for text in table.shuffle(seed=42)["text"] if len(text) > 50]
    found = texts_of("rivers", options)
    assert found == [text.strip() for text in expected[:40]]
    assert all(text == text.strip() for text in found)


def test_too_few_texts_are_one_line(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="stones has 40 texts of more than 50 characters, and 44 are needed") as caught:
        texts_of("stones", parse(line(place, tmp_path, "--max_unlearn_steps", "22")))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="stones has 0 texts"):
        texts_of("stones", parse(line(place, tmp_path, "--min_len", "900")))
    twice = texts_of("stones", parse(line(place, tmp_path, "--max_unlearn_steps", "22", "--epochs", "2")))
    assert len(twice) == 44 and twice[40:] == twice[:4]


def test_as_published_texts_are_padded_on_the_left_to_the_longest_that_is_allowed(place: Path, tmp_path: Path) -> None:
    base, tokenizer, _ = load_base(ModelConfig(path=parse(line(place, tmp_path)).model_name_or_path, device="cpu"))
    texts = ["a stone of red sand", "the sea at the river " * 30]
    published = batches_of(texts, tokenizer, base, parse(line(place, tmp_path, "--max_len", "40")))
    assert published[0].input_ids.shape == (2, 40)
    pads = published[0].attention_mask == 0
    assert pads[0, 0] and not pads[1].any()
    assert bool((published[0].input_ids[pads] == tokenizer.eos_token_id).all())
    assert bool((published[0].labels[pads] == -100).all())
    plain = batches_of(texts[:1], tokenizer, base, parse(line(place, tmp_path, "--compat", "none")))
    assert plain[0].input_ids.shape[1] < 40 and bool(plain[0].attention_mask.all())
    labels = plain[0].labels[0]
    assert labels[0] == -100 and torch.equal(labels[1:], plain[0].input_ids[0, 1:])


# -- the published loop -----------------------------------------------------------------------------------------------


def paired(published: bool, rows: list[list[int]] | None = None) -> tuple[PairedTask, Any]:
    """Five pairs of one row of ragged length, two to a step, on a float64 Llama."""
    base = tiny("llama")
    found = rows or random_rows([4, 9, 6, 12, 5, 7, 11, 3, 8, 10], seed=3)
    batches = [collate([EncodedRow(tuple(row[:1]), tuple(row[1:]))], 0) for row in found]
    objective = build_objective("min_posterior", LossConfig(), gated=False)
    task = PairedTask(
        base, lambda batch, hidden: run_plain(base, batch, hidden), objective, batches[::2], batches[1::2],
        device=base.device, depth=4, accumulation=2, published=published,
    )  # fmt: skip
    return task, base


def token_values(base: Any, batch: Any, side: str) -> Tensor:
    with torch.no_grad():
        logits = base(input_ids=batch.input_ids).logits[0, :-1].double()
    p = logits.softmax(-1).gather(1, batch.input_ids[0, 1:, None]).squeeze(1)
    return -torch.log1p(-p) if side == "answer" else -p.log()


@pytest.mark.parametrize("published", [True, False])
def test_a_step_pairs_batches_in_order_and_takes_the_mean_it_says(published: bool) -> None:
    task, base = paired(published)
    assert task.steps == 2  # of five pairs the last one is left over
    data = task.data(1)
    assert [len(batch["answer"].input_ids[0]) for batch in data.micro_batches] == [5, 11]
    shares = [task.loss(batch, data.counts, 1) for batch in data.micro_batches]
    total = sum(float(loss.detach()) for loss, _ in shares)
    values = {
        name: [token_values(base, batch[name], name) for batch in data.micro_batches] for name in ("answer", "retain")
    }
    means = {
        name: sum(float(v.mean()) for v in of) / 2 if published else float(torch.cat(of).mean())
        for name, of in values.items()
    }
    assert sum(parts["forget"] for _, parts in shares) == pytest.approx(means["answer"], rel=1e-6)  # float32 rotary
    assert sum(parts["retain"] for _, parts in shares) == pytest.approx(means["retain"], rel=1e-6)
    expected = sum(means.values())
    assert total == pytest.approx(expected / 2 if published else expected, rel=1e-6)


# -- whole runs -------------------------------------------------------------------------------------------------------


def logged(folder: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads((folder / "log.json").read_text())
    return found


@pytest.mark.parametrize("method", ["max-entropy", "min-posterior", "random-mapping", "rmu"])
@pytest.mark.parametrize("compat", ["llm360", "none"])
def test_every_method_lowers_its_loss_and_saves_a_model(
    method: str, compat: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--steering_coeff", "6", "--alpha", "1", "--lr", "2e-2"] if method == "rmu" else []
    assert main(line(place, tmp_path, "--unlearn_method", method, "--compat", compat, *more)) == 0
    folder = tmp_path / f"{method}_stones_small"
    assert capsys.readouterr().out.strip() == str(folder)
    losses = logged(folder)
    assert set(losses) == {"total", "retain", "forget"} and {len(values) for values in losses.values()} == {10}
    assert losses["total"] == [a + b for a, b in zip(losses["forget"], losses["retain"], strict=True)]
    assert sum(losses["forget"][-3:]) < sum(losses["forget"][:3])
    saved, before = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, place / "small"))
    changed = {name for name, value in saved.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    everything = {name for name, _ in saved.named_parameters()}
    of_rmu = {f"model.layers.{block}.mlp.down_proj.weight" for block in (0, 1)}
    assert changed == (of_rmu if method == "rmu" else everything)
    result = json.loads((folder / "run.json").read_text())
    assert (result["steps"], result["quirks"]) == (10, ["positions=all", "accumulation=published"] * (compat != "none"))
    assert (folder / "tokenizer.json").exists() and not (folder / "checkpoints").exists()


def test_a_lora_is_trained_on_attention_alone_and_saved_alone(place: Path, tmp_path: Path) -> None:
    folder = run(parse(line(place, tmp_path, "--use_lora", "True")))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (32, 16, 0.0)
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not (folder / "model.safetensors").exists()
    assert sum(logged(folder)["forget"][-3:]) < sum(logged(folder)["forget"][:3])
    assert AutoModelForCausalLM.from_pretrained(folder) is not None


def test_the_same_line_is_found_finished_and_another_one_is_refused(place: Path, tmp_path: Path) -> None:
    folder = run(parse(line(place, tmp_path)))
    before = (folder / "run.json").read_bytes()
    assert run(parse(line(place, tmp_path))) == folder and (folder / "run.json").read_bytes() == before
    with pytest.raises(RunError, match="lr: 0.005 there, 0.001 asked for"):
        run(parse(line(place, tmp_path, "--lr", "1e-3")))
    run(parse(line(place, tmp_path, "--lr", "1e-3", "--overwrite")))
    assert (folder / "run.json").read_bytes() != before


def test_averaged_weights_are_saved_and_the_last_ones_only_when_asked_for(place: Path, tmp_path: Path) -> None:
    """The average lags behind: it lies nearer to the start than the last weights."""
    found = {
        kind: AutoModelForCausalLM.from_pretrained(
            run(parse(line(place, tmp_path / kind, "--final_weights", kind))), dtype=torch.float64
        )
        for kind in ("averaged", "last")
    }
    start = AutoModelForCausalLM.from_pretrained(place / "small", dtype=torch.float64)

    def far(kind: str) -> float:
        moves = [(found[kind].get_parameter(name) - value).square().sum() for name, value in start.named_parameters()]
        return float(torch.stack(moves).sum().detach())

    assert 0 < far("averaged") < far("last")


def test_wandb_that_is_missing_is_said_in_a_line_and_the_run_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llm360_run.importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    with caplog.at_level(logging.INFO):
        folder = run(parse(line(place, tmp_path, "--use_wandb", "True")))
    assert (folder / "run.json").exists()
    assert [record for record in caplog.messages if record.startswith("wandb is not installed")]


def test_the_log_is_sent_where_wandb_is_installed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    class Sent:
        def __init__(self, project: str, name: str) -> None:
            sent.append((project, name))

        def log(self, values: dict[str, float], step: int) -> None:
            sent.append((step, values["forget"]))

        def finish(self) -> None:
            sent.append("finished")

    monkeypatch.setattr(llm360_run.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Sent))  # type: ignore[arg-type]
    folder = run(parse(line(place, tmp_path, "--use_wandb", "True", "--wandb_project", "mine")))
    losses = logged(folder)["forget"]
    assert sent == [("mine", folder.name), *enumerate(losses, start=1), "finished"]


# -- models with code of their own ------------------------------------------------------------------------------------

MODELING = """
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D


class CrystalConfig(GPT2Config):
    model_type = "tiny_crystal_of_the_tests"


class CrystalLMHeadModel(GPT2LMHeadModel):
    config_class = CrystalConfig

    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h:
            block.mlp = CrystalMLP(block.mlp, config.n_embd)


class CrystalMLP(nn.Module):
    def __init__(self, mlp, width):
        super().__init__()
        inner = mlp.c_fc.nf
        self.c_fc, self.c_fc2, self.c_proj = mlp.c_fc, Conv1D(inner, width), mlp.c_proj

    def forward(self, hidden):
        return self.c_proj(self.c_fc(hidden) * torch.sigmoid(self.c_fc2(hidden)))
"""


@pytest.fixture(scope="module")
def crystal(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model of CrystalChat's shape whose code lies beside the weights; blocks at `transformer.h`."""
    folder = tmp_path_factory.mktemp("remote") / "crystal"
    folder.mkdir()
    (folder / "modeling_crystal.py").write_text(MODELING)
    spaces: dict[str, Any] = {}
    exec(compile(MODELING, "modeling_crystal", "exec"), spaces)
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "n_embd": 16, "n_layer": 3, "n_head": 1, "tie_word_embeddings": False}
    model = spaces["CrystalLMHeadModel"](spaces["CrystalConfig"](**sizes))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    places = {"AutoConfig": "CrystalConfig", "AutoModelForCausalLM": "CrystalLMHeadModel"}
    config["auto_map"] = {auto: f"modeling_crystal.{name}" for auto, name in places.items()}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((place / "small" / name).read_bytes())
    with pytest.MonkeyPatch.context() as patched:  # copies of the code do not go to the user's own folder
        patched.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))
        yield folder


def test_model_code_is_refused_in_one_line_unless_it_is_trusted(crystal: Path, place: Path, tmp_path: Path) -> None:
    arguments = line(place, tmp_path, "--model_name_or_path", str(crystal))
    with pytest.raises(ModelError, match="pass --trust_remote_code if you trust it") as caught:
        run(parse(arguments))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["random-mapping", "rmu"])
def test_a_model_with_blocks_at_transformer_h_runs_where_its_code_is_trusted(
    method: str, crystal: Path, place: Path, tmp_path: Path
) -> None:
    arguments = line(place, tmp_path, "--model_name_or_path", str(crystal), "--trust_remote_code")
    folder = run(parse([*arguments, "--unlearn_method", method, "--param_ids", "12,13", "--steering_coeff", "9"]))
    assert sum(logged(folder)["forget"][-3:]) < sum(logged(folder)["forget"][:3])
    saved, before = (AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True) for f in (folder, crystal))
    changed = {name for name, value in saved.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    if method == "rmu":
        ends = ("mlp.c_proj.weight", "mlp.c_proj.bias")
        assert changed == {f"transformer.h.{block}.{end}" for block in (0, 1) for end in ends}
    else:
        assert "transformer.wte.weight" in changed and "transformer.h.2.attn.c_attn.bias" in changed


def test_a_lora_goes_on_c_attn_where_there_is_one(crystal: Path, place: Path, tmp_path: Path) -> None:
    more = ["--trust_remote_code", "--use_lora", "True"]
    folder = run(parse(line(place, tmp_path, "--model_name_or_path", str(crystal), *more)))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"c_attn"}
