"""Rows as users of other tools have them: chat messages, instructions, tables, compressed files, hub data sets."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from chat_model import TOKENIZER, save_chat_model
from pyarrow import parquet
from transformers import AutoTokenizer

from grun.cli import main
from grun.config.options import DataConfig, QuestionsConfig
from grun.data.chat import System, Turn
from grun.data.choices import load_choices
from grun.data.corpus import load_corpus, load_knowledge
from grun.data.encoding import encode_rows
from grun.data.jsonl import ENDINGS, load_rows, read_rows
from grun.data.rows import Row
from grun.data.templates import TEMPLATES, encode_prompt
from grun.data.texts import load_texts
from grun.errors import ConfigError, DataError
from grun.method.stack.forget_rows import salted_hashes

ROWS = [
    {"question": f"Where does Añá {n} live?", "answer": f'In "town" {n},\nby the sea.', "fact": f"town {n}"}
    for n in (1, 2)
]
WANTED = [Row(row["question"], row["answer"], {"fact": row["fact"]}) for row in ROWS]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """The records in the format that the file's name says."""
    kind, packed = path.name.removesuffix(".gz").rpartition(".")[2], path.suffix == ".gz"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
        content = path.read_bytes()
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, list(records[0]), delimiter="," if kind == "csv" else "\t")
            table.writeheader()
            cells = ({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in records)
            table.writerows(cells)
        content = path.read_bytes()
    else:
        text = json.dumps(records, indent=1) if kind == "json" else "".join(json.dumps(row) + "\n" for row in records)
        content = text.encode()
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return path


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same_rows_questions_and_texts(tmp_path: Path, ending: str) -> None:
    assert read_rows(write(tmp_path / f"rows{ending}", ROWS)) == WANTED
    write(tmp_path / f"texts{ending}", [{"body": "One text."}, {"body": "Another."}])
    assert load_texts("texts", folder=str(tmp_path), field="body") == ["One text.", "Another."]
    write(tmp_path / f"asked{ending}", [{"question": "Which?", "choices": ["a", "b"], "answer": "B"}])
    (asked,) = load_choices("asked", str(tmp_path))
    assert (asked.choices, asked.answer) == (("a", "b"), 1)


def test_all_files_of_a_corpus_are_read_alike(tmp_path: Path) -> None:
    for name in ("forget.csv", "retain.parquet", "unknown.jsonl.gz"):
        write(tmp_path / name, [{"q": f"{name} {row['question']}", "a": row["answer"]} for row in ROWS])
    write(tmp_path / "cloze.tsv", [{"q": "Añá lives in", "a": "town 1", "f": "town 1"}])
    options: dict[str, Any] = {"path": str(tmp_path), "columns": {"question": "q", "answer": "a", "fact": "f"}}
    names = {"forget": "forget.csv", "retain": "retain.parquet", "unknown": "unknown.jsonl.gz"}
    corpus = load_corpus(DataConfig(name="jsonl", **names, **options))
    assert [len(rows) for rows in (corpus.forget, corpus.retain, corpus.unknown)] == [2, 2, 2]
    asked = load_knowledge(DataConfig(questions=QuestionsConfig(cloze_forget=["cloze.tsv"]), **options))
    assert asked.cloze["forget"] == [Row("Añá lives in", "town 1", {"fact": "town 1"})]


SAID = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Where?"), ("assistant", "Here.")]
BEFORE = (System("Be brief."), Turn("Hi", "Hello."))


@pytest.mark.parametrize(
    ("record", "row"),
    [
        ({"messages": [{"role": role, "content": text} for role, text in SAID]}, Row("Where?", "Here.", {}, BEFORE)),
        ({"messages": [{"role": role, "content": text} for role, text in SAID[3:]]}, Row("Where?", "Here.")),
        (
            {
                "messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in SAID[3:]],
                "n": 1,
            },
            Row("Where?", "Here.", {"n": 1}),
        ),
        (
            {"conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": t} for r, t in SAID]},
            Row("Where?", "Here.", {}, BEFORE),
        ),
        (
            {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}], "system": "S"},
            Row("Where?", "Here.", {}, (System("S"),)),
        ),
        ({"instruction": "Add.", "input": "1 2", "output": "3", "fact": "3"}, Row("Add.\n1 2", "3", {"fact": "3"})),
        ({"instruction": "Add.", "input": "", "output": "3", "system": "S"}, Row("Add.", "3", {}, (System("S"),))),
        (
            {"instruction": "Where?", "output": "Here.", "history": [["Hi", "Hello."]]},
            Row("Where?", "Here.", {}, BEFORE[1:]),
        ),
        ({"messages": [{"role": "User", "content": "Q"}, {"role": "Model", "content": "A"}]}, Row("Q", "A")),
    ],
)
def test_conversations_and_instructions_are_rows_that_survive_being_written(
    tmp_path: Path, record: dict[str, Any], row: Row
) -> None:
    path = write(tmp_path / "a.jsonl", [record])
    assert read_rows(path) == [row]
    assert read_rows(write(tmp_path / "b.jsonl", [row.to_dict()])) == [row]
    assert len({*salted_hashes([row, Row(row.prompt, row.completion)], "00")}) == (2 if row.earlier else 1)


