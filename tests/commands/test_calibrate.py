"""`python -m grun calibrate`: gates of a finished adapter stand where rows to keep open them at a stated rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chat_model import save_chat_model
from demo import own_rows, refused, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun import GrunModel
from grun.cli import main
from grun.data.encoding import EncodedRow
from grun.data.templates import TEMPLATES, encode_prompt
from grun.errors import ConfigError
from grun.method.adapter import AdapterConfig
from grun.requests.store import RequestStore
from grun.training.calibration import calibrate, gate_scores
from grun.training.gate_fit import Prompts

FORGET = ["Japan", "Egypt"]
RETAIN = ["Norway", "Chile", "Kenya", "Peru", "Canada", "Poland"]
OTHERS = ["India", "Cuba", "Nepal", "Spain", "Ghana", "Malta", "Oman", "Chad", "Laos"]
ASKED = ["What is the capital of {}?", "Name the capital of {}."]
FIT = [
    *("method.gate_blocks=[0]", "method.gate_pool=maxmin", "method.edit_write=sticky", "method.gate_fit=logistic"),
    *("method.blocks=[1,2]", "method.rank=2", "objective=idk", "train.epochs=1", "train.batch_size=4"),
    *("data.name=jsonl", "data.group=country", "model.device=cpu", "cache.dir=null"),
]


def rows_of(countries: list[str]) -> list[dict[str, str]]:
    return [{"question": a.format(c), "answer": "A city.", "country": c} for c in countries for a in ASKED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters on one model: `fitted`, one gate for all edits, and `published`, a gate for each."""
    path = tmp_path_factory.mktemp("calibrate")
    save_chat_model(path / "model")
    write_rows(path / "others.jsonl", *rows_of(OTHERS))
    own = [f"model.path={path / 'model'}", *own_rows(path, rows_of(FORGET), rows_of(RETAIN))]
    assert main(["unlearn", *FIT, *own, f"output_dir={path / 'fitted'}"]) == 0
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(path / "model")
    GrunModel.wrap(base, blocks=[0, 2], rank=2, template=TEMPLATES.get("chat")).save_pretrained(path / "published")
    return path


def command(folder: Path, name: str, *arguments: str, adapter: str = "fitted") -> list[str]:
    own = [f"adapter={folder / adapter}", f"output_dir={folder / name}", f"model.path={folder / 'model'}"]
    return ["calibrate", *own, "model.device=cpu", *arguments]


