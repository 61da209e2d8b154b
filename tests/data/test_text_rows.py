"""Plain texts in unlearning: where they are cut, and whole commands that forget them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from demo import own_rows
from safetensors.torch import load_file

from grun.cli import main
from grun.config.options import DataConfig, DemoSizes, TextConfig
from grun.data.benchmarks import demo as demo_corpus
from grun.data.corpus import Corpus
from grun.data.encoding import EncodedRow, encode_texts
from grun.data.rows import Row
from grun.data.templates import TEMPLATES
from grun.data.tokenizer import train_tokenizer
from grun.errors import DataError
from grun.training.unlearning import UnlearnRows, encode_unlearn_rows


def sentences(group: str, count: int) -> list[str]:
    rows = demo_corpus.build(DemoSizes(), 0, sentences=True)[group]
    return [str(row["answer"]) for row in rows][:count]


FORGET, RETAIN = sentences("forget", 6), sentences("retain", 8)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(FORGET + RETAIN, 400)


def corpus_of(forget: Sequence[Row], retain: Sequence[Row]) -> Corpus:
    return Corpus("jsonl", list(forget), list(retain), refusals=["I cannot say."])


TEXTS = corpus_of([Row(None, text) for text in FORGET], [Row(None, text) for text in RETAIN])


def encoded(tokenizer: Any, corpus: Corpus = TEXTS, *, seed: int = 0, length: int = 128, **text: Any) -> UnlearnRows:
    data = DataConfig(text=TextConfig(**text))
    return encode_unlearn_rows(corpus, tokenizer, TEMPLATES.get("tiny"), length, data, seed=seed)


def tokens_of(rows: Sequence[EncodedRow]) -> list[tuple[int, ...]]:
    return [row.prompt_ids + row.answer_ids for row in rows]


# -- where texts are cut ----------------------------------------------------------------------------------------------


def test_a_text_is_the_start_token_and_its_tokens_without_an_end_token(tokenizer: Any) -> None:
    found = encode_texts(FORGET, tokenizer, None, [0.5] * len(FORGET))
    assert tokens_of(found) == [tuple(tokenizer(text)["input_ids"]) for text in FORGET]
    assert all(row.prompt_ids[0] == tokenizer.bos_token_id for row in found)
    assert all(tokenizer.eos_token_id not in row.answer_ids for row in found)


@pytest.mark.parametrize("share", ["0.8", "0.5", "0.01", "0.99"])
def test_a_share_of_each_texts_tokens_is_read_rounded_down_and_at_least_one_is_read_and_said(
    tokenizer: Any, share: str
) -> None:
    rows = encoded(tokenizer, cut=share)
    for row in [*rows.answers, *rows.retain]:
        assert len(row.prompt_ids) == min(max(1, int(float(share) * len(row))), len(row) - 1)
    assert tokens_of(rows.answers) == [tuple(tokenizer(text)["input_ids"]) for text in FORGET]


def test_the_longest_row_is_cut_before_it_is_divided(tokenizer: Any) -> None:
    for row in encoded(tokenizer, length=10, cut="0.8").answers:
        assert (len(row.prompt_ids), len(row.answer_ids)) == (8, 2)


def test_whole_texts_are_said_from_the_start_token_on_and_end(tokenizer: Any) -> None:
    rows = encoded(tokenizer)
    for row, text in zip(rows.answers, FORGET, strict=True):
        assert row.prompt_ids == (tokenizer.bos_token_id,)
        assert row.answer_ids == (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)


def test_random_cuts_are_a_function_of_the_seed_and_differ_between_copies(tokenizer: Any) -> None:
    first, again, other = (encoded(tokenizer, seed=seed, cut="random", copies=3) for seed in (1, 1, 2))
    assert first == again and first.answers != other.answers and first.retain != other.retain
    assert tokens_of(first.answers) == [tuple(tokenizer(text)["input_ids"]) for text in FORGET for _ in range(3)]
    lengths = [len(row.prompt_ids) for row in first.answers]
    copies = [lengths[start : start + 3] for start in range(0, len(lengths), 3)]
    assert sum(len(set(of_one)) > 1 for of_one in copies) >= 5  # of 6 texts; two cuts of about 30 places may agree


def test_random_cuts_lie_everywhere_in_the_second_half_of_a_text(tokenizer: Any) -> None:
    """200 uniform draws: a tenth of a text there is left without one with probability 1e-19.

    A cut is rounded down to a whole token, so that some lie just below the half.
    """
    rows = encoded(tokenizer, cut="random", copies=200).answers
    of_first = [len(row.prompt_ids) / len(row) for row in rows[:200]]
    assert {int(10 * share) for share in of_first} - {4} == set(range(5, 10))
    assert all(1 <= len(row.prompt_ids) < len(row) for row in rows)


def test_retain_texts_are_cut_and_copied_alike_but_at_places_of_their_own(tokenizer: Any) -> None:
    same = corpus_of(TEXTS.forget, TEXTS.forget)
    rows = encoded(tokenizer, same, cut="random", copies=2)
    assert tokens_of(rows.answers) == tokens_of(rows.retain)
    assert rows.answers != rows.retain


def test_rows_with_questions_are_never_cut(tokenizer: Any) -> None:
    asked = corpus_of(TEXTS.forget, [Row("Who was Ada?", text) for text in RETAIN])
    rows = encoded(tokenizer, asked, cut="0.8", copies=2)
    assert rows.retain == encoded(tokenizer, asked).retain and len(rows.retain) == len(RETAIN)
    assert len(rows.answers) == 2 * len(FORGET)


def test_plain_texts_have_no_refusals_and_questions_keep_theirs(tokenizer: Any) -> None:
    assert encoded(tokenizer).refusals == []
    asked = corpus_of([Row("Who was Ada?", text) for text in FORGET], TEXTS.retain)
    assert len(encoded(tokenizer, asked, cut="0.8").refusals) == len(FORGET)


def test_a_text_without_two_tokens_is_named(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"^text 2 of 2 has 1 tokens; at least 2 are needed$"):
        encode_texts(["Ada", ""], tokenizer, None)


# -- whole commands ---------------------------------------------------------------------------------------------------


def write_texts(folder: Path) -> list[str]:
    """Files of {prompt: null, completion}, and the arguments that name them."""
    return own_rows(folder, *([{"prompt": None, "completion": text} for text in side] for side in (FORGET, RETAIN)))


RMU = ["objective=rmu", "loss.steering=5", "loss.rmu_block=3", "method.blocks=[1,3]", "method.rank=2"]


def run(taught: Path, tmp_path: Path, name: str, *arguments: str) -> int:
    own = [f"model.path={taught}", f"output_dir={tmp_path / name}", f"cache.dir={tmp_path / 'cache'}"]
    train = ["train.epochs=2", "train.batch_size=4", "train.lr=0.01", "train.save_steps=2"]
    return main(["unlearn", *write_texts(tmp_path), *RMU, *train, "data.text.cut=random", *own, *arguments])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "arguments",
    [
        ["data.text.cut=0.8"],
        ["data.text.cut=random", "data.text.copies=2"],
        ["data.text.cut=whole"],
        ["data.text.cut=0.8", "objective=rmu_kl"],
        ["data.text.cut=0.8", "objective=rmu_ce", "train.monitor_epochs=1"],
        ["data.text.cut=random", "compat=grun-paper"],
        ["data.text.cut=random", "method.parametrization=lora", "loss.rmu_block=1"],
    ],
)
def test_a_model_unlearns_plain_texts(arguments: list[str], taught: Path, tmp_path: Path) -> None:
    assert run(taught, tmp_path, "run", *arguments) == 0
    result = json.loads((tmp_path / "run/run.json").read_text())
    copies = 2 if "data.text.copies=2" in arguments else 1
    assert result["steps"] == 2 * -(-len(FORGET) * copies // 4)
    assert result["engine"] == ("plain" if "method.parametrization=lora" in arguments else "cached")
    (first, *_, last) = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert first["forget"] > 0 and last["step"] == result["steps"]


def test_equal_seeds_give_equal_adapters_and_others_cut_elsewhere(taught: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(taught, tmp_path, name, f"seed={seed}", "train.epochs=1") == 0
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loss.rmu_block=4"], "the model has 4 blocks, 0 to 3"),
        (["loss.rmu_block=2"], "the edit at block 3 would stay untrained"),
        (["loss.rmu_block=5", "compat=grun-paper"], "reads the output of block 4, but the model has 4 blocks"),
        (["objective=idk", "loss.steering=null", "loss.rmu_block=null"], "the forget set is plain texts"),
        (["objective=dpo", "loss.steering=null", "loss.rmu_block=null"], "the forget set is plain texts"),
        (["loss.forget=idk", "loss.steering=null"], "the forget set is plain texts"),
        (["loss.steering=null"], "loss.steering must be set"),
        (["data.text.cut=1.0"], "data.text.cut=1.0 must be whole, random or a share of tokens between 0 and 1"),
        (["data.text.cut=half"], "data.text.cut=half must be whole, random or a share"),
        (["data.text.cut=whole", "data.text.copies=2"], "data.text.copies=2 has no effect: copies are of texts"),
    ],
)
def test_what_texts_or_blocks_cannot_do_is_one_line(
    arguments: list[str], message: str, taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(taught, tmp_path, "run", *arguments) != 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line
    assert not (tmp_path / "run").exists()