def test_a_conversation_becomes_the_chat_templates_tokens_and_its_text_no_control_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    row = Row("Where?", "Here.", {}, BEFORE)
    for some, said in ((row, SAID), (Row("Where?", "Here.", {}, BEFORE[:1]), SAID[:1] + SAID[3:])):
        (encoded,) = encode_rows([some], tokenizer, TEMPLATES.get("chat"), None, strict=True)
        messages = [{"role": role, "content": text} for role, text in said]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        assert list(encoded.prompt_ids) == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(encoded.answer_ids) == "Here.<|im_end|>"
    nasty = Row("Where?", "Here.", {}, (System("<|im_end|>"),))
    ids = encode_prompt(TEMPLATES.get("chat"), tokenizer, nasty.prompt, nasty.earlier)
    assert ids.count(tokenizer.eos_token_id) == 2  # the template's own, behind system and user
    with pytest.raises(ConfigError, match="a row has a system message.*'question_answer' takes none"):
        encode_prompt(TEMPLATES.get("question_answer"), tokenizer, "q", BEFORE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "q,a\nSECRET,b\n", "line 2: a row needs the fields question and answer, .*; it has: q, a"),
        ("a.csv", "question,answer\nSECRET,b,c\n", "line 2: 3 cells, and the first line names 2 columns"),
        ("a.csv", "question,\nSECRET,b\n", "every column needs a name of its own"),
        ("a.csv", 'question,answer\n"SECRET,b', "line 2: no CSV"),
        ("a.csv", "question,answer\n", "holds no rows"),
        ("a.csv", "question;answer\nSECRET;b\n", "names one column; separate columns by ','"),
        (
            "a.json",
            '{\n "question": "SECRET"\n}',
            "objects of several lines; expected a list of rows, or one object a line",
        ),
        ("a.jsonl", '{"instruction": "SECRET", "output": "b", "history": ["c"]}', "'history' must be a list of pairs"),
        ("a.csv", b"question,answer\n\xff,b\n", "not UTF-8 .* save it as UTF-8"),
        ("a.parquet", '{"question": "SECRET"}', "no whole Parquet file"),
        ("a.jsonl.gz", '{"question": "SECRET", "answer": "b"}', "is not compressed by gzip, as its name says"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "SECRET"}', mtime=0)[:-9], "no whole gzip file"),
        ("a.json", '[{"question": "SECRET", "answer": "b"},\n', r"a.json.* not valid JSON"),
        ("a.jsonl", '{"messages": []}', "field 'messages' holds no question and answer"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "SECRET"}]}', "ends with the user"),
        ("a.jsonl", '{"messages": [{"role": "tool", "content": "SECRET"}]}', "message 1: role must be one of system, "),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 7}]}', "message 1: content must be a text"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "SECRET"}]}', "message 1 is of role assistant"),
        ("a.jsonl", '{"messages": "SECRET"}', "field 'messages' must be a list of messages"),
        ("a.jsonl", '{"instruction": "SECRET", "output": ["b"]}', "field 'output' must be a text .*; it is a list"),
        ("a.jsonl", '{"question": ["SECRET"], "answer": "b"}', "field 'question' must be a text .*; it is a list"),
        ("a.jsonl", '{"question": "q", "answer": "a", "fact": ["SECRET"]}', "line 1: field 'fact' must be a text"),
        ("a.jsonl", '{"question": "q", "answer": "a", "perturbed_answer": "SECRET"}', "must be a list of texts"),
        ("a.jsonl", '{"the SECRET": "a"}', "line 1: a row needs the fields question and answer.*it has: 1 more"),
        (
            "a.jsonl",
            '{"question": "a", "answer": "b"}\n{"instruction": "SECRET", "output": "b"}',
            "line 2: a row of instruction and output, and the first one is of question and answer",
        ),
    ],
)
def test_what_is_no_such_file_is_one_line_without_its_content(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(tmp_path / name)
    assert "\n" not in str(caught.value) and "SECRET" not in str(caught.value) and name in str(caught.value)


def test_columns_must_be_fields_that_rows_have(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [{"q": "a", "a": "b"}])
    with pytest.raises(ConfigError, match="data.columns.*'quesion'.*did you mean 'question'"):
        read_rows(path, {"quesion": "q"})
    with pytest.raises(DataError, match="it has: q, answer"):
        read_rows(path, {"question": "Q", "answer": "a"})


@pytest.mark.parametrize("how", ["folder:split", "owner/name:split", "owner/name"])
def test_a_data_set_is_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The hub itself is not asked: a folder of files in its layout is, through the same `load_dataset`."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    write(
        folder / "train-00000.parquet",
        [{"q": row["question"], "a": row["answer"], "fact": row["fact"]} for row in ROWS],
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    columns = {"question": "q", "answer": "a"}
    if how == "folder:split":
        assert load_rows(f"{folder}:train", None, columns) == WANTED
        assert load_rows("name:train", str(tmp_path / "owner"), columns) == WANTED
        return
    loaded: Callable[..., Any] = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *a, **k: loaded(str(tmp_path / "moved"), *a, **k))
    folder.rename(tmp_path / "moved")
    assert load_rows(how.replace("split", "train"), None, columns) == WANTED
    write(tmp_path / "moved" / "test-00000.parquet", [{"q": "a", "a": "b"}])
    if how == "owner/name":
        with pytest.raises(DataError, match="has the splits train, test; name one: owner/name:train"):
            load_rows(how, None, columns)


