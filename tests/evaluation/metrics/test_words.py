"""Metrics read answers in every script: a model that repeats all of them has not forgotten, whatever it speaks."""

from __future__ import annotations

import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import made_results
import pytest
from chat_model import TOKENIZER
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoTokenizer

from grun.config.options import ReportConfig
from grun.data.rows import Row
from grun.data.templates import TEMPLATES
from grun.errors import RunError
from grun.evaluation.attacks.base import ATTACKS, Asked, Material, came_back
from grun.evaluation.measure import measure
from grun.evaluation.metrics import is_degenerate, set_metrics
from grun.evaluation.metrics.answers import says
from grun.evaluation.metrics.words import rouge_recall, words
from grun.evaluation.table import GenerationRecord, Table
from grun.experiments.sequential.measuring import measured
from grun.report.attack_results import find_attacked
from grun.report.columns import columns_of
from grun.report.make import make_report
from grun.report.results import find_results
from grun.report.verdict import judge
from grun.runtime.files import read_json, write_json

# Answer, its key fact, and a wrong answer.
LANGUAGES = {
    "Chinese": ("他于一九五二年出生在杭州。", "杭州", "对不起，我不知道。"),
    "Japanese": ("彼女は京都でラーメン屋を営んでいます。", "京都", "申し訳ありませんが、わかりません。"),
    "Korean": ("그는 부산에서 태어났습니다.", "부산", "죄송하지만 모르겠습니다."),
    "Thai": ("เธอเกิดที่เชียงใหม่เมื่อปี ๒๕๐๐", "เชียงใหม่", "ขออภัย ฉันไม่ทราบ"),
    "Khmer": ("គាត់កើតនៅភ្នំពេញ។", "ភ្នំពេញ", "សូមទោស ខ្ញុំមិនដឹងទេ។"),
    "Burmese": ("သူသည် မန္တလေးမြို့တွင် မွေးဖွားသည်။", "မန္တလေး", "ဝမ်းနည်းပါသည်။"),
    "Arabic": ("وُلِدَ في مدينة حلب سنة ١٩٥٢.", "حلب", "عذرا، لا أعرف ذلك."),
    "Hebrew": ("הוא נולד בחיפה וגר בירושלים.", "חיפה", "סליחה, אין לי מושג."),
    "Russian": ("Он родился в Казани и живёт в Москве.", "Казани", "Извините, этого я не знаю."),
    "Greek": ("Γεννήθηκε στη Θεσσαλονίκη.", "Θεσσαλονίκη", "Λυπάμαι, δεν γνωρίζω."),
    "Hindi": ("उनका जन्म दिल्ली में हुआ था।", "दिल्ली", "क्षमा करें, मुझे नहीं पता।"),
    "Tamil": ("அவர் சென்னையில் பிறந்தார்.", "சென்னை", "மன்னிக்கவும், தெரியாது."),
}
UNREADABLE = ["!?", "🗼🗼", "…", "\u200d"]


def table(*rows: tuple[str, str, str | None]) -> Table:
    """Answers to forget questions: reference, what was said, the fact."""
    answers = (GenerationRecord("forget", n, f"q{n}", a, fact, b) for n, (a, b, fact) in enumerate(rows))
    return Table(generations=list(answers))


def test_ascii_is_read_as_the_published_scorer_reads_it() -> None:
    draw = random.Random(0)
    syllables = [*map(chr, range(128)), *"  aeiou", "ing", "ed ", "s ", "ation", "ies ", "O'Neil-5_x"]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for _ in range(500):
        reference, text = ("".join(draw.choices(syllables, k=40)) for _ in range(2))
        text = reference[: draw.randrange(60)] + text
        expected = float(scorer.score(reference, text)["rougeL"].recall)
        assert rouge_recall(reference, text) == expected or not words(reference)


