"""Ways to ask: templates, and what a tokenizer's chat template writes around the texts of a conversation.

Marks are rendered instead of texts, so that a text is never read as part of the template.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from grun.data.control_tokens import Part
from grun.errors import ConfigError
from grun.registry import Registry
from grun.runtime.reading import first_line, typed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FILE_NAME = "grun_template.json"
PLACE = "{prompt}"
OPTIONS = ("template", "system_prompt", "date", "template_arguments")
"""Options of `data` that make a template."""


@dataclass(frozen=True)
class Template:
    """A way to ask."""

    name: str
    """Name in `TEMPLATES`, or "custom"."""
    kind: str
    """"chat": the tokenizer's chat template; "string": `text`."""
    text: str | None = None
    """String templates: the prompt, with {prompt} once where the question goes; the answer follows it."""
    answer_prefix: str = ""
    """String templates: what stands between prompt and answer; it belongs to the answer's tokens."""
    system_prompt: str | None = None
    """Chat templates: system message; None: what the chat template does without one."""
    date: str = "26 Jul 2024"
    """Chat templates: today's date, for those that print one."""
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    """Chat templates: further arguments, such as enable_thinking."""
    prompt_hash: str | None = field(default=None, compare=False)
    """Hash of the token ids of `PROBE` when it was stored; None: not known."""
    guard: str | None = None
    """What a provider puts in front of every conversation: the beginning of its system message, or, where the template
    writes none, of its first question."""
    examples: list[list[str]] = field(default_factory=list, hash=False)
    """Questions, each with its answer, that come as turns before every conversation."""

    def __post_init__(self) -> None:
        if self.kind not in ("chat", "string"):
            raise ConfigError(f"{FILE_NAME}, template {self.name!r}: kind must be chat or string, not {self.kind!r}")
        if self.kind == "string" and (not isinstance(self.text, str) or self.text.count(PLACE) != 1):
            raise ConfigError(
                f"{FILE_NAME}, template {self.name!r}: the text must contain {PLACE} exactly once; it is {self.text!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Fields for JSON; `arguments` and those below it where there are any."""
        missing: list[tuple[str, Any]] = [("arguments", {}), ("prompt_hash", None), ("guard", None), ("examples", [])]
        return {name: value for name, value in dataclasses.asdict(self).items() if (name, value) not in missing}

    def options(self) -> dict[str, Any]:
        """The options of `data` that name this template; auto where none do."""
        if self.kind == "chat":
            values = ("chat", self.system_prompt, self.date, self.arguments)
            return {f"data.{name}": value for name, value in zip(OPTIONS, values, strict=True)}
        if self == Template("custom", "string", self.text):
            return {"data.template": self.text}
        known = self.name in TEMPLATES and TEMPLATES.get(self.name) == self
        return {"data.template": self.name if known else "auto"}

    def guarding(self, other: Template) -> Template:
        """Another template with what stands in front of every conversation here."""
        return dataclasses.replace(other, guard=self.guard, examples=self.examples)

    @classmethod
    def from_dict(cls, fields: Any, where: str = "a template") -> Template:
        """The template that `to_dict` wrote; ConfigError for anything else, which names `where` it stands."""
        template: Template = typed(cls, fields, where, ConfigError)
        return template


TEMPLATES: Registry[Template] = Registry("template")

for _template, _description in (
    (Template("question_answer", "string", "Question: {prompt}\nAnswer:", " "), "Question: ... newline Answer: ..."),
    (Template("llama2", "string", "[INST] {prompt} [/INST]"), "[INST] ... [/INST], the answer directly behind"),
    (
        Template("grun_paper", "string", "Question: {prompt} \nAnswer:", " "),
        "GRUN's published one: question_answer with a blank before the newline",
    ),
    (
        Template("pku_alpaca", "string", "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:", " "),
        "PKU-SafeRLHF's: BEGINNING OF CONVERSATION: USER: ... ASSISTANT: ...",
    ),
    (Template("text", "string", "{prompt}", " "), "the prompt as it is, and a blank before the answer"),
    (Template("chat", "chat"), "the tokenizer's own chat template, system prompt and date pinned"),
    (Template("tiny", "string", "<|user|>{prompt}<|answer|>"), "control tokens of the demo's tokenizer"),
):
    TEMPLATES.add(_template.name, _template, _description)


class Turn(NamedTuple):
    """A question that was asked before, and what was answered."""

    question: str
    answer: str


class System(NamedTuple):
    """The system message of one conversation."""

    text: str


Earlier = Sequence[System | Turn]
"""What comes before the last question of a conversation: a system message at most, at the beginning, and turns."""


def without_system(earlier: Earlier) -> list[Turn]:
    """The turns alone."""
    return [one for one in earlier if isinstance(one, Turn)]


class Frame(NamedTuple):
    """What a chat template writes around the user's text."""

    before: str
    after: str
    answer_prefix: str
    """Spaces that the template writes between its generation prompt and an answer."""
    strips_left: bool
    strips_right: bool


SET_ELSEWHERE = ("messages", "date_string", "strftime_now", "bos_token", "eos_token", "raise_exception")
"""Names a chat template reads that are no further arguments of it, besides those of `apply_chat_template` itself."""
_USER_MARK, _ANSWER_MARK = "GRUNuserZ7c1e0f5b9dZ", "GRUNanswerZ2b8d6a4f03Z"
_SYSTEM_MARK = "GRUNsystemZ5d0b3e8c71Z"


@functools.lru_cache(maxsize=8)
def chat_frame(template: Template, tokenizer: PreTrainedTokenizerBase, jinja: str) -> Frame:
    """What stands around a single question.

    The user's text is stripped where the template strips it; other rewriting of it is not seen, and not done.
    `jinja` is in the cache's key only, since a tokenizer's template can be replaced.
    """
    before, after = _around_mark(_render(template, tokenizer, _USER_MARK))
    spaced_before, spaced_after = _around_mark(_render(template, tokenizer, f" {_USER_MARK} "))
    prefix = ""
    try:
        whole = _render(template, tokenizer, _USER_MARK, _ANSWER_MARK)
    except ConfigError:  # a template for single turns
        whole = ""
    start = before + _USER_MARK + after
    if whole.startswith(start) and whole.count(_ANSWER_MARK) == 1:
        between = whole[len(start) : whole.index(_ANSWER_MARK)]
        prefix = between if not between.strip(" ") else ""
    return Frame(before, after, prefix, spaced_before == before, spaced_after == after)


def chat_turns(template: Template, tokenizer: PreTrainedTokenizerBase, earlier: Sequence[Turn]) -> list[Part]:
    """What comes before the last question of a conversation; ConfigError where the template writes no such turns."""
    marks = [_USER_MARK, _ANSWER_MARK] * len(earlier) + [_USER_MARK]
    rendered = _render(template, tokenizer, *marks)
    either = f"{_USER_MARK}|{_ANSWER_MARK}"
    if re.findall(either, rendered) != marks:
        raise ConfigError(
            "the tokenizer's chat template does not write each turn of a conversation once; name another template in "
            "data.template"
        )
    texts = [text.strip() for turn in earlier for text in turn]
    written = re.split(either, rendered)[:-1]  # without what follows the last question
    parts = [Part(written[0], True)]
    for text, after in zip(texts, written[1:], strict=True):
        parts += [Part(text, False), Part(after, True)]
    return parts


def with_system_mark(template: Template) -> Template:
    """The template with a mark for a system message, which `put_system` replaces."""
    if template.kind != "chat":
        raise ConfigError(
            f"a row has a system message, and the template {template.name!r} takes none; set data.template=chat, or "
            "leave the system messages out"
        )
    return dataclasses.replace(template, system_prompt=_SYSTEM_MARK)


def writes_system(template: Template, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes a system message, once, before the question."""
    if template.kind != "chat":
        return False
    try:
        frame = chat_frame(with_system_mark(template), tokenizer, str(tokenizer.chat_template))
    except ConfigError:
        return False
    return (frame.before + frame.after).count(_SYSTEM_MARK) == frame.before.count(_SYSTEM_MARK) == 1


def put_system(parts: Sequence[Part], text: str) -> list[Part]:
    """The parts with a system message in place of its mark; ConfigError unless the chat template writes it once."""
    if sum(part.text.count(_SYSTEM_MARK) for part in parts) != 1:
        raise ConfigError(
            "the tokenizer's chat template does not write a row's system message once; name another in data.template"
        )
    found = []
    for part in parts:
        before, mark, after = part.text.partition(_SYSTEM_MARK)
        found += [Part(before, True), Part(text.strip(), False), Part(after, True)] if mark else [part]
    return found


def _around_mark(rendered: str) -> tuple[str, str]:
    if rendered.count(_USER_MARK) != 1:
        raise ConfigError(
            "the tokenizer's chat template does not write the user's text once; name another in data.template"
        )
    before, _, after = rendered.partition(_USER_MARK)
    return before, after


def _render(template: Template, tokenizer: PreTrainedTokenizerBase, *texts: str) -> str:
    """The chat template's text for what user and assistant say in turn, up to where the next answer starts, if any."""
    messages = [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)]
    if template.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": template.system_prompt})
    return render(template, tokenizer, messages, begin_answer=len(texts) % 2 == 1)


def render(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    begin_answer: bool,
    go_on: bool = False,
) -> str:
    """The chat template's text for messages; up to where an answer starts, or where the last message goes on."""
    try:
        rendered = tokenizer.apply_chat_template(
            messages,
            chat_template=_with_pinned_clock(tokenizer.get_chat_template(), template.date),
            tokenize=False,
            add_generation_prompt=begin_answer,
            continue_final_message=go_on,
            date_string=template.date,
            **template.arguments,
        )
    except Exception as error:  # templates raise what they like
        hint = "; unset data.system_prompt if it knows no system message" if template.system_prompt is not None else ""
        raise ConfigError(
            f"the tokenizer's chat template cannot be rendered: {first_line(error)}{hint}; or name another template in "
            "data.template"
        ) from error
    return str(rendered)


def variables(jinja: str) -> set[str] | None:
    """Names that a chat template reads; None where that is not known."""
    import jinja2
    import jinja2.meta

    try:
        found = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(jinja)
    except jinja2.TemplateSyntaxError:  # such as transformers' own tags
        return None
    return jinja2.meta.find_undeclared_variables(found)


def _with_pinned_clock(jinja: str, date: str) -> str:
    """A chat template that asks the clock itself (`strftime_now`) is given `date` instead, where it can be read.

    transformers hands no functions to a template, so a macro of that name fills in the parts of a format.
    """
    if "strftime_now" not in jinja:
        return jinja
    for form in ("%d %b %Y", "%d %B %Y", "%Y-%m-%d"):
        try:
            moment = datetime.datetime.strptime(date, form)
            break
        except ValueError:
            continue
    else:
        return f"{{%- macro strftime_now(format) -%}}{{{{ {json.dumps(date)} }}}}{{%- endmacro -%}}{jinja}"
    parts = {f"%{letter}": moment.strftime(f"%{letter}") for letter in "aAbBdHIjmMpSuUwWyY"}
    parts |= {"%-d": str(moment.day), "%-m": str(moment.month), "%F": moment.strftime("%Y-%m-%d"), "%%": "%"}
    filled = "format" + "".join(f" | replace({key!r}, {json.dumps(value)})" for key, value in parts.items())
    return f"{{%- macro strftime_now(format) -%}}{{{{ {filled} }}}}{{%- endmacro -%}}{jinja}"
