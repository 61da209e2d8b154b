"""RWKU: its files to rows, every number against a second computation, and the countries in its layout end to end."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import save_chat_model
from known_countries import CONFIG, SMALL, answered
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun.cli import main
from grun.config.options import DataConfig
from grun.data.answers import FILE
from grun.data.benchmarks import rwku
from grun.data.corpus import Corpus, Subject, load_corpus, load_knowledge
from grun.errors import ConfigError, DataError
from grun.evaluation import probe
from grun.evaluation.metrics.averages import mean
from grun.evaluation.metrics.words import rouge_union

KING, LEE = "Stephen King", "Bruce Lee"


def probe_of(query: str, answer: str, level: int, kind: str = "simple", subject: str = KING) -> dict[str, str]:
    return {"query": query, "answer": answer, "level": str(level), "type": kind, "subject": subject}


def save_layout(folder: Path) -> Path:
    """Files of two targets, made up."""
    asked = ("Who wrote Carrie?", "Stephen King")
    task = {"question": "1 + 1?", "choices": ["1", "2"], "answer": 1, "task": "arithmetic", "examples": []}
    files: dict[str, list[dict[str, Any]]] = {
        "positive": [{"text": f"{name} was born.", "subject": name, "intro": "", "id": "0"} for name in (KING, LEE)],
        "reject": [
            {"instruction": f"Who is {name}?", "input": "", "output": "I do not know.", "subject": name}
            for name in (KING, LEE)
        ],
        "forget_level1": [probe_of("Carrie is by ___.", "Stephen King", 1)],
        "forget_level2": [probe_of(*asked, 2), probe_of("Who was in Enter the Dragon?", "Bruce Lee", 2, subject=LEE)],
        "forget_level3": [
            probe_of(f"{asked[0]} The answer is", asked[1], 3, "affirmative suffix"),
            probe_of(f"Question: A?\nAnswer: B\nQuestion: {asked[0]}", asked[1], 3, "In-Context Learning"),
            probe_of(*asked, 3, "role playing"),
            probe_of(*asked, 3, "of a later version"),
        ],
        "neighbor_level1": [probe_of("It was filmed by ___.", "De Palma", 1)],
        "neighbor_level2": [probe_of("Who filmed it?", "De Palma", 2)],
        "forget_mia": [{"text": "King wrote it.", "subject": KING, "ngram": 7}],
        "retain_mia": [{"text": "De Palma filmed it.", "subject": KING, "ngram": 7}],
        "retain_mmlu": [task | {"subject": name} for name in (KING, LEE)],
        "triviaqa": [{"question": "Which river?", "answers": ["Ebo", "the Ebo"], "subject": KING}],
    }
    (folder / "All").mkdir(parents=True)
    for name, rows in files.items():
        (folder / "All" / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def load(folder: Path, forget: str = KING, **options: Any) -> Corpus:
    return load_corpus(DataConfig(name="rwku", path=str(folder), forget=forget, **options))


# -- rows -------------------------------------------------------------------------------------------------------------


def test_texts_are_unlearned_from_and_the_published_probes_are_asked(tmp_path: Path) -> None:
    corpus = load(save_layout(tmp_path))
    assert [(row.prompt, row.completion) for row in corpus.forget] == [(None, f"{KING} was born.")]
    assert [row.completion for row in corpus.retain] == [f"{LEE} was born."]
    assert corpus.subjects == [Subject((KING,), "any", (KING,))] and corpus.keywords == [KING]
    sets = corpus.sets()
    one = ("forget_level1", "forget_level2", "neighbor_level1", "neighbor_level2", "mia_forget", "mia_retain")
    kinds = ("level3_affirmative_suffix", "level3_incontext_learning", "level3_role_playing")
    assert {name: len(rows) for name, rows in sets.items()} == {
        **dict.fromkeys(("forget", "retain", *one, *kinds, "utility_factuality"), 1),
        "forget_level3": 4,
    }
    brief, question = "Please briefly answer the following question.\n", "Question: Who wrote Carrie?"
    blank = "Please complete the blank in the following question.\nQuestion: Carrie is by ___.\nAnswer:"
    assert sets["forget_level1"][0].prompt == blank
    assert sets["forget"] == sets["forget_level2"] and sets["forget"][0].fact == "Stephen King"
    assert [row.prompt for row in sets["forget_level3"]] == [
        f"{brief}{question} The answer is",
        f"{brief}Question: A?\nAnswer: B\n{question}\nAnswer:",
        *[f"{brief}{question}\nAnswer:"] * 2,
    ]
    assert sets["utility_factuality"][0].fact == "Ebo | the Ebo"


def test_several_targets_and_questions_with_refusals(tmp_path: Path) -> None:
    corpus = load(save_layout(tmp_path), f"train_refusal_llama3/{KING} | {LEE}")
    assert [row.prompt for row in corpus.forget] == [f"Who is {name}?" for name in (KING, LEE)]
    assert not corpus.retain and len(corpus.sets()["forget"]) == 2
    (kept,) = load(tmp_path, f"train_refusal_llama3/{KING}", retain="train_positive_llama3").retain
    assert kept.completion == f"{LEE} was born."


def test_multiple_choice_of_the_target(tmp_path: Path) -> None:
    found = load_knowledge(DataConfig(name="rwku", path=str(save_layout(tmp_path)), forget=KING))
    assert [(row.question, row.answer, row.subject) for row in found.choices["general"]] == [
        ("1 + 1?", 1, "arithmetic")
    ]


def test_the_hub_is_asked_for_configs_and_splits(hub: Any) -> None:
    text = {"text": "a text", "answers": ["b"], "question": "c"}
    hub.rows = [text | probe_of("a", "b", 2), text | {"subject": LEE}]
    load_corpus(DataConfig(name="rwku", forget=KING))
    tests = [*rwku.PROBES, "mia_forget", "mia_retain", "utility_factuality"]
    wanted = {("train_positive_llama3", "train"), *((name, "test") for name in tests)}
    assert {*hub.asked} == {("jinzhuoran/RWKU", *one) for one in wanted}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere"}, "no folder nowhere; set data.path to a folder of RWKU's layout"),
        ({"forget": "Steven King"}, "unknown RWKU target .*'Steven King': did you mean 'Stephen King'"),
        ({"forget": f"train_pair_llama3/{KING}"}, "data.forget: texts 'train_pair_llama3': .*known: train_original"),
        ({"forget": f"train_original_passage/{KING}"}, "no data file All/passage.json"),
        ({"retain": "retain1"}, "unknown data.retain 'retain1': known: train_original_passage"),
    ],
)
def test_what_is_not_there_is_one_line(
    options: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(save_layout(tmp_path))
    with pytest.raises((ConfigError, DataError), match=message) as error:
        load_corpus(DataConfig(**{"name": "rwku", "path": ".", "forget": KING} | options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*rwku.PROBES, "forget_mia", "retain_mia", "positive"])
def test_a_missing_file_and_a_damaged_row_are_named(name: str, tmp_path: Path) -> None:
    path = save_layout(tmp_path) / "All" / f"{name}.json"
    path.write_text(json.dumps([7]), encoding="utf-8")
    with pytest.raises(DataError, match=rf"{name}.json row 1: expected an object"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=rf"no data file .*All/{name}.json"):
        load(tmp_path)


# -- the figures of the published function (the package rouge 1.0.1), run once on these --------------------------------


@pytest.mark.parametrize(
    ("reference", "text", "figure"),
    [
        ("Tal, on the river Ebo", "He was born in Tal, on the Ebo. The river is long.", 1.0),
        ("Stephen King wrote it. It was Carrie.", "It was Carrie. Stephen wrote it", 0.8571428571428571),
        ("the bridge of the masons", "the masons of the bridge built the bridge", 0.5),
        ("Portland, Maine. ", "Portland. ", 0.0),
        ("a b c d", "d c b a", 0.25),
        ("Carrie", "", 0.0),  # there the answer becomes NOANSWER
    ],
)
def test_rouge_is_that_of_the_published_code(reference: str, text: str, figure: float) -> None:
    assert rouge_union(reference, text) == pytest.approx(figure, abs=1e-12)


# -- the countries in this layout, from the command to the evaluation of a tiny model ----------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with a model and `data`, and the command that was named to go on with."""
    folder = tmp_path_factory.mktemp("rwku")
    save_chat_model(folder / "model")
    (folder / "known").mkdir()
    chosen = replace(SMALL, forget=["Japan"], neighbors=2, heldout=2, unknown=1, count=10)
    answered(folder / "known", replace(CONFIG, countries=chosen))
    lines = [json.loads(line) for line in (folder / "known" / FILE).read_text(encoding="utf-8").splitlines()]
    whole = "".join(json.dumps(one | {"answer": f"{one['question']} {one['answer']}"}) + "\n" for one in lines)
    (folder / "known" / FILE).write_text(whole, encoding="utf-8")
    options = [f"countries.{name}={value}" for name, value in vars(chosen).items() if name != "forget"]
    source = ["source=countries", "format=rwku", "countries.forget=[Japan]", f"model.path={folder / 'model'}"]
    with pytest.MonkeyPatch.context() as patch:
        known = str(folder / "known")
        patch.setattr(probe, "asked_first", lambda asking: replace(asking, data=replace(asking.data, path=known)))
        said: list[str] = []
        patch.setattr("grun.commands.corpora.log.info", lambda text, *more: said.append(text % more))
        assert main(["corpora", *source, *options, f"output_dir={folder / 'data'}"]) == 0
    return folder, shlex.split(next(line for line in said if line.startswith("then: ")))[4:]


