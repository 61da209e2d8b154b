"""Guardrails: what stands in front of a question, token by token, and which answers a filter withholds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_model import TOKENIZER
from tiny import tiny
from transformers import AutoTokenizer

from grun.commands.unlearn import check_rows
from grun.config.options import DataConfig, GuardrailConfig, MethodConfig, UnlearnConfig
from grun.data.corpus import Corpus, Subject, corpus_of
from grun.data.rows import Row
from grun.data.templates import TEMPLATES, System, Template, Turn, encode, encode_prompt, resolve, user_turn_ids
from grun.errors import AdapterError, ConfigError
from grun.evaluation.attacks.base import ATTACKS, Material
from grun.method.guardrail import Guardrail, InContext, OutputFilter, SystemPrompt, WithheldAnswers

GUARD = "You know nothing about Japan."
EXAMPLES = [["Who rules Japan?", "I don't know."], ["Where is Peru?", "In South America."]]
QUESTION = "What is the capital of Japan?"
WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}%s{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


def by_transformers(tokenizer: Any, *messages: tuple[str, str]) -> list[int]:
    """Ids of a conversation by the tokenizer's own chat template."""
    asked = [{"role": role, "content": text} for role, text in messages]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


SHOWN = [
    *(("user", EXAMPLES[0][0]), ("assistant", EXAMPLES[0][1])),
    *(("user", EXAMPLES[1][0]), ("assistant", EXAMPLES[1][1])),
]


@pytest.mark.parametrize("examples", [[], EXAMPLES])
def test_in_a_chat_template_it_begins_the_system_message_and_examples_are_the_first_turns(
    tokenizer: Any, examples: list[list[str]]
) -> None:
    chat, shown = Template("chat", "chat", guard=GUARD, examples=examples), SHOWN if examples else []
    asked = ("user", QUESTION)
    assert encode_prompt(chat, tokenizer, QUESTION) == by_transformers(tokenizer, ("system", GUARD), *shown, asked)
    own = [("system", f"{GUARD}\n\nBe brief."), *shown, asked]
    assert encode_prompt(replace(chat, system_prompt="Be brief."), tokenizer, QUESTION) == by_transformers(
        tokenizer, *own
    )
    earlier = [System("Be brief."), Turn("Hello.", "Hi!")]
    before = [own[0], *shown, ("user", "Hello."), ("assistant", "Hi!"), asked]
    assert encode_prompt(chat, tokenizer, QUESTION, earlier) == by_transformers(tokenizer, *before)
    answered = encode(chat, tokenizer, QUESTION, "Tokyo.")
    assert answered.prompt_ids == encode_prompt(chat, tokenizer, QUESTION)
    assert tokenizer.decode(answered.answer_ids) == "Tokyo.<|im_end|>"
    assert user_turn_ids(chat, tokenizer) == user_turn_ids(Template("chat", "chat"), tokenizer)


@pytest.mark.parametrize("written", ["", "{{ raise_exception('no system') }}"])
def test_where_the_chat_template_writes_no_system_message_it_begins_the_first_question(written: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = WITHOUT_SYSTEM.replace("%s", written)
    chat = Template("chat", "chat", guard=GUARD)
    expected = by_transformers(tokenizer, ("user", f"{GUARD}\n\n{QUESTION}"))
    assert encode_prompt(chat, tokenizer, QUESTION) == expected
    turns = [("user", f"{GUARD}\n\nHello."), ("assistant", "Hi!"), ("user", QUESTION)]
    assert encode_prompt(chat, tokenizer, QUESTION, [Turn("Hello.", "Hi!")]) == by_transformers(tokenizer, *turns)


def test_in_a_plain_template_it_stands_before_the_question_and_examples_before_both(tokenizer: Any) -> None:
    plain = replace(TEMPLATES.get("question_answer"), guard=GUARD)
    text = f"Question: {GUARD}\n\n{QUESTION}\nAnswer:"
    assert encode_prompt(plain, tokenizer, QUESTION) == tokenizer(text)["input_ids"]
    text = f"Question: {GUARD}\n\n{EXAMPLES[0][0]}\nAnswer: {EXAMPLES[0][1]}\n\n"
    text += f"Question: {EXAMPLES[1][0]}\nAnswer: {EXAMPLES[1][1]}\n\nQuestion: {QUESTION}\nAnswer:"
    both = replace(plain, examples=EXAMPLES)
    assert encode_prompt(both, tokenizer, QUESTION) == tokenizer(text)["input_ids"]
    assert encode_prompt(both, tokenizer, None) == encode_prompt(plain, tokenizer, None), "plain texts are as they are"


def test_it_stays_where_the_user_names_another_template(tokenizer: Any) -> None:
    stored = Template("chat", "chat", guard=GUARD, examples=EXAMPLES)
    named = resolve("question_answer", stored, tokenizer, None, stored.date)
    assert named == replace(TEMPLATES.get("question_answer"), guard=GUARD, examples=EXAMPLES)
    assert Template.from_dict(stored.to_dict()) == stored
    assert "guard" not in Template("chat", "chat").to_dict()


def test_every_prompt_of_an_attacker_has_it_in_front(tokenizer: Any) -> None:
    """An attacker writes turns of the user's; an attack's other template is put behind it too."""
    extra = {"fact": "Tokyo", "paraphrased_question": "Name Japan's capital.", "cloze": "The capital of Japan is"}
    row, other = Row(QUESTION, "It is the city of Tokyo.", extra), Row("Where is Rome?", "In Italy.")
    chat = Template("chat", "chat", guard=GUARD)
    material = Material(chat, tokenizer, [other], [row], [other], 0, facts=[row, other])
    start = by_transformers(tokenizer, ("system", GUARD), ("user", "X"))
    start = start[: start.index(tokenizer("X", add_special_tokens=False)["input_ids"][0])]
    asked = {name: ATTACKS.get(name).asked(row, material) for name in ATTACKS.names()}
    assert sum(map(len, asked.values())) > 30
    bare = {"other_template": f"Q: {GUARD}\n\n{QUESTION}\nA:", "cloze": f"{GUARD}\n\nThe capital of Japan is"}
    for name, ways in asked.items():
        for way in ways:
            if name in bare:
                assert list(way.ids) == tokenizer(bare[name])["input_ids"], name
            else:
                assert list(way.ids[: len(start)]) == start, name


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("It is TOKYO, of course.", False),
        ("Tokyo's towers", False),
        ("The  New\nYork Times", False),
        ("Tokyoites live in York. New?", True),
        ("Kyoto", True),
        ("", True),
    ],
)
def test_a_filter_withholds_answers_that_hold_the_words(text: str, shown: bool) -> None:
    assert OutputFilter(["Tokyo", "new york", "!"], "No.")(text) == (text if shown else "No.")


