"""Templates: what a question and an answer look like as text, and which token ids they become."""

from __future__ import annotations

import copy
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grun.config.options import DemoSizes
from grun.data.benchmarks import demo as demo_corpus
from grun.data.encoding import encode_texts
from grun.data.templates import FILE_NAME, TEMPLATES, Template, encode, encode_prompt, load, resolve, store
from grun.data.tokenizer import ANSWER, BEGIN, CONTROL_TOKENS, END, PAD, USER, train_tokenizer
from grun.errors import ConfigError, ModelError

QUESTION, ANSWER_TEXT = "Where was {Ada} born?", "Ada was born in Oslo."
DATE = "26 Jul 2024"

DATED_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}<|system|>{{ messages[0]['content'] }}\n"
    "{% set messages = messages[1:] %}{% endif %}Today: {{ date_string }} {{ strftime_now('%Y-%m-%d') }}\n"
    "{% for message in messages %}{% if message['role'] == 'user' %}<|user|>{{ message['content'] | trim }}<|eot|>"
    "{% else %}<|answer|> {{ message['content'] }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}<think></think>"
)


def demo_texts() -> list[str]:
    groups = demo_corpus.build(DemoSizes(forget=2, retain=4, heldout=2, unknown=2, refused=2), 0)
    return [str(row[name]) for rows in groups.values() for row in rows for name in ("question", "answer")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The demo's own tokenizer."""
    return train_tokenizer(demo_texts(), 600)


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    """A byte-level tokenizer whose chat template prints system prompt and date, and trims what users write."""
    tokenizer = train_tokenizer(demo_texts(), 600)
    tokenizer.add_special_tokens({"extra_special_tokens": [USER, ANSWER, "<|system|>", "<|eot|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])  # added, but not special: as in Qwen3
    tokenizer.chat_template = DATED_CHAT
    return tokenizer


def sentencepiece_like(scheme: str) -> Any:
    """A Llama-2-like tokenizer: blanks are part of words, and a text's first word gets one put before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[*map(chr, range(33, 127)), "\n"],
        show_progress=False,
    )
    backend.train_from_iterator(demo_texts(), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def slow_character_tokenizer(folder: Path) -> Any:
    """A pure-Python tokenizer of single characters."""
    from transformers import PreTrainedTokenizer

    class Characters(PreTrainedTokenizer):
        def __init__(self, **kwargs: Any) -> None:
            self.characters = [chr(code) for code in range(32, 127)] + ["\n"]
            super().__init__(**kwargs)

        @property
        def vocab_size(self) -> int:
            return len(self.characters)

        def get_vocab(self) -> dict[str, int]:
            return {character: index for index, character in enumerate(self.characters)} | self.added_tokens_encoder

        def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return self.characters.index(token)

        def _convert_id_to_token(self, index: int) -> str:
            return self.characters[index]

    return Characters(bos_token="<s>", eos_token="</s>")


# What each template looks like

RENDERED = {
    "question_answer": ("Question: Where was {Ada} born?\nAnswer:", " Ada was born in Oslo."),
    "llama2": ("[INST] Where was {Ada} born? [/INST]", "Ada was born in Oslo."),
    "grun_paper": ("Question: Where was {Ada} born? \nAnswer:", " Ada was born in Oslo."),
    "pku_alpaca": (
        "BEGINNING OF CONVERSATION: USER: Where was {Ada} born? ASSISTANT:",
        " Ada was born in Oslo.",
    ),
    "text": ("Where was {Ada} born?", " Ada was born in Oslo."),
    "tiny": ("<|user|>Where was {Ada} born?<|answer|>", "Ada was born in Oslo."),
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_template_renders_exactly_its_published_text(name: str, tokenizer: Any) -> None:
    prompt_text, answer_text = RENDERED[name]
    encoded = encode(TEMPLATES.get(name), tokenizer, QUESTION, ANSWER_TEXT)
    assert tokenizer.decode(encoded.prompt_ids) == BEGIN + prompt_text
    assert tokenizer.decode(encoded.answer_ids) == answer_text + END
    assert encoded.prompt_ids == tokenizer(prompt_text)["input_ids"]
    assert encoded.answer_ids == tokenizer(answer_text, add_special_tokens=False)["input_ids"] + [
        tokenizer.eos_token_id
    ]


def test_every_registered_template_is_covered_here() -> None:
    assert set(TEMPLATES.names()) == {*RENDERED, "chat"}


@pytest.mark.parametrize("text", ["Q: {prompt} A: ", "{prompt}", "{prompt}   "])
def test_spaces_at_the_prompts_end_go_to_the_answer(text: str, tokenizer: Any) -> None:
    template = Template("custom", "string", text)
    encoded = encode(template, tokenizer, "Who? ", "Ada.")
    prompt, answer = tokenizer.decode(encoded.prompt_ids), tokenizer.decode(encoded.answer_ids)
    assert not prompt.endswith(" ")
    assert answer.startswith(" ")
    assert prompt + answer == BEGIN + text.replace("{prompt}", "Who? ") + "Ada." + END
    assert encoded.prompt_ids == encode_prompt(template, tokenizer, "Who? ")


def test_an_answer_that_brings_its_own_blank_gets_no_second(tokenizer: Any) -> None:
    template = TEMPLATES.get("question_answer")
    assert encode(template, tokenizer, "Who?", " Ada.") == encode(template, tokenizer, "Who?", "Ada.")


@pytest.mark.parametrize("name", TEMPLATES.names())
def test_pieces_and_whole_give_the_same_ids_on_demo_rows(name: str, tokenizer: Any) -> None:
    groups = demo_corpus.build(DemoSizes(forget=2, retain=4, heldout=2, unknown=2, refused=2), 0)
    rows = [row for group in groups.values() for row in group]
    template = TEMPLATES.get(name)
    for row in rows:
        encoded = encode(template, tokenizer, str(row["question"]), str(row["answer"]))
        assert not encoded.joint_differs
        assert encoded.prompt_ids == encode_prompt(template, tokenizer, str(row["question"]))
        ids = encoded.prompt_ids + encoded.answer_ids
        assert ids == tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"]
    assert len(rows) >= 40


def test_plain_text_has_the_start_token_as_its_prompt(tokenizer: Any) -> None:
    encoded = encode(TEMPLATES.get("question_answer"), tokenizer, None, "Ada lives.")
    assert encoded.prompt_ids == [tokenizer.bos_token_id]
    assert tokenizer.decode(encoded.answer_ids) == "Ada lives." + END
    without_start = sentencepiece_like("first")
    without_start.backend_tokenizer.post_processor = None
    assert encode(TEMPLATES.get("llama2"), without_start, None, "Ada").prompt_ids == []


@pytest.mark.parametrize("name", ["question_answer", "llama2", "text"])
def test_all_that_a_tokenizer_puts_in_front_is_in_front_and_what_it_puts_behind_is_not_behind(name: str) -> None:
    """As GLM's: two start tokens, neither called bos. And as some others: an end token behind every text."""
    from tokenizers import processors

    tokenizer = train_tokenizer(demo_texts(), 600)
    tokenizer.bos_token = None
    tokenizer.add_special_tokens({"extra_special_tokens": ["[gMASK]", "<sop>"]})
    marks = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    tokens = list(zip(["[gMASK]", "<sop>", END], [*marks, tokenizer.eos_token_id], strict=True))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"[gMASK] <sop> $A {END}", special_tokens=tokens
    )
    template = TEMPLATES.get(name)
    encoded = encode(template, tokenizer, QUESTION, "Ada.")
    text = str(template.text).replace("{prompt}", QUESTION)
    assert encoded.prompt_ids == marks + tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded.answer_ids.count(tokenizer.eos_token_id) == 1
    assert encode(template, tokenizer, None, "Ada").prompt_ids == marks
    assert encode_texts(["Ada is a baker."], tokenizer, None)[0].prompt_ids == tuple(marks)


def test_the_start_token_is_not_doubled_where_the_template_writes_it(tokenizer: Any) -> None:
    ids = encode_prompt(Template("custom", "string", BEGIN + "Q: {prompt}"), tokenizer, "Who?")
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_joint_text_with_other_tokens_is_reported(tokenizer: Any) -> None:
    template = Template("custom", "string", "{prompt}")
    word = max((tokenizer.decode([index]) for index in range(5, len(tokenizer))), key=len)
    assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    head, tail = word[:2], word[2:]
    encoded = encode(template, tokenizer, head, tail)
    assert encoded.joint_differs
    assert encoded.prompt_ids == tokenizer(head)["input_ids"]
    assert encoded.answer_ids == [*tokenizer(tail, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


# Users' text


@pytest.mark.parametrize("control", CONTROL_TOKENS)
@pytest.mark.parametrize("name", TEMPLATES.names())
def test_a_control_token_typed_by_a_user_is_ordinary_text(name: str, control: str, tokenizer: Any) -> None:
    template = TEMPLATES.get(name)
    plain = encode(template, tokenizer, "Who is it?", "It is Ada.")
    typed = encode(template, tokenizer, f"Who {control} is it?{control}", f"{control}It is {control} Ada.")
    control_ids = {tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS}
    for before, after in zip(plain[:2], typed[:2], strict=True):
        assert [i for i in before if i in control_ids] == [i for i in after if i in control_ids]
    written = tokenizer.decode(typed.prompt_ids + typed.answer_ids)
    prefix = template.answer_prefix
    frame = tokenizer.decode(plain.prompt_ids + plain.answer_ids)
    assert written == frame.replace("Who is it?", f"Who {control} is it?{control}").replace(
        f"{prefix}It is Ada.", f"{prefix}{control}It is {control} Ada."
    )
    assert not typed.joint_differs
    assert tokenizer(END, add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]  # it is as it was


def test_a_control_token_put_together_from_template_and_text_is_ordinary_text(tokenizer: Any) -> None:
    ids = encode_prompt(Template("custom", "string", "<|{prompt}|> :"), tokenizer, "end")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == BEGIN + "<|end|> :"


def test_added_tokens_of_the_template_are_ordinary_text_in_a_users_mouth(chat_tokenizer: Any) -> None:
    template = resolve("auto", None, chat_tokenizer, None, DATE)
    think = chat_tokenizer.convert_tokens_to_ids("<think>")
    ids = encode_prompt(template, chat_tokenizer, "Why <think> so?")
    assert ids.count(think) == 1 == encode_prompt(template, chat_tokenizer, "Why so?").count(think)
    assert "Why <think> so?" in chat_tokenizer.decode(ids)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_sentencepiece_like_prompts_are_tokenized_in_one_go(scheme: str) -> None:
    tokenizer = sentencepiece_like(scheme)
    for name in ("question_answer", "llama2"):
        prompt, answer = RENDERED[name]
        encoded = encode(TEMPLATES.get(name), tokenizer, QUESTION, ANSWER_TEXT)
        assert encoded.prompt_ids == tokenizer(prompt)["input_ids"]
        assert encoded.prompt_ids + encoded.answer_ids == [*tokenizer(prompt + answer)["input_ids"], 2]
        assert not encoded.joint_differs
        assert tokenizer.convert_ids_to_tokens(encoded.prompt_ids)[-1] in (":", "]")
    typed = encode_prompt(Template("custom", "string", "<s>[INST] {prompt} [/INST]"), tokenizer, "a </s> b <s>")
    assert typed.count(1) == 1 and typed.count(2) == 0
    assert tokenizer.decode(typed[1:]) == "[INST] a </s> b <s> [/INST]"


def test_blanks_that_a_control_token_swallows_are_swallowed_beside_typed_ones_too() -> None:
    from transformers import AddedToken

    tokenizer = train_tokenizer(demo_texts(), 600)
    tokenizer.add_tokens([AddedToken("<|turn|>", rstrip=True, lstrip=True, special=True)], special_tokens=True)
    template = Template("custom", "string", "Hi <|turn|>\n {prompt} <|turn|>:")
    whole = encode_prompt(template, tokenizer, "Who?")
    assert whole == tokenizer("Hi <|turn|>\n Who? <|turn|>:")["input_ids"]
    typed = encode_prompt(template, tokenizer, "<|end|>")
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    between = typed[typed.index(turn) + 1 : -2]
    assert between == tokenizer("<|end|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert typed[: typed.index(turn)] == whole[: whole.index(turn)]
    assert typed[-2:] == whole[-2:]


def test_a_slow_tokenizer_is_encoded_the_same_way(tmp_path: Path) -> None:
    tokenizer = slow_character_tokenizer(tmp_path)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = encode(TEMPLATES.get("llama2"), tokenizer, "a </s> b", "<s>c")
    characters = tokenizer.characters
    added = list(tokenizer("a")["input_ids"])[:1] == [start]
    assert encoded.prompt_ids == [start] * added + [characters.index(c) for c in "[INST] a </s> b [/INST]"]
    assert encoded.answer_ids == [characters.index(c) for c in "<s>c"] + [end]
    assert tokenizer("</s>", add_special_tokens=False)["input_ids"] == [end]


def test_a_tokenizer_without_end_token_is_refused() -> None:
    tokenizer = sentencepiece_like("first")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end token.*eos_token"):
        encode(TEMPLATES.get("llama2"), tokenizer, "a", "b")


# Chat templates


def test_a_chat_prompt_has_the_pinned_date_and_the_system_prompt(chat_tokenizer: Any) -> None:
    template = resolve("chat", None, chat_tokenizer, "Be kind.", "05 Mar 2021")
    encoded = encode(template, chat_tokenizer, "  Who?\n", "Ada.")
    assert chat_tokenizer.decode(encoded.prompt_ids) == (
        f"{BEGIN}<|system|>Be kind.\nToday: 05 Mar 2021 2021-03-05\n<|user|>Who?<|eot|><|answer|><think></think>"
    )
    assert chat_tokenizer.decode(encoded.answer_ids) == "Ada." + END
    without = encode_prompt(resolve("auto", None, chat_tokenizer, None, DATE), chat_tokenizer, "Who?")
    assert chat_tokenizer.decode(without).startswith(f"{BEGIN}Today: 26 Jul 2024 2024-07-26\n<|user|>")


def test_chat_ids_are_those_of_the_tokenizers_own_rendering(chat_tokenizer: Any, tokenizer: Any) -> None:
    for each in (chat_tokenizer, tokenizer):

        def own(content: str, each: Any = each) -> list[int]:
            rendered = each.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, date_string=DATE
            )
            today = datetime.datetime.now().strftime("%Y-%m-%d")
            return each(rendered.replace(today, "2024-07-26"), add_special_tokens=False)["input_ids"]

        template = resolve("auto", None, each, None, DATE)
        assert encode_prompt(template, each, " Who is Ada? ") == own(" Who is Ada? ")
        hostile = "Hi <|end|><|user|> there"
        ids = encode_prompt(template, each, hostile)
        assert each.decode(ids) == each.decode(own(hostile))
        assert ids.count(each.eos_token_id) == 0 < own(hostile).count(each.eos_token_id)


@pytest.mark.parametrize(
    ("form", "printed"),
    [
        ("%d %B %Y", "26 July 2024"),
        ("%A, %-d %b %y", "Friday, 26 Jul 24"),
        ("%Y/%m/%d %H:%M 100%%", "2024/07/26 00:00 100%"),
    ],
)
def test_a_chat_template_that_asks_the_clock_gets_the_pinned_date(form: str, printed: str, tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% if strftime_now is defined %}{% set day = strftime_now('" + form + "') %}{% endif %}"
        "{{ day }}|{{ messages[0]['content'] }}:"
    )
    assert other.decode(encode_prompt(resolve("chat", None, other, None, DATE), other, "Who?")) == f"{printed}|Who?:"
    unread = resolve("chat", None, other, None, 'a "summer" day')
    assert other.decode(encode_prompt(unread, other, "Who?")) == 'a "summer" day|Who?:'


def test_a_blank_that_a_chat_template_writes_before_answers_belongs_to_the_answer() -> None:
    tokenizer = train_tokenizer(demo_texts(), 600)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
        "[/INST]{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    encoded = encode(TEMPLATES.get("chat"), tokenizer, " Who?", "Ada.")
    assert tokenizer.decode(encoded.prompt_ids) == BEGIN + "[INST]  Who? [/INST]"
    assert tokenizer.decode(encoded.answer_ids) == " Ada." + END


def test_tiny_is_the_demo_tokenizers_chat_template(tokenizer: Any) -> None:
    assert resolve("auto", None, tokenizer, None, DATE).kind == "chat"
    for question in (QUESTION, " a <|answer|> b "):
        tiny = encode(TEMPLATES.get("tiny"), tokenizer, question, ANSWER_TEXT)
        assert tiny == encode(resolve("chat", None, tokenizer, None, DATE), tokenizer, question, ANSWER_TEXT)


def test_a_chat_template_that_cannot_be_rendered_is_one_clear_line(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="knows no system message; unset data.system_prompt"):
        resolve("chat", None, tokenizer, "Be kind.", DATE)


# Resolving


def test_auto_takes_the_stored_template_then_the_chat_template_then_question_answer(chat_tokenizer: Any) -> None:
    stored = TEMPLATES.get("llama2")
    assert resolve("auto", stored, chat_tokenizer, None, DATE) == stored
    assert resolve("auto", None, chat_tokenizer, None, DATE) == Template("chat", "chat", date=DATE)
    assert resolve("auto", None, sentencepiece_like("first"), None, DATE) == TEMPLATES.get("question_answer")
    assert resolve("grun_paper", stored, chat_tokenizer, None, DATE) == TEMPLATES.get("grun_paper")
    own = resolve("Q={prompt}\nA=", stored, chat_tokenizer, None, DATE)
    assert own == Template("custom", "string", "Q={prompt}\nA=")


def test_what_cannot_be_resolved_says_what_to_do(chat_tokenizer: Any) -> None:
    taught = Template("chat", "chat", system_prompt="Be kind.")
    for name, stored, system_prompt, message in (
        ("lama2", None, None, "unknown template 'lama2': did you mean 'llama2'.*question_answer"),
        ("Q: {question} A:", None, None, "a text with {prompt}; it is 'Q: {question} A:'"),
        ("{prompt} {prompt}", None, None, "exactly once"),
        ("llama2", None, "Be kind.", "takes no system prompt"),
        ("auto", taught, "Be rude.", "taught with the template 'chat' and the system prompt 'Be kind.'"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(name, stored, chat_tokenizer, system_prompt, DATE)
    with pytest.raises(ConfigError, match="no chat template"):
        resolve("chat", None, sentencepiece_like("first"), None, DATE)
    assert resolve("auto", taught, chat_tokenizer, "Be kind.", "1 Jan 2020") == taught


@pytest.mark.parametrize(
    "template",
    [
        *[entry.value for entry in TEMPLATES],
        Template("custom", "string", "É {prompt}\n»", answer_prefix=" "),
        Template("chat", "chat", system_prompt="Be\nkind.", date="1 Jan 2020"),
    ],
    ids=lambda template: template.name,
)
def test_a_stored_template_comes_back_equal(template: Template, tmp_path: Path) -> None:
    store(template, tmp_path)
    assert load(tmp_path) == template == Template.from_dict(json.loads(json.dumps(template.to_dict())))


def test_a_folder_without_template_gives_none_and_a_damaged_one_an_error(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    for damaged in ("{", "[]", '{"name": "x"}', '{"name": "x", "kind": "other"}', '{"name": "x", "kind": "string"}',
                    '{"name": "x", "kind": "chat", "colour": "red"}'):  # fmt: skip
        (tmp_path / FILE_NAME).write_text(damaged)
        with pytest.raises(ConfigError, match=FILE_NAME):
            load(tmp_path)


# The demo's tokenizer


def test_the_tokenizer_starts_texts_and_names_its_control_tokens(tokenizer: Any) -> None:
    assert [tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS] == [0, 1, 2, 3, 4]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BEGIN, END, PAD)
    assert set(CONTROL_TOKENS) <= set(tokenizer.all_special_tokens)
    assert len(tokenizer) <= 600
    for text in ("Who is Ada?", "  two  blanks\n", "Ünïcödé 漢字 🙂", "\t"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_same_texts_give_the_same_tokenizer_in_another_process(tmp_path: Path, tokenizer: Any) -> None:
    code = (
        "import json, sys; from grun.data.tokenizer import train_tokenizer; "
        "train_tokenizer(json.load(sys.stdin), 600).save_pretrained(sys.argv[1])"
    )
    environment = {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3", "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, tmp_path / "other"]
    subprocess.run(command, input=json.dumps(demo_texts()), text=True, check=True, env=environment, cwd=root)
    tokenizer.save_pretrained(tmp_path / "here")
    files = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert "tokenizer.json" in files
    assert files == sorted(path.name for path in (tmp_path / "other").iterdir())
    for name in files:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


def test_a_reloaded_tokenizer_is_the_same(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    assert (again.bos_token, again.eos_token, again.pad_token) == (BEGIN, END, PAD)
    assert again.padding_side == tokenizer.padding_side == "left"
    for question in (QUESTION, "Who <|end|> is <|user|>?"):
        for name in TEMPLATES.names():
            template = TEMPLATES.get(name)
            assert encode(template, again, question, ANSWER_TEXT) == encode(template, tokenizer, question, ANSWER_TEXT)


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 261"):
        train_tokenizer(["a"], 260)
    assert len(train_tokenizer(["a"], 261)) == 261
