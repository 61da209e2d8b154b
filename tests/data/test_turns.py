"""Where a user's turn begins: ids that no user can type, and none for an assistant's turn."""

from __future__ import annotations

from typing import Any

import pytest

from grun.config.options import TinyConfig
from grun.data.chat import Turn
from grun.data.templates import TEMPLATES, Template, encode_prompt, user_turn_ids
from grun.data.tokenizer import train_tokenizer

LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}<|header|>\n\n{{ message['content'] }}"
    "<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|header|>\n\n{% endif %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["user assistant a question and its answer <|user|> Question: Answer: b c"] * 3


def tokenizer(*control: str, chat_template: str | None = None) -> Any:
    made = train_tokenizer(TEXTS, TinyConfig().vocabulary)
    made.add_special_tokens({"additional_special_tokens": list(control)})
    if chat_template is not None:
        made.chat_template = chat_template
    return made


@pytest.mark.parametrize(
    ("template", "control", "chat_template", "expected"),
    [
        (TEMPLATES.get("tiny"), (), None, ["<|user|>"]),
        (TEMPLATES.get("chat"), (), None, ["<|user|>"]),  # the tiny tokenizer's own chat template
        (TEMPLATES.get("chat"), ("<|start|>", "<|header|>", "<|eot|>"), LLAMA_3, ["user", "<|header|>"]),
        (TEMPLATES.get("chat"), ("<|im_start|>", "<|im_end|>"), CHATML, ["<|im_start|>", "user"]),
        (TEMPLATES.get("chat"), (), CHATML, []),  # written with ordinary text
        (TEMPLATES.get("question_answer"), (), None, []),
        (Template("x", "string", "<|user|>{prompt} [/INST]"), (), None, ["<|user|>"]),
    ],
)
def test_ids_are_those_before_a_second_question(
    template: Template, control: tuple[str, ...], chat_template: str | None, expected: list[str]
) -> None:
    made = tokenizer(*control, chat_template=chat_template)
    ids = user_turn_ids(template, made)
    assert made.convert_ids_to_tokens(ids) == expected
    prompt = encode_prompt(template, made, "a question", [Turn("b", "c")])
    starts = [i for i in range(len(prompt)) if prompt[i : i + len(ids)] == ids]
    assert not ids or len(starts) in (1, 2)  # a Llama-2 shape begins the first turn with a start token as well