def corpus() -> Corpus:
    forget = [Row(f"Question {number}?", f"Answer {number}.") for number in range(6)]
    forget[0] = replace(forget[0], extra={"fact": "Tokyo | Edo"})
    retain = [Row(f"Kept {number}?", f"Told {number}.") for number in range(10)]
    return corpus_of(forget, retain, DataConfig())


def test_the_default_message_names_subjects_or_lists_questions() -> None:
    refusal = corpus().refusals[0]
    made = SystemPrompt(GuardrailConfig(examples=2))
    made.read(corpus(), [("Japan", "Nippon"), ("Peru",), ("Cuba",)])
    assert str(made._guard).startswith("You know nothing about Japan (Nippon), Peru and Cuba. ")
    assert f'"{refusal}"' in str(made._guard)
    made.read(corpus(), [])
    assert str(made._guard).endswith("\n\n- Question 0?\n- Question 3?") and f'"{refusal}"' in str(made._guard)
    made.read(replace(corpus(), subjects=[Subject((), "any", ("Japan", "Peru"))] * 6), [])
    assert str(made._guard).startswith("You know nothing about Japan and Peru. ")
    given = SystemPrompt(GuardrailConfig(text=" Be {silent}. "))
    given.read(corpus(), [("Japan",)])
    assert given._guard == "Be {silent}."


def test_examples_are_refused_forget_rows_then_answered_retain_rows() -> None:
    made = InContext(GuardrailConfig(examples=2))
    made.read(corpus(), [])
    first, second = corpus().refusals[:2]
    assert made._examples == [
        *(["Question 0?", first], ["Question 3?", second]),
        *(["Kept 0?", "Told 0."], ["Kept 5?", "Told 5."]),
    ]
    with pytest.raises(ConfigError, match=r"name data\.retain"):
        made.read(replace(corpus(), retain=[]), [])


def test_a_filter_knows_facts_or_else_answers_and_names() -> None:
    made = WithheldAnswers(GuardrailConfig())
    made.read(corpus(), [("Japan", "Nippon")])
    assert made._withheld == ["Tokyo", "Edo", *(f"Answer {number}." for number in range(1, 6)), "Japan", "Nippon"]
    with pytest.raises(ConfigError, match="letter or digit"):
        made.read(replace(corpus(), forget=[Row("Say it.", "!")]), [])


def test_plain_texts_have_no_question_to_stand_before() -> None:
    config = UnlearnConfig(method=MethodConfig(parametrization="system_prompt"))
    check_rows(replace(corpus(), retain=[]), config)
    with pytest.raises(ConfigError, match="give rows of questions"):
        check_rows(replace(corpus(), forget=[Row(None, "Tokyo is a city.")]), config)


def test_what_is_saved_is_put_on_again_and_what_is_damaged_is_refused(tmp_path: Path) -> None:
    made, base = WithheldAnswers(GuardrailConfig()), tiny("llama")
    made.read(corpus(), [])
    made.prepare(base, TEMPLATES.get("tiny"))
    assert [*made.trainable_parameters()] == [] and base.output_filter("The answer 3") == corpus().refusals[0]
    made.save(tmp_path)
    found, other = Guardrail.read(tmp_path), tiny("llama")
    found.put_on(other, strict=True)
    assert other.output_filter("answer 3") == found.refusal and other.output_filter("answer 30") == "answer 30"
    with pytest.raises(AdapterError, match="other weights"):
        found.put_on(tiny("gpt2"), strict=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"refusal"', '"refuzal"'))
    with pytest.raises(AdapterError, match="refuzal"):
        Guardrail.read(tmp_path)