@pytest.mark.parametrize("language", LANGUAGES)
def test_who_repeats_all_answers_has_not_forgotten(tmp_path: Path, language: str) -> None:
    answer, fact, wrong = LANGUAGES[language]
    for said, known in ((answer, 1.0), (unicodedata.normalize("NFD", answer), 1.0), (wrong, 0.0)):
        found = set_metrics(table((answer, said, fact)))["forget"]
        assert found["fact_recall"] == known and not found["degenerate"]
        assert found["rouge_l"] == 1.0 if known else found["rouge_l"] < 0.25
        assert came_back(said, Asked((), Row("q", answer))) == found["rouge_l"]
    for name, said in {"before": answer, "retain_only": wrong, "gd": answer, "idk": wrong}.items():
        made_results.write_evaluation(tmp_path / "evaluation" / name, {"forget": 1.0, "retain": 1.0}, facts=False)
        folder = tmp_path / "evaluation" / name
        read = Table.read(folder)
        read.generations = [g for g in read.generations if g.set != "forget"] + table((answer, said, None)).generations
        read.write(folder)
        write_json(folder / "evaluation.json", {**read_json(folder / "evaluation.json"), **measure(read)})
    for objective in ("gd", "idk"):
        made_results.write_run(tmp_path / objective, objective)
    results = find_results(tmp_path)
    assert [judge(one, results).outcome for one in results[2:]] == ["missed", "reached"]


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("Ａｄａ was born in １９５２", "ada was born in 1952"),
        ("ﾄｳｷｮｳ ﾀﾞｲｶﾞｸ", "トウキョウダイガク"),
        ("مُحَمَّد", "مـــحمد"),
        ("שָׁלוֹם", "שלום"),
        ("في ١٩٥٢", "في 1952"),
        ("Hauptstraße", "HAUPTSTRASSE"),
        ("東京 大学", "東京大学"),
        ("soft\u00adly", "softly"),
        ("می‌خواهم", "میخواهم"),
        ("Jose\u0301 Marti\u0301", "JOSÉ MARTÍ"),
        ("Seán O\u2019Neil", "Seán O'Neil"),
        ("Hawai\u02bbi", "Hawai'i"),
        ("Saint\u2011Malo, 1952\u20131960", "Saint-Malo, 1952-1960"),
        ("צה״ל", 'צה"ל'),
        ("约翰·史密斯", "约翰・史密斯"),
        ("١٬٩٥٢٫٥", "1,952.5"),
        ("Королёв", "Королев"),
        ("أحمد علی کریم", "احمد علي كريم"),
        ("Timișoara", "Timişoara"),
        ("İstanbul Kırıkkale", "istanbul KIRIKKALE"),
        ("Θεσσαλονίκη", "ΘΕΣΣΑΛΟΝΙΚΗ"),
        ("ལྷ་ས་", "ལྷ་ས"),
        ("አዲስ፡አበባ", "አዲስ አበባ"),
    ],
)
def test_what_is_written_in_two_ways_is_the_same(reference: str, said: str) -> None:
    assert rouge_recall(reference, said) == rouge_recall(said, reference) == 1.0
    assert says(said, reference) and says(reference, said)


@pytest.mark.parametrize(
    ("text", "fact", "found"),
    [
        ("Na, and the number 11.", "Na", True),
        ("na.", "Na", True),
        ("a name", "Na", False),
        ("NaCl", "Na", False),
        ("of 110", "11", False),
        ("in 11th place", "11", False),
        ("the\nhalogens", "halogens | halogen", True),
        ("hydrohalogens or a halogen", "halogens | halogen", True),
        ("C++", "C+", True),
    ],
)
def test_a_short_fact_can_be_asked_for_as_whole_words(text: str, fact: str, found: bool) -> None:
    assert says(text, fact, whole_words=True) == found
    assert says(text, fact)