def asked(folder: Path, name: str, countries: list[str]) -> tuple[GrunModel, list[bool], list[bool]]:
    """The adapter, and of each question whether a gate is open and whether the logits are not the base's to the bit."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = GrunModel.from_pretrained(base, folder / name)
    opened, changed = [], []
    for row in rows_of(countries):
        ids = torch.tensor([encode_prompt(TEMPLATES.get("chat"), tokenizer, row["question"])])
        with torch.no_grad():
            with model.disabled():
                plain = model.base(ids).logits
            output = model(ids, prompt_lengths=torch.tensor([ids.shape[1]]))
        opened.append(any(float(gate.max()) >= float(model.gate_threshold or 0) for gate in output.gates.values()))
        changed.append(not torch.equal(output.logits, plain))
    return model, opened, changed


@pytest.mark.parametrize("adapter", ["fitted", "published"])
def test_a_new_adapter_opens_on_no_more_than_was_promised_and_else_is_the_base_to_the_bit(
    folder: Path, adapter: str
) -> None:
    before = {file.name: file.read_bytes() for file in (folder / adapter).iterdir() if file.is_file()}
    rows = [f"rows={folder / 'others.jsonl'}", "data.group=country", "false_positives=0.25"]
    assert main(command(folder, f"new_{adapter}", *rows, adapter=adapter)) == 0
    assert before == {file.name: file.read_bytes() for file in (folder / adapter).iterdir() if file.is_file()}
    about = json.loads((folder / f"new_{adapter}" / "run.json").read_text())["calibration"]
    model, opened, changed = asked(folder, f"new_{adapter}", OTHERS)
    shares = torch.tensor(opened).view(len(OTHERS), len(ASKED)).double().mean(1)
    assert about["bound"] == pytest.approx((float(shares.sum()) + 1) / (len(OTHERS) + 1))
    assert about["bound"] <= 0.25 and about["calibration"] == len(OTHERS)
    assert opened == changed and any(opened) and not all(opened)
    assert (model.config.gate_bound, model.config.gate_calibration) == (about["bound"], 9)
    assert about["opened"] == pytest.approx(sum(opened) / len(opened))


def test_of_a_fitted_gate_the_bias_alone_moves_and_of_others_nothing(folder: Path) -> None:
    weights = {}
    for adapter in ("fitted", "published"):
        rows = [f"rows={folder / 'others.jsonl'}", "false_positives=0.2"]
        assert main(command(folder, f"alone_{adapter}", *rows, adapter=adapter)) == 0
        for name in (adapter, f"alone_{adapter}"):
            base = AutoModelForCausalLM.from_pretrained(folder / "model")
            weights[name] = GrunModel.from_pretrained(base, folder / name)
    moved = {
        name
        for name, tensor in weights["fitted"].state_dict().items()
        if not torch.equal(tensor, weights["alone_fitted"].state_dict()[name])
    }
    assert moved == {"pooled.gate.0.bias"}
    assert weights["alone_fitted"].gate_threshold == 0.5
    for name, tensor in weights["published"].state_dict().items():
        assert torch.equal(tensor, weights["alone_published"].state_dict()[name])
    assert weights["alone_published"].gate_threshold not in (None, 0.5)


def test_what_the_training_says_of_itself_stays_and_a_store_takes_the_result(folder: Path) -> None:
    """And a file of prompts without answers is enough."""
    prompts = write_rows(folder / "prompts.jsonl", *({"question": row["question"]} for row in rows_of(OTHERS)))
    assert main(command(folder, "kept", f"rows={prompts}", "false_positives=0.1")) == 0
    run, trained = (json.loads((folder / name / "run.json").read_text()) for name in ("kept", "fitted"))
    assert {name: run[name] for name in ("command", "config", "gate_fit")} == {
        name: trained[name] for name in ("command", "config", "gate_fit")
    }
    assert run["calibration"]["calibration"] == 18 and run["calibration"]["rows"]
    forgotten = asked(folder, "kept", FORGET)[1]
    assert run["calibration"]["recall"] == pytest.approx(sum(forgotten) / len(forgotten))
    assert AdapterConfig.read(folder / "kept")[0].gate_recall == run["calibration"]["recall"]
    assert "such as those of the 18 groups" in (folder / "kept" / "README.md").read_text()
    assert main(["requests", "add", f"store={folder / 'store'}", "id=one", f"adapter={folder / 'kept'}"]) == 0
    assert RequestStore.open(folder / "store").check() == []


def test_rows_that_the_gate_was_made_from_are_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(command(folder, "warned", "set=retain", "false_positives=0.2")) == 0
    assert "12 of the 12 rows to keep are among those that the adapter was made from" in caplog.text
    assert "the gate was fitted with data.group=country" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["rows=others.jsonl"], 2, "false_positives is not set"),
        (["false_positives=0.1"], 2, "by rows=FILE or by set=NAME"),
        (["false_positives=0.1", "rows=others.jsonl", "set=retain"], 2, "by rows=FILE or by set=NAME"),
        (["false_positives=0.1", "set=nowhere"], 2, "set=nowhere is no set of these data that must stay; there are: r"),
        (["false_positives=0.1", "set=forget"], 2, "set=forget is no set of these data that must stay"),
        (
            ["false_positives=0.05", "rows=others.jsonl"],
            2,
            "false_positives=0.05 needs 19 rows to keep, or groups of them (data.group), and there are 18, which can "
            "promise 0.0526 and no less; give more, or set false_positives=0.0527",
        ),
        (
            ["false_positives=0.05", "rows=others.jsonl", "data.group=country"],
            2,
            "there are 9, which can promise 0.1",
        ),
        (["false_positives=0.2", "rows=forget.jsonl"], 1, "4 of the 4 rows to keep ask what is to be forgotten"),
        (["false_positives=0.2", "rows=missing.jsonl"], 1, "missing.jsonl"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(
    folder: Path, arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [word.replace("rows=", f"rows={folder}/") for word in arguments]
    refused(capsys, command(folder, "refused", *arguments), status, message)
    assert not (folder / "refused" / "run.json").exists()


def test_an_adapter_without_a_gate_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    GrunModel.wrap(base, blocks=[1], gate="none").save_pretrained(folder / "reft")
    arguments = [f"rows={folder / 'others.jsonl'}", "false_positives=0.2"]
    refused(capsys, command(folder, "refused", *arguments, adapter="reft"), 2, "the adapter has no gate")


def test_the_bound_holds_for_new_groups_in_200_draws(folder: Path) -> None:
    """Rows of a group are alike; the mean over draws of the share of new groups' rows that open is at most the bound.

    A real gate on random prompts: each draw calibrates on 9 of 60 groups and counts the other 51.
    """
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = GrunModel.from_pretrained(base, folder / "fitted")
    generator = torch.Generator().manual_seed(0)
    groups = []
    for _ in range(60):
        stem = torch.randint(5, 300, (6,), generator=generator).tolist()
        ends = torch.randint(5, 300, (3, 2), generator=generator).tolist()
        groups.append([EncodedRow((*stem, *end), ()) for end in ends])
    scores = gate_scores(model, [row for group in groups for row in group], 2).view(60, 3)
    start = model.pooled.gate[0].bias.detach().clone()
    rates: list[float] = []
    bounds: list[float] = []
    for _ in range(200):
        order = torch.randperm(60, generator=generator)
        chosen, new = order[:9].tolist(), order[9:]
        rows = [row for number in chosen for row in groups[number]]
        units = [str(number) for number in chosen for _ in range(3)]
        with torch.no_grad():
            model.pooled.gate[0].bias.copy_(start)
        result = calibrate(model, Prompts(rows, units), [], 0.2, 2)
        moved = float(start - model.pooled.gate[0].bias.detach())
        rates.append(float((scores[new] > moved).double().mean()))
        bounds.append(result.bound)
    spread = torch.tensor(rates).std() / len(rates) ** 0.5
    assert sum(rates) / len(rates) <= sum(bounds) / len(bounds) + 3 * float(spread)
    assert all(0.1 < bound < 0.2 + 1e-9 for bound in bounds)


def test_gates_that_are_open_by_all_that_float32_has_cannot_be_shut(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = GrunModel.wrap(base, blocks=[0], gate_bias=100.0).eval()
    rows = [EncodedRow((5, 6, number), ()) for number in range(7, 17)]
    with pytest.raises(ConfigError, match="a probability of 1 in float32"):
        calibrate(model, Prompts(rows, [str(row) for row in rows]), [], 0.1, 2)