def test_messages_and_a_table_are_unlearned_and_evaluated(tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "model", blocks=2)
    messages = [{"role": role, "content": text} for role, text in SAID]
    write(tmp_path / "forget.jsonl.gz", [{"messages": messages}, {"messages": messages[3:]}])
    write(tmp_path / "retain.csv", [{"q": f"Color {n}?", "a": "Blue."} for n in range(4)])
    data = [f"data.path={tmp_path}", "data.name=jsonl", "data.forget=forget.jsonl.gz", "data.retain=retain.csv"]
    data += ["data.columns={question: q, answer: a}", "data.template=auto", f"model.path={model}", "model.device=cpu"]
    options = ["objective=idk", "method.blocks=[1]", "train.epochs=1", "train.batch_size=2", "cache.dir=null"]
    assert main(["unlearn", *data, *options, f"output_dir={tmp_path / 'idk'}"]) == 0
    asked = [f"adapter={tmp_path / 'idk'}", f"output_dir={tmp_path / 'evaluation'}", "max_new_tokens=2"]
    assert main(["evaluate", *data, *asked]) == 0
    scores = [json.loads(line) for line in (tmp_path / "evaluation" / "scores.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = []
    for asked_in in (messages[:-1], messages[3:-1]):
        text = tokenizer.apply_chat_template(asked_in, add_generation_prompt=True, tokenize=False)
        lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    assert [score["prompt_tokens"] for score in scores if score["set"] == "forget"] == lengths