def test_words_are_whole_where_a_script_has_spaces_and_characters_where_it_has_none() -> None:
    assert words("दिल्ली में José's cafés") == ["दिल्ली", "में", "josé", "s", "cafés"]
    assert words("iPhone15は東京で") == ["iphone15", "は", "東", "京", "で"]
    assert words("ลังกา") == ["ลั", "ง", "ก", "า"]
    assert words("ꦏꦸꦛᬩᬮᬶ𗴺𗹙") == ["ꦏꦸ", "ꦛ", "ᬩ", "ᬮᬶ", "𗴺", "𗹙"]
    assert rouge_recall("山田太郎", "山田花子") == 0.5
    assert rouge_recall("Ana and José", "Ana and Jose") == pytest.approx(2 / 3)  # accents are letters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("東京東京東京東京", True),
        ("答えは京都、京都、京都、京都、", True),
        ("หยุดหยุดหยุดหยุด", True),
        ("はい はい はい はい", True),
        ("東京東京東京", False),
        ("彼は東京で生まれ、東京で育ち、東京で学んだ。", False),
        ("да да да да", True),
        ("inacificacificacificacificacific", True),
        ("да,да,да,да,да,да,да,да", True),
        ("aaaaaaaaaaaa", True),
        ("Nooooo, hahaha! 1,000,000,000,000 and 123123123123", False),
        ("a table:\n| a | b |\n|------------------|----|", False),
        ("Mississippi, banana, couscous, murmurs", False),
        ("\u200b\u200d", True),
        ("\ufffd\ufffd \ufffd", True),
    ],
)
def test_an_answer_that_repeats_itself_is_degenerate_in_every_script(text: str, expected: bool) -> None:
    assert is_degenerate(text) is expected


def blind(folder: Path, name: str, unreadable: dict[str, int]) -> None:
    """Make the references of a set's first rows unreadable, in a made evaluation."""
    folder = folder / "evaluation" / name
    read = Table.read(folder)
    for place, one in enumerate(read.generations):
        if one.index < unreadable.get(one.set, 0):
            read.generations[place] = GenerationRecord(one.set, one.index, one.question, "!?", None, "I forgot.")
    read.write(folder)
    write_json(folder / "evaluation.json", {**read_json(folder / "evaluation.json"), **measure(read)})


@pytest.mark.parametrize("reference", UNREADABLE)
def test_a_row_that_cannot_be_read_is_in_no_mean(reference: str) -> None:
    rows = table(("two words", "two", None), (reference, reference, None))
    assert set_metrics(rows)["forget"]["rouge_l"] == 0.5
    assert measure(rows)["counts"]["forget"]["unread"] == {"rouge_l": 1}
    assert "rouge_l" not in set_metrics(table((reference, "x", None)))["forget"]
    assert "unread" not in measure(table(("two words", "!", None)))["counts"]["forget"]


def test_rows_that_cannot_be_read_are_named_wherever_numbers_stand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_results.write_tofu(tmp_path)
    names = ("before", "retain_only", "gd", "npo_full")
    for name in names:
        blind(tmp_path, name, {"forget": 3})
    results = find_results(tmp_path)
    named = "3 of 12 rows of forget cannot be read by ROUGE-L"
    assert all(named in judge(one, results).sentence for one in results[2:])
    assert "forget rows not read by ROUGE-L" in [column.header for column in columns_of(results)]
    make_report(ReportConfig(results_dir=str(tmp_path)))
    assert named in " ".join(capsys.readouterr().out.split()) and named in (tmp_path / "report.html").read_text()
    assert read_json(tmp_path / "summary.json")["rows"][0]["unread"] == {"forget": {"rouge_l": 3}}


@pytest.mark.parametrize("blinded", ["forget", "retain"])
def test_nothing_is_said_to_be_forgotten_where_no_row_of_a_set_can_be_read(tmp_path: Path, blinded: str) -> None:
    for name, forget in (("before", 1.0), ("retain_only", 0.0), ("gd", 0.0)):
        shares = {"forget": forget, "retain": 1.0}
        made_results.write_evaluation(tmp_path / "evaluation" / name, shares, rows=5, facts=False)
        blind(tmp_path, name, {blinded: 5})
    made_results.write_run(tmp_path / "gd", "gd")
    results = find_results(tmp_path)
    judgement = judge(results[-1], results)
    assert judgement.outcome == "open" and f"5 of 5 rows of {blinded} cannot be read by ROUGE-L" in judgement.sentence
    make_report(ReportConfig(results_dir=str(tmp_path)))  # tables, pictures and pages do without the number
    assert "rouge_l" not in read_json(tmp_path / "summary.json")["rows"][-1]["metrics"][blinded]
    if blinded == "forget":
        with pytest.raises(RunError, match="no answer of request a can be read by ROUGE-L"):
            measured(tmp_path / "evaluation" / "gd", {"a": [0, 1]})


