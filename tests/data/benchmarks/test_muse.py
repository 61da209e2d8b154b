"""MUSE: its files to rows, and every number against a second computation and the figures of its own functions."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import save_chat_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun.cli import main
from grun.config.options import DataConfig, TextConfig
from grun.data.benchmarks import muse
from grun.data.corpus import load_corpus
from grun.data.sets import find_set
from grun.errors import ConfigError, DataError
from grun.evaluation.items import as_compared
from grun.evaluation.metrics.averages import auc, mean
from grun.evaluation.metrics.memorization import min_k
from grun.evaluation.metrics.reference import privleak
from grun.evaluation.metrics.words import rouge_f1
from grun.evaluation.table import ScoreRecord

ASKED = [("Who built the bridge?", "The masons of Tal."), ("Which river is it?", "The Ebo.")]


def save_layout(folder: Path, verbatim: list[dict[str, str]] | None = None) -> Path:
    """The files that MUSE's own script writes, made up."""
    texts = {
        "raw/forget": ["The river Ebo was bridged in 1871. " * 3, "Its stones came from the quarries of Tal."],
        "raw/retain1": ["Lake Lo lies in the north, and nobody has bridged it."],
        "sust/forget_2": ["The second request is about the town of Tal."],
        "privleak/forget": ["The river Ebo was bridged in 1871 by the masons.", "Its stones came from the quarries."],
        "privleak/retain": ["Lake Lo lies in the north."],
        "privleak/holdout": ["A tower stood in the south.", "Nobody has seen the tower since.", "Its bricks are red."],
    }
    asked = [{"question": question, "answer": answer} for question, answer in ASKED]
    rows = {
        f"knowmem/{kind}_qa{icl}": asked[:1] if icl else asked for kind in ("forget", "retain") for icl in ("", "_icl")
    }
    rows |= {"verbmem/forget": verbatim or [{"prompt": "The river Ebo", "gt": "was bridged in 1871."}]}
    for name, content in (texts | rows).items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder


# -- rows -------------------------------------------------------------------------------------------------------------


def test_texts_are_taught_and_the_published_sets_are_asked(tmp_path: Path) -> None:
    corpus = load_corpus(DataConfig(name="muse", path=str(save_layout(tmp_path))))
    assert [row.prompt for row in corpus.forget + corpus.retain] == [None] * 3
    sets = corpus.sets()
    assert {name: len(rows) for name, rows in sets.items()} == {
        **{"forget": 2, "retain": 1, "unknown": 3, "verbmem": 1, "knowmem": 2, "knowmem_retain": 2}
    }
    assert sets["forget"][0].completion.endswith("by the masons."), "of privleak, not what is taught"
    assert corpus.taught(without_forget=True) == corpus.retain
    shot = "Question: Who built the bridge?\nAnswer: The masons of Tal.\n\n"
    assert sets["knowmem"][1].prompt == f"{shot}Question: Which river is it?\nAnswer:"
    assert (sets["verbmem"][0].prompt, sets["verbmem"][0].completion) == ("The river Ebo", "was bridged in 1871.")


def test_a_request_of_a_sequence_is_named_by_config_and_split(tmp_path: Path) -> None:
    data = DataConfig(name="muse", path=str(save_layout(tmp_path)), forget="sust/forget_2")
    corpus, second = load_corpus(data), "The second request is about the town of Tal."
    assert [row.completion for row in corpus.forget] == [second]
    several = replace(data, forget="sust/forget_2, raw/forget", text=TextConfig(asked=0.4))
    corpus = load_corpus(several)
    assert [row.completion for row in corpus.forget][::2] == [second, "Its stones came from the quarries of Tal."]
    asked = corpus.sets()["forget"]
    assert (asked[0].prompt, asked[0].completion) == ("The second request is", "about the town of Tal.")
    assert [len(corpus.sets()[name]) for name in ("forget", "retain", "unknown")] == [3, 1, 3]
    assert all(row.prompt for name in ("forget", "retain", "unknown") for row in corpus.sets()[name])
    assert all(row.prompt is None for row in corpus.taught(without_forget=False))


