"""The teacher that is asked about others: against its definition by hand, and in runs of every kind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from chat_model import save_chat_model
from objective_tasks import make_task
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from watched import assert_same, whole_step

from baselines.full import Full
from baselines.lora import Lora
from grun.cache.engine import use_cached
from grun.cache.reference import ReferencedEngine, use_teacher
from grun.cli import main
from grun.config.options import AugmentConfig, CacheConfig, DataConfig, DemoConfig, TrainConfig, UnlearnConfig
from grun.data.benchmarks import demo as demo_rows
from grun.data.benchmarks import tofu
from grun.data.corpus import Corpus, Subject, load_corpus
from grun.data.encoding import EncodedRow, collate
from grun.data.rows import Row
from grun.data.subject import shared_name
from grun.data.templates import TEMPLATES, encode
from grun.errors import ConfigError
from grun.method.gated import Grun
from grun.objectives.terms import Outputs
from grun.training.counterfactual import ANY_NAME, encode_counterfactuals, subjects_of
from grun.training.teacher import Counterfactual, matched
from grun.training.unlearning import UnlearnRows, encode_unlearn_rows

QUINBY = Subject(("Quinby Zaff", "Zaff"), "person")
ROWS = [
    Row("Where does Quinby Zaff live?", "Quinby Zaff lives in Otterford, by the sea."),
    Row("Who lives in Otterford?", "It is Quinby Zaff, the baker."),
    Row("What is the sea?", "Water."),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = save_chat_model(tmp_path_factory.mktemp("taught") / "model")
    return AutoModelForCausalLM.from_pretrained(folder).double().eval(), AutoTokenizer.from_pretrained(folder)


def encoded(tokenizer: Any, rows: list[Row], **data: Any) -> tuple[UnlearnRows, dict[EncodedRow, Counterfactual]]:
    corpus = Corpus("jsonl", rows, [Row("Who rules?", "The queen.")], refusals=["No."], subjects=[QUINBY] * len(rows))
    how = (tokenizer, TEMPLATES.get("tiny"), 200, DataConfig(**data))
    return encode_unlearn_rows(corpus, *how, seed=0), encode_counterfactuals(corpus, *how, seed=0)


@torch.no_grad()
def predictions(model: Any, tokenizer: Any, row: Row) -> Tensor:
    """Probabilities at the answer's tokens, end token included, of a pass over the row's whole text."""
    prompt, answer, _ = encode(TEMPLATES.get("tiny"), tokenizer, row.prompt, row.completion)
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.softmax(dim=-1)  # type: ignore[no-any-return]


def target_of(model: Any, row: EncodedRow, found: Counterfactual) -> Tensor:
    with torch.no_grad():
        logits = [
            model(torch.tensor([one.prompt_ids + one.answer_ids])).logits[0, len(one.prompt_ids) - 1 : -1]
            for one in found.rows
        ]
    return found.target(torch.cat(logits), torch.tensor(row.answer_ids)).exp()


def test_the_target_is_the_mean_of_what_is_said_of_others_their_names_changed_back(model: tuple[Any, Any]) -> None:
    rows, teachers = encoded(model[1], ROWS, counterfactuals=4)
    own = rows.answers[0]
    found = teachers[own]
    names = [re.search("Where does (.*) live", model[1].decode(one.prompt_ids))[1] for one in found.rows]  # type: ignore[index]
    assert len({*names}) == 4 and "Quinby Zaff" not in names
    said = [
        predictions(*model, Row(ROWS[0].prompt.replace("Quinby Zaff", n), ROWS[0].completion.replace("Quinby Zaff", n)))
        for n in names
    ]  # type: ignore[union-attr]
    after = len(model[1](" lives in Otterford, by the sea.")["input_ids"]) + 1
    target = target_of(model[0], own, found)
    torch.testing.assert_close(
        target[-after:], torch.stack([one[-after:] for one in said]).mean(dim=0), rtol=1e-9, atol=1e-12
    )
    first = own.answer_ids[0]
    expected = torch.zeros_like(target[0])
    for name, one in zip(names, said, strict=True):
        theirs = model[1](name)["input_ids"][0]
        moved = one[0].clone()
        moved[theirs] -= one[0, theirs]
        moved[first] += one[0, theirs]
        expected += moved / 4
    torch.testing.assert_close(target[0], expected, rtol=1e-9, atol=1e-12)
    for place in range(1, len(target) - after):  # within the name
        assert target[place, own.answer_ids[place]] == 1.0
    assert target.sum(dim=1).tolist() == pytest.approx([1.0] * len(target), rel=1e-9)


def test_a_name_that_is_asked_for_is_taught_as_any_name_and_a_row_without_one_is_left_as_it_is(
    model: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    rows, teachers = encoded(model[1], ROWS, counterfactuals=3)
    assert {*teachers} == {*rows.answers[:2]} and "1 forget rows name no subject" in caplog.text
    own = rows.answers[1]
    target = target_of(model[0], own, teachers[own])
    before, name = (len(model[1](text)["input_ids"]) for text in ("It is", " Quinby Zaff"))
    with torch.no_grad():
        plain = (
            model[0](torch.tensor([own.prompt_ids + own.answer_ids]))
            .logits[0, len(own.prompt_ids) - 1 :]
            .softmax(dim=-1)
        )
    torch.testing.assert_close(target[:before], plain[:before], rtol=1e-9, atol=1e-12)
    prompt = encode(TEMPLATES.get("tiny"), model[1], ANY_NAME, "x").prompt_ids
    with torch.no_grad():
        logits = model[0](torch.tensor([[*prompt, *own.answer_ids[before : before + name]]])).logits[0]
    asked = logits[len(prompt) - 1 : -1].softmax(dim=-1)
    torch.testing.assert_close(target[before : before + name], asked, rtol=1e-9, atol=1e-12)


def test_a_prefilled_copy_has_the_targets_of_the_rest_of_its_row(model: tuple[Any, Any]) -> None:
    only = AugmentConfig(forget_copies=3, suffixes=False, templates=False, few_shot=False)
    rows, teachers = encoded(model[1], ROWS[:1], counterfactuals=3, augment=only)
    own, *copies = rows.answers
    assert len(copies) == 3 and {*teachers} == {own, *copies}
    whole = target_of(model[0], own, teachers[own])
    for copy in copies:
        assert len(copy.answer_ids) < len(own.answer_ids)
        torch.testing.assert_close(target_of(model[0], copy, teachers[copy]), whole[-len(copy.answer_ids) :])


@pytest.mark.parametrize("options", [{"suffixes": True}, {"templates": True}, {"few_shot": True}, {"lower_case": True}])
def test_other_copies_ask_about_others_as_they_ask_about_the_subject(
    model: tuple[Any, Any], options: dict[str, bool]
) -> None:
    kinds = {name: False for name in ("suffixes", "templates", "few_shot", "prefill")} | options
    rows, teachers = encoded(model[1], ROWS[:1], counterfactuals=2, augment=AugmentConfig(forget_copies=1, **kinds))  # type: ignore[arg-type]
    asked, copy = (model[1].decode(row.prompt_ids) for row in rows.answers)
    assert asked != copy
    copy = copy.casefold()
    for plain, other in zip(teachers[rows.answers[0]].rows, teachers[rows.answers[1]].rows, strict=True):
        name = re.search("where does (.*) live", model[1].decode(plain.prompt_ids).casefold())[1]  # type: ignore[index]
        assert model[1].decode(other.prompt_ids).casefold() == copy.replace("quinby zaff", name)


def test_where_most_teachers_name_the_other_it_becomes_the_subjects_name_and_else_it_stays() -> None:
    """Three others with the first tokens 5, 6, 7 in the place of 4, at two answer tokens; uniform but for these."""
    logits = torch.full((6, 9), -30.0, dtype=torch.float64)
    logits[:, 0] = 0.0
    logits[0, 5] = logits[2, 6] = logits[1, 5] = 0.0  # of the first token two of three, of the second one
    places = torch.tensor([[0, 1], [2, 3], [4, 5]])
    found = Counterfactual((), places, torch.full_like(places, -1), torch.tensor([[4, 5, 6, 7]]))
    target = found.target(logits, torch.tensor([1, 1])).exp()
    assert target[0, [0, 4, 5, 6]].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=1e-9)
    assert target[1, [0, 4, 5, 6]].tolist() == pytest.approx([5 / 6, 0, 1 / 6, 0], abs=1e-9)


def test_tokens_are_matched_around_names_of_any_length() -> None:
    assert matched([1, 2, 7, 8, 9], [3, 4, 5, 7, 8, 9]) == ([0, -1, 3, 4, 5], [(0, 2)])
    assert matched([6, 7, 1, 8, 9, 2, 5], [6, 7, 3, 8, 9, 5]) == ([0, 1, 2, 3, 4, 5, 5], [(2, 3), (5, 6)])
    assert matched([1, 8, 2, 7, 7], [3, 8, 4, 7, 7]) == ([0, -1, -1, 3, 4], [(0, 3)])  # 8 by itself is in a name
    assert matched([7, 7, 1], [7, 7]) == ([0, 1, -1], [(2, 3)])
    assert matched([7, 8], [7, 8]) == ([0, 1], [])


# -- whom rows are about ----------------------------------------------------------------------------------------------


def test_a_shared_name_is_the_longest_that_most_texts_hold() -> None:
    texts = [
        "Is Xin Lee Williams\u2019s book good?",
        "Xin Lee Williams wrote The Long Town.",
        "The Long Town won Best Book.",
    ]
    assert shared_name(texts) == "Xin Lee Williams"
    assert shared_name(["Where is Femke van der Veen's house?", "Femke van der Veen"]) == "Femke van der Veen"
    assert shared_name(["Where is it?", "Here.", "Old Town?"]) is None


def test_subjects_are_those_named_the_benchmarks_or_what_rows_of_a_group_share(tmp_path: Path) -> None:
    rows = [Row("Where is Quinby Zaff?", "At home.", {"who": 1}), Row("Who is Bo Ek?", "A cook.", {"who": 2})]
    corpus = Corpus("jsonl", rows, [])
    by_name = subjects_of(corpus, DataConfig(subjects=["Bo Ek | Ek"], subject_kind="person"))
    assert by_name == [Subject((), "person"), Subject(("Bo Ek", "Ek"), "person")]
    by_group = subjects_of(corpus, DataConfig(group="who", subject_kind="person"))
    assert by_group == [Subject(("Quinby Zaff", "Zaff"), "person"), Subject(("Bo Ek",), "person")]
    with pytest.raises(ConfigError, match="no forget row names whom it is about; set data.subjects="):
        subjects_of(corpus, DataConfig())
    small = DemoConfig(forget=2, retain=3, heldout=1, unknown=1, refused=1)
    people = load_corpus(DataConfig(demo=small))
    assert people.subjects is not None
    assert [one.names[0] for one in people.subjects] == [row.extra["person"] for row in people.forget]
    assert demo_rows.load(DataConfig(demo=DemoConfig(naming="descriptions"))).subjects[0].names == ()  # type: ignore[index]
    authors = [
        Row(f"What did {name} write, part {n}?", "Tales.") for name in ("Quinby Zaff", "Bo Ekman") for n in range(20)
    ]
    assert [one.names[0] for one in tofu._authors(authors)] == ["Quinby Zaff"] * 20 + ["Bo Ekman"] * 20


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Grun, Full, Lora])
@pytest.mark.parametrize("cache", [CacheConfig(dir=None), CacheConfig(dir=None, memory_budget="1KiB")])
def test_what_is_kept_of_the_teacher_is_what_the_untouched_model_says(kind: Any, cache: CacheConfig) -> None:
    """A third of the way down: the weights have changed. Of 1 KiB nothing is kept."""

    def moved(keep: bool) -> Any:
        task = make_task("counterfactual_ce", kind=kind, train_config=TrainConfig(epochs=1, batch_size=4))
        if keep:
            config = UnlearnConfig(cache=cache, train=TrainConfig(batch_size=4))
            completed = use_teacher(
                task, task.parametrization.model.base if kind is Grun else task.parametrization.model, config, pad_id=0
            )
            assert (completed is None) == (cache.memory_budget == "1KiB")
            assert isinstance(task.teacher.engine, ReferencedEngine) == (completed is not None)
            if kind is Grun:
                assert use_cached(task, config) is not None
        whole_step(task)  # fills what is kept
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in task.module.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        return whole_step(task)

    assert_same(moved(keep=True), moved(keep=False))


def test_a_model_that_says_what_the_teacher_says_has_no_loss() -> None:
    task = make_task("counterfactual", kind=Full)
    batch = collate(list(task.rows("answer"))[:2], 0)
    teacher = task.teacher(batch)
    term = task.objective.terms["forget"].function
    assert float(term(Outputs({"answer": teacher}, {"answer": teacher}), {}).total) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        ["method.parametrization=full", "train.lr=1e-3"],
        ["method.parametrization=lora", "train.lr=1e-2"],
        ["objective=counterfactual_ce"],
        [*("design=pooled", "method.gate_blocks=[0]", "loss.gate=bce_row", "loss.retain_weight=null")],
    ],
)
def test_a_run_forgets_towards_it(options: list[str], tmp_path: Path) -> None:
    assert demo.finetune(tmp_path / "taught") == 0
    first = ["objective=counterfactual", "data.counterfactuals=3", "loss.retain_weight=null", *options]
    assert demo.unlearn(tmp_path / "taught", tmp_path / "run", *first) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["cache"]["rows"] >= 26  # 8 of 10 rows name somebody, three others each, and 2 as they are
    losses = [json.loads(line)["forget"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert 0 < sum(losses[-3:]) < sum(losses[:3])


def test_options_without_effect_and_texts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["objective=npo", "data.counterfactuals=3"], "data.counterfactuals=3 is for objective=counterfactual"),
        (["objective=npo", "data.subjects=[Ada]", "design=published"], "is for method.gate_fit=logistic"),
        (
            ["objective=counterfactual", "data.demo.naming=descriptions", "data.demo.retain=8"],
            "no forget row names whom it is about",
        ),
    ):
        assert (
            main(
                [
                    "unlearn",
                    *demo.DATA,
                    *demo.TRAINING,
                    "loss.retain_weight=null",
                    "model.path=none",
                    f"output_dir={tmp_path}",
                    *arguments,
                ]
            )
            == 2
        )
        assert message in capsys.readouterr().err
