"""Plain texts: names, local files before the hub, the forms of a file, and what is said where something is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from demo import write_rows
from huggingface_hub.errors import GatedRepoError

from grun.data.corpus import load_corpus
from grun.data.texts import CORPORA, load_texts
from grun.errors import ConfigError, DataError, GrunError
from grun.loading.resolve import resolve

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")  # the folder `data` is relative


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("wikitext", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("bio-forget-corpus", ("cais/wmdp-bio-forget-corpus", None, "train")),
        ("bio-forget", ("cais/wmdp-bio-forget-corpus", None, "train")),
        ("bio-retain-corpus", ("cais/wmdp-corpora", "bio-retain-corpus", "train")),
        ("bio-retain", ("cais/wmdp-corpora", "bio-retain-corpus", "train")),
        ("cyber-forget-corpus", ("cais/wmdp-corpora", "cyber-forget-corpus", "train")),
        ("cyber-retain-corpus", ("cais/wmdp-corpora", "cyber-retain-corpus", "train")),
        ("hub:ada/letters", ("ada/letters", None, "train")),
        ("hub:ada/letters:early", ("ada/letters", "early", "train")),
        ("hub:ada/letters::test", ("ada/letters", None, "test")),
    ],
)
def test_names_stand_for_data_sets_of_the_hub(name: str, asked: tuple[str, str | None, str], hub: Any) -> None:
    assert load_texts(name) == ["from the hub"]
    assert hub.asked == [asked]


def test_a_data_set_of_the_hub_may_name_the_field_of_its_text(hub: Any) -> None:
    hub.rows = [{"body": "a letter", "text": "not this"}]
    assert load_texts("hub:ada/letters:early:test:body") == ["a letter"]


@pytest.mark.parametrize("name", ["hub:", "hub:a/b/c", "hub:a/b:c:d:e:f"])
def test_what_is_no_data_set_of_the_hub_is_refused(name: str, hub: Any) -> None:
    with pytest.raises(DataError, match=r"hub:OWNER/NAME\[:CONFIG"):
        load_texts(name)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("wikitext", "wikitext.jsonl"),
        ("bio-forget-corpus", "bio-forget-corpus.jsonl"),
        ("bio-forget-corpus", "bio_forget.jsonl"),
        ("bio-forget", "bio_forget.jsonl"),
        ("merge_forget_data_sum_gpt", "merge_forget_data_sum_gpt.jsonl"),
        ("mine", "mine.jsonl"),
        ("mine.jsonl", "mine.jsonl"),
        ("SafeRLHF-corpora/safe_train", "SafeRLHF-corpora/safe_train.jsonl"),
    ],
)
def test_a_local_file_wins_over_the_hub(name: str, file: str, hub: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "corpora" / file, {"text": "local", "title": "kept out"})
    assert load_texts(name, folder=str(tmp_path / "corpora")) == ["local"]
    assert hub.asked == []


def test_the_folder_data_is_looked_into_after_the_one_that_is_named(hub: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "cyber-forget-corpus.jsonl", {"text": "in data"})
    (tmp_path / "named").mkdir()
    assert load_texts("cyber-forget-corpus") == ["in data"]
    assert load_texts("cyber-forget-corpus", folder="named") == ["in data"]
    write_rows(tmp_path / "named" / "cyber-forget-corpus.jsonl", {"text": "in named"})
    assert load_texts("cyber-forget-corpus", folder="named") == ["in named"]


def test_an_unknown_name_lists_the_known_ones_and_the_other_ways() -> None:
    with pytest.raises(DataError) as refusal:
        load_texts("wikitxt")
    message = str(refusal.value)
    assert "\n" not in message
    for part in ("did you mean 'wikitext'", *CORPORA, ".jsonl", "hub:OWNER/NAME"):
        assert part in message


def test_gruns_summaries_are_on_no_hub(hub: Any) -> None:
    with pytest.raises(DataError, match="no cyber_forget_data_sum_gpt.jsonl in data; .*published code"):
        load_texts("cyber_forget_data_sum_gpt")
    assert hub.asked == []


# -- the hub's refusals -----------------------------------------------------------------------------------------------


def gated_by_cause() -> Exception:
    error = RuntimeError("cannot open it")
    error.__cause__ = GatedRepoError.__new__(GatedRepoError)  # its initializer wants a response of the hub
    return error


@pytest.mark.parametrize(
    "error", [RuntimeError("Dataset 'x' is a gated dataset on the Hub. Ask for access."), gated_by_cause()]
)
def test_a_gated_corpus_without_access_says_how_to_get_it(error: Exception, hub: Any) -> None:
    hub.error = error
    with pytest.raises(DataError) as refusal:
        load_texts("bio-forget-corpus")
    message = str(refusal.value)
    assert "\n" not in message
    for part in (
        "https://huggingface.co/datasets/cais/wmdp-bio-forget-corpus",
        "hf auth login",
        "HF_TOKEN",
        "bio-forget-corpus.jsonl",
    ):
        assert part in message


def test_an_unreachable_hub_is_one_line_that_says_what_to_give_instead(hub: Any) -> None:
    hub.error = ConnectionError("no route\nto host")
    with pytest.raises(DataError, match=r"^cannot fetch Salesforce/wikitext .*\(no route\); give a folder .*jsonl$"):
        load_texts("wikitext")


def test_a_row_of_the_hub_without_the_field_is_named(hub: Any) -> None:
    hub.rows = [{"text": "good"}, {"body": "bad"}]
    with pytest.raises(DataError, match="ada/letters row 2: field 'text' is missing; a row needs text; it has: body"):
        load_texts("hub:ada/letters")
    hub.rows = []
    with pytest.raises(DataError, match="holds no rows"):
        load_texts("hub:ada/letters")


# -- files ------------------------------------------------------------------------------------------------------------


def test_published_files_of_json_strings_are_read_as_fields_and_as_raw_lines(tmp_path: Path) -> None:
    path = tmp_path / "strings.jsonl"
    path.write_bytes(b'"one \\u00e9\\n"\r\n"two"')
    assert load_texts("strings.jsonl", folder=str(tmp_path)) == ["one é\n", "two"]
    assert load_texts("strings.jsonl", jsonl="raw") == ['"one \\u00e9\\n"\n', '"two"']


def test_raw_lines_of_objects_keep_their_braces(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "cyber-forget-corpus.jsonl", {"text": "a"})
    assert load_texts("cyber-forget-corpus", jsonl="raw") == ['{"text": "a"}\n']
    with pytest.raises(ConfigError, match="known: field, raw"):
        load_texts("cyber-forget-corpus", jsonl="row")


def test_a_text_file_is_its_paragraphs_and_a_json_file_its_list(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\nfirst\nstill first\n \t\n\nsecond\n", encoding="utf-8")
    (tmp_path / "b.json").write_text('["first", {"text": "second", "title": "t"}]', encoding="utf-8")
    assert load_texts("a.txt") == ["first\nstill first", "second"]
    assert load_texts("b.json") == ["first", "second"]


def test_texts_no_longer_than_the_limit_are_left_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", {"text": ""}, {"text": "abc"}, {"text": "abcd"})
    assert load_texts("a.jsonl") == ["abc", "abcd"]
    assert load_texts("a.jsonl", min_characters=3) == ["abcd"]
    assert load_texts("a.jsonl", min_characters=-1) == ["", "abc", "abcd"]
    with pytest.raises(DataError, match=r"nothing is left of a.jsonl: all 3 texts have 4 characters or fewer.*min_len"):
        load_texts("a.jsonl", min_characters=4)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"title": "b"}\n',
            "line 2: field 'text' is missing; a row needs text; it has: title",
        ),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 3}\n', "a.jsonl line 3: field 'text' must be a text; it is a whole"),
        ("a.jsonl", b"[1]\n", "a.jsonl row 1: expected an object with the field 'text', or a JSON string"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "\xe9"}\n', "a.jsonl line 1: not UTF-8"),
        ("a.txt", b"good\nb\xe9d\n", "a.txt line 2: not UTF-8"),
        ("a.json", b'[{"text": "a"}, {"body": "b"}]', "a.json row 2: field 'text' is missing"),
        ("a.json", b'["a",\n]', "a.json line 2: not valid JSON"),
        ("a.jsonl", b"\n", "a.jsonl holds no rows"),
        ("a.txt", b"\n", "a.txt holds no texts"),
        ("a.json", b"[]", "a.json holds no rows"),
    ],
)
def test_a_malformed_file_is_named_with_the_place(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError) as refusal:
        load_texts(file, folder=str(tmp_path))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_file_or_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file absent.jsonl"):
        load_texts("absent.jsonl")
    with pytest.raises(DataError, match="no folder absent"):
        load_texts("wikitext", folder="absent")


# -- data.name=corpora ------------------------------------------------------------------------------------------------


def corpora(*more: str) -> Any:
    return resolve("unlearn", ["data.name=corpora", *more]).data


def test_corpora_are_plain_rows_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "bio-forget-corpus.jsonl", {"text": "germ"}, {"text": "x"})
    write_rows(tmp_path / "data" / "cyber-forget-corpus.jsonl", {"text": "worm"})
    write_rows(tmp_path / "data" / "wikitext.jsonl", {"text": "bird"})
    corpus = load_corpus(
        corpora(
            "data.forget=bio-forget-corpus, cyber-forget-corpus", "data.retain=wikitext", "data.text.min_characters=1"
        )
    )
    assert [(row.prompt, row.completion, row.extra["corpus"]) for row in corpus.forget] == [
        (None, "germ", "bio-forget-corpus"),
        (None, "worm", "cyber-forget-corpus"),
    ]
    assert [row.completion for row in corpus.retain] == ["bird"]
    assert corpus.taught(without_forget=True) == corpus.retain


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.forget=a.jsonl"], "data.name=corpora needs data.retain"),
        (["data.retain=a.jsonl"], "unknown corpus 'forget05'"),
        (["data.forget=,", "data.retain=a.jsonl"], "the forget set is empty"),
        (["data.forget=a.jsonl", "data.retain=a.jsonl"], "1 of 1 forget rows also stand in the retain set"),
        (["data.forget=a.jsonl", "data.retain=a.jsonl", "data.text.jsonl=row"], "known: field, raw"),
        (["data.forget=a.jsonl", "data.retain=a.jsonl", "data.text.min_characters=9"], "nothing is left of a.jsonl"),
    ],
)
def test_options_that_make_no_corpora_are_one_line(more: list[str], message: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(GrunError, match=re.escape(message)):
        load_corpus(corpora(*more))