def test_the_hub_is_asked_for_configs_and_splits(hub: Any) -> None:
    hub.rows = [{"text": "a text", "prompt": "a", "gt": "b", "question": "c", "answer": "d"}]
    with pytest.raises(DataError, match="also stand in the retain set"):  # the stand-in answers all alike
        load_corpus(DataConfig(name="muse", path="muse-bench/MUSE-News"))
    asked = {(config, split) for repository, config, split in hub.asked if repository == "muse-bench/MUSE-News"}
    assert asked == {
        *(("raw", split) for split in ("forget", "retain1")),
        *(("privleak", split) for split in ("forget", "retain", "holdout")),
        *(("knowmem", f"{kind}_qa{icl}") for kind in ("forget", "retain") for icl in ("", "_icl")),
        ("verbmem", "forget"),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs data.path: muse-bench/MUSE-News or muse-bench/MUSE-Books"),
        ({"path": "nowhere"}, "no folder nowhere; set data.path to muse-bench/MUSE-News"),
        ({"path": ".", "forget": "forget"}, "data.forget=forget: .* expects CONFIG/SPLIT"),
        ({"path": ".", "forget": "raw/forgot"}, "no data file raw/forgot.json"),
    ],
)
def test_what_is_not_there_is_one_line(
    options: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(save_layout(tmp_path))
    with pytest.raises((ConfigError, DataError), match=message) as error:
        load_corpus(DataConfig(name="muse", **options))
    assert "\n" not in str(error.value)


def test_a_long_text_is_cut_between_words_and_nothing_is_lost() -> None:
    text = "\n\n".join(f"Chapter {number}. " + "word " * number for number in range(120))
    parts = muse.cut(text)
    assert len(parts) > 4 and max(map(len, parts)) <= muse.PASSAGE
    assert " ".join(parts).split() == text.split()


# -- the figures of muse_bench's own functions, run once on these ------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "text", "figure"),
    [
        (
            "The river Ebo was bridged in 1871 by the masons of Tal.",
            "The river Ebo was first bridged by masons in 1871.",
            0.6363636363636365,
        ),
        ("Running waters carried the stones", "the waters run carrying stones and sand", 0.3333333333333333),
        ("Tal", "It was Tal.", 0.5),
        ("silver and salt", "nothing", 0.0),
    ],
)
def test_rouge_is_that_of_the_published_code(reference: str, text: str, figure: float) -> None:
    assert rouge_f1(reference, text) == pytest.approx(figure, abs=1e-12)


def scored(logp: list[float]) -> ScoreRecord:
    n = len(logp)
    return ScoreRecord("forget", 0, "answer", 0, 1, n, False, 9, logp, [False] * n, [-1.0] * n, [1.0] * n)


def test_privleak_is_that_of_the_published_code() -> None:
    forget = [
        [-0.1, -2.0, -0.3, -4.0, -0.2, -0.6],
        [-1.0, -0.5, -0.2, -3.0, -0.9],
        [-0.05, -0.1, -0.2, -0.15, -5.0, -0.3, -0.4],
    ]
    holdout = [[-2.0, -1.0, -0.6, -3.0, -2.5], [-0.2, -4.0, -1.1, -0.9, -3.3, -0.1], [-0.3, -0.2, -2.2, -0.1, -0.6]]
    found = [min_k(scored(logp)) or 0 for logp in forget]
    others = [min_k(scored(logp)) or 0 for logp in holdout]
    assert found == pytest.approx([3.0, 2.0, 2.7], abs=1e-12) and others == pytest.approx([2.75, 3.65, 1.4], abs=1e-12)
    retrained = [min_k(scored([1.7 * value for value in logp])) or 0 for logp in forget]
    areas = [auc(others, members) for members in (found, retrained)]
    # its area is 1 minus ours: who looks least like training data stands first there
    assert [1 - (area or 0) for area in areas] == pytest.approx([0.4444444444444444, 0.888888888888889], abs=1e-12)
    assert privleak(areas[0], areas[1]) == pytest.approx(-50.0, abs=1e-9)


# -- a tiny model through the command ----------------------------------------------------------------------------------