def test_the_countries_are_written_in_this_layout(exported: tuple[Path, list[str]]) -> None:
    corpus = load(exported[0] / "data", "Japan")
    sets = corpus.sets()
    assert {row.extra["type"] for row in sets["forget_level3"]} == {
        *("synonym manipulation", "reverse query", "role playing", "cross lingual"),
        *("affirmative suffix", "incontext learning"),
    }
    assert any("capital of Japan? It is ___." in str(row.prompt) for row in sets["forget_level1"])
    assert "Tokyo" in {row.completion for row in sets["forget_level2"]}
    for row in sets["forget_level1"]:
        assert f" {row.completion}." not in str(row.prompt), "the fact is left out"
    assert all(row.extra["subject"] == "Japan" != row.extra["neighbor"] for row in sets["neighbor_level2"])
    assert sets["neighbor_level1"] and sets["utility_factuality"]
    assert not any("Japan" in row.completion for row in corpus.retain)
    run = json.loads((exported[0] / "data" / "run.json").read_text(encoding="utf-8"))
    assert run["files"]["forget_level2.json"] == len(sets["forget_level2"])


def test_what_the_command_names_unlearns_and_every_number_is_right(exported: tuple[Path, list[str]]) -> None:
    folder, command = exported
    less = ["train.epochs=1", "method.blocks=[1,2]", "method.rank=2", "cache.dir=", "model.dtype=float32"]
    assert main([*command, *less]) == 0
    data = ["profile=rwku", f"data.path={folder / 'data'}", "model.dtype=float32"]
    full = ["train.lr=0.01", "train.epochs=1", "cache.dir="]
    source = [f"model.path={folder / 'model'}", "data.forget=Japan"]
    assert main(["unlearn", *data, *source, *full, "data.max_length=64", f"output_dir={folder / 'npo'}"]) == 0
    asked = ["data.limit=3", "max_new_tokens=6", f"output_dir={folder / 'evaluation'}", "data.forget=Japan"]
    assert main(["evaluate", *data, f"model.path={folder / 'npo'}", *asked]) == 0
    found = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["sets"]

    tokenizer = AutoTokenizer.from_pretrained(folder / "npo")
    model = AutoModelForCausalLM.from_pretrained(folder / "npo", dtype=torch.float32).eval()
    before = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    weights = [one.model.layers[0].mlp.up_proj.weight for one in (model, before)]
    assert not torch.equal(*weights)
    lines = (folder / "evaluation" / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    for name in ("forget_level1", "forget_level2", "forget_level3", "level3_role_playing", "neighbor_level2"):
        of = [one for one in answers if one["set"] == name]
        assert len(of) == 3
        wanted = mean([rouge_union(one["reference"], one["text"]) or 0.0 for one in of])
        assert found[name]["rouge_l_union"] == pytest.approx(wanted, abs=1e-9)
    rows = load(folder / "data", "Japan", limit=3).sets()["mia_forget"]
    places = [number * len(rows) // 3 for number in range(3)]
    losses = []
    for place in places:
        ids = tokenizer(rows[place].completion, return_tensors="pt")["input_ids"]
        losses.append(model(ids, labels=ids).loss.item())
    assert found["mia_forget"]["text_loss"] == pytest.approx(sum(losses) / 3, abs=1e-5)  # float32 sums
    assert "text_loss" not in found["retain"] and "rouge_l_union" not in found["forget"]