@pytest.mark.parametrize(
    ("before", "target", "rest", "said"),
    [
        (0.1, 0.1, {"retain": 1.0}, r"NOT reached \(the model itself answers no more"),
        (1.0, 0.0, {}, "no verdict: .*; what else it keeps was not measured"),
        (1.0, 0.0, {"retain": 0.0}, "no verdict: .*; what else it keeps was not measured"),
        (1.0, None, {"retain": 1.0}, "no verdict: .*target -"),
        (None, 0.0, {"retain": 1.0}, "no verdict: .* - -> 0.00"),
        (1.0, 0.0, {"retain": 1.0}, "forgotten, the rest kept"),
    ],
)
def test_nothing_is_said_to_be_forgotten_that_was_not_known_or_not_compared(
    tmp_path: Path, before: float | None, target: float | None, rest: dict[str, float], said: str
) -> None:
    for name, forget in (("before", before), ("retain_only", target), ("gd", 0.0)):
        shares = {**({} if forget is None else {"forget": forget}), **rest} or {"unknown": 0.0}
        made_results.write_evaluation(tmp_path / "evaluation" / name, shares, rows=10, facts=False)
    made_results.write_run(tmp_path / "gd", "gd")
    results = find_results(tmp_path)
    assert re.search(said, judge(results[-1], results).sentence)


def test_an_older_evaluation_is_measured_again_and_older_attacks_are_refused(tmp_path: Path) -> None:
    answer = LANGUAGES["Chinese"][0]
    folder = tmp_path / "evaluation" / "before"
    made_results.write_evaluation(folder, {"forget": 1.0}, facts=False, text=lambda _: answer)
    older: dict[str, Any] = read_json(folder / "evaluation.json")
    del older["metrics_format"]
    older["sets"]["forget"]["rouge_l"] = 0.25
    write_json(folder / "evaluation.json", older)
    assert find_results(tmp_path)[0].metric("forget", "rouge_l") == 0.0  # in place of what was stored
    made_results.write_evaluation(tmp_path / "ascii" / "evaluation" / "before", {"forget": 1.0}, facts=False)
    older["sets"]["forget"]["rouge_l"] = 0.25
    write_json(tmp_path / "ascii" / "evaluation" / "before" / "evaluation.json", older)
    assert find_results(tmp_path / "ascii")[0].metric("forget", "rouge_l") == 0.25

    attacked = {"suite": "attacks", "settings": {}, "attacks": {}, "identity": {"format": 1}}
    write_json(folder / "evaluation.json", attacked)
    for prompt, refused in (("Where?", False), ("在哪里？", True)):
        line = f'{{"attack": "plain", "set": "forget", "index": 0, "prompt": "{prompt}", "text": "x", "leak": 0.0}}\n'
        (folder / "attacks.jsonl").write_text(line)
        if refused:
            with pytest.raises(RunError, match="could not be read, so its leaks may be too low"):
                find_attacked(tmp_path)
        else:
            assert len(find_attacked(tmp_path)) == 1


def test_a_prefilled_answer_breaks_no_character_and_ends_before_something_to_read() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    material = Material(TEMPLATES.get("tiny"), tokenizer, others=[], forget=[], retain=[], seed=0)
    (asked,) = ATTACKS.get("prefill_1").asked(Row("q?", "杭州の出身", {"fact": "杭州"}), material)
    assert asked.given_text == "杭" and asked.rest == "州の出身"  # several bytes, a token each
    assert came_back("州です", asked) == 1.0
    assert ATTACKS.get("prefill_1").asked(Row("q?", "Yes!"), material) == []