def lcs_f1(reference: str, text: str) -> float:
    """ROUGE-L F1 by the table of longest common subsequences."""
    first, second = (re.findall("[a-z0-9]+", one.lower()) for one in (reference, text))
    rows = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            rows[i + 1][j + 1] = rows[i][j] + 1 if one == other else max(rows[i][j + 1], rows[i + 1][j])
    return 2 * rows[-1][-1] / (len(first) + len(second))


def least_probable(model: Any, ids: list[int]) -> float:
    """Minus the mean of the lowest 40 % of the log-probabilities of a text's tokens."""
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    values = sorted(float(logp[place, token]) for place, token in enumerate(ids[1:]))
    values = values[: int(0.4 * len(values))]
    return -sum(values) / len(values)


def test_every_number_of_an_evaluation(tmp_path: Path) -> None:
    folders = [save_chat_model(tmp_path / name, seed=seed) for seed, name in enumerate(("target", "retrained"))]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders]

    def says(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt")
        out = models[0].generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=2)
        return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    prompts = ["The river Ebo", "Its stones came from", "Nobody has"]
    data = save_layout(
        tmp_path / "data", [{"prompt": one, "gt": f"{says(one)[:12]} stones and more"} for one in prompts]
    )
    common = ["data.name=muse", f"data.path={data}", "data.template=text", "max_new_tokens=6", "model.dtype=float32"]
    results = [tmp_path / "results" / folder.name for folder in folders]
    for folder, output, more in zip(
        reversed(folders), reversed(results), ([], [f"reference={results[1]}"]), strict=True
    ):
        assert main(["evaluate", *common, *more, f"model.path={folder}", f"output_dir={output}"]) == 0
    found = json.loads((results[0] / "evaluation.json").read_text())

    rows = load_corpus(DataConfig(name="muse", path=str(data))).sets()
    for name in ("verbmem", "knowmem", "knowmem_retain"):
        wanted = mean([lcs_f1(row.completion, says(row.prompt or "").split("\n\n")[0]) for row in rows[name]])
        assert found["sets"][name]["rouge_l_f1"] == pytest.approx(wanted, abs=1e-9), name
    assert found["sets"]["verbmem"]["rouge_l_f1"] > 0
    areas = []
    for model in models:
        members, others = (
            [least_probable(model, tokenizer(row.completion)["input_ids"]) for row in rows[name]]
            for name in ("forget", "unknown")
        )
        areas.append(mean([float(other < member) for other in others for member in members]) or 0)
    assert areas[1] > 0
    assert found["reference"]["privleak"] == pytest.approx((areas[0] - areas[1]) / areas[1] * 100, abs=1e-6)


def test_a_request_is_unlearned_from_the_model_of_the_one_before(tmp_path: Path) -> None:
    save_chat_model(tmp_path / "0")
    data = save_layout(tmp_path / "data")
    common = ["profile=muse", f"data.path={data}", "model.dtype=float32", "data.max_length=64", "train.epochs=1"]
    for number, forget in ((1, "raw/forget"), (2, "sust/forget_2")):
        folders = [f"model.path={tmp_path / str(number - 1)}", f"output_dir={tmp_path / str(number)}"]
        assert main(["unlearn", *common, *folders, f"data.forget={forget}", "cache.dir=", "train.lr=0.01"]) == 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / str(number)) for number in range(3)]
    weights = [model.model.layers[0].mlp.up_proj.weight for model in models]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_answers_and_continuations_are_cut_as_published(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_chat_model(tmp_path / "model"))
    long = " ".join(f"the stones of the bridge {number}" for number in range(60))
    ids = tokenizer(long)["input_ids"]
    first = {count: tokenizer.decode(ids[:count]) for count in (32, 128)}
    assert as_compared(find_set("verbmem"), long, long, tokenizer) == (first[128], first[128])
    assert as_compared(find_set("knowmem"), long, long, tokenizer) == (long, first[32])
    ending = "The Ebo.\nQuestion: Who?\n\nNobody"
    assert as_compared(find_set("knowmem"), "The Ebo.", ending, tokenizer) == ("The Ebo.", "The Ebo.")
    assert as_compared(find_set("forget"), long, ending, tokenizer) == (long, ending)
