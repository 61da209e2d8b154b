"""How a question and its answer become token ids: the same for training, scoring and generation.

The ids of a row are prompt ids + answer ids:

- Prompt ids: the start token, if the tokenizer adds one (a chat template renders its own), and the rendered prompt,
  tokenized in one go. Spaces at the end of the rendered prompt go to the answer, so that the prompt ends with the last
  token that says something, and the answer starts with " Paris", the way text is tokenized anywhere else.
- Answer ids: what the joint text adds to the prompt, and the end token. Where the joint text does not begin with the
  prompt's ids, the answer is tokenized alone, and `Encoded.joint_differs` says so.

Text of a user or of a data set never becomes a control token, whatever it spells (`grun.data.control_tokens`). Only a
row that spells one is tokenized in pieces, cut at the template's own control tokens, where a SentencePiece-like
tokenizer may put a blank before a piece that it would not put in one go.

This module imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grun.data.control_tokens import ControlTokens, Part, find_control_tokens, tokenize
from grun.errors import ConfigError, ModelError
from grun.files import read_json, write_json
from grun.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_NAME = "grun_template.json"
PLACE = "{prompt}"


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

    def __post_init__(self) -> None:
        if self.kind not in ("chat", "string"):
            raise ConfigError(f"template {self.name!r}: kind must be chat or string, not {self.kind!r}")
        if self.kind == "string" and (not isinstance(self.text, str) or self.text.count(PLACE) != 1):
            raise ConfigError(
                f"template {self.name!r}: the text must contain {PLACE} exactly once; it is {self.text!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Fields for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Template:
        """The template that `to_dict` wrote; ConfigError for anything else."""
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or not {"name", "kind"} <= set(fields) <= known:
            found = ", ".join(map(str, fields)) if isinstance(fields, dict) else repr(fields)
            raise ConfigError(f"a template has the fields {', '.join(sorted(known))}; found: {found}")
        return cls(**fields)


class Encoded(NamedTuple):
    """Token ids of one row, as generation will see them."""

    prompt_ids: list[int]
    """Start token and prompt."""
    answer_ids: list[int]
    """Answer and end token."""
    joint_differs: bool
    """Whether tokenizing prompt and answer as one text gives other ids than these."""


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


def resolve(
    name_or_text: str,
    stored: Template | None,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None,
    date: str,
) -> Template:
    """The template that an option means.

    Args:
        name_or_text: a name in `TEMPLATES`; or a text with {prompt}; or auto: `stored`, else the tokenizer's chat
            template, else question_answer.
        stored: what lies beside the model; None: nothing.
        tokenizer: of the model.
        system_prompt: system message for chat templates; with auto it must agree with what is stored.
        date: today's date for chat templates; a stored template keeps its own.

    Raises:
        ConfigError: the name is unknown, or the template cannot take what is asked.
    """
    if name_or_text == "auto" and stored is not None:
        if system_prompt is not None and system_prompt != stored.system_prompt:
            raise ConfigError(
                f"the model was taught with the template {stored.name!r} and the system prompt "
                f"{stored.system_prompt!r}; leave data.system_prompt unset, or name a template in data.template"
            )
        template = stored
    elif PLACE in name_or_text:
        template = Template("custom", "string", name_or_text)
    else:
        name = name_or_text
        if name == "auto":
            name = "chat" if tokenizer.chat_template else "question_answer"
        if name not in TEMPLATES and not name.replace("_", "").isalnum():
            raise ConfigError(
                f"data.template must be auto, a name from `list templates`, or a text with {PLACE}; it is {name!r}"
            )
        template = TEMPLATES.get(name)
        if template.kind == "chat":
            template = dataclasses.replace(template, system_prompt=system_prompt, date=date)
    if template.kind == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            "the tokenizer has no chat template; set data.template to a name from `list templates` or to a text "
            f"with {PLACE}"
        )
    if template.kind == "string" and system_prompt is not None:
        raise ConfigError(f"template {template.name!r} takes no system prompt; unset data.system_prompt or use chat")
    return template


def store(template: Template, folder: Path) -> None:
    """Write the template beside a model or into an adapter."""
    write_json(folder / FILE_NAME, template.to_dict())


def load(folder: Path) -> Template | None:
    """The template stored in a folder, or None."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        return Template.from_dict(read_json(path))
    except (json.JSONDecodeError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path} is damaged: {error}; remove it and name the template in data.template") from error


def encode(template: Template, tokenizer: PreTrainedTokenizerBase, prompt: str | None, completion: str) -> Encoded:
    """Token ids of a row.

    Args:
        template: as `resolve` gives it; not used where `prompt` is None.
        tokenizer: any transformers tokenizer with an end token.
        prompt: the question; None: plain text, whose prompt is the start token alone.
        completion: the answer; a blank at its beginning is dropped where the template puts one there.

    Raises:
        ModelError: the tokenizer has no end token.
        ConfigError: the chat template cannot be used.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ModelError("the tokenizer has no end token, so an answer cannot end; set its eos_token")
    control = _control_tokens(template, tokenizer)
    parts, prefix = _prompt_parts(template, tokenizer, prompt)
    prompt_ids = _with_start(template, prompt, control, tokenize(parts, tokenizer, control))
    answer = Part(prefix + (completion.lstrip(" ") if prefix.endswith(" ") else completion), written=False)
    joint_ids = _with_start(template, prompt, control, tokenize([*parts, answer], tokenizer, control))
    if joint_ids[: len(prompt_ids)] == prompt_ids:
        return Encoded(prompt_ids, [*joint_ids[len(prompt_ids) :], end], joint_differs=False)
    return Encoded(prompt_ids, [*tokenize([answer], tokenizer, control), end], joint_differs=True)


def encode_prompt(template: Template, tokenizer: PreTrainedTokenizerBase, prompt: str | None) -> list[int]:
    """Prompt ids alone: the same as `encode` gives, whatever the answer."""
    control = _control_tokens(template, tokenizer)
    parts, _ = _prompt_parts(template, tokenizer, prompt)
    return _with_start(template, prompt, control, tokenize(parts, tokenizer, control))


def _control_tokens(template: Template, tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    return find_control_tokens(tokenizer, f"{template.text}\n{tokenizer.chat_template}")


def _with_start(template: Template, prompt: str | None, control: ControlTokens, ids: list[int]) -> list[int]:
    """Put the start token in front, except where a chat template or the text itself has written it."""
    if prompt is not None and (template.kind == "chat" or (control.start and ids[:1] == control.start)):
        return ids
    return control.start + ids


def _prompt_parts(template: Template, tokenizer: PreTrainedTokenizerBase, prompt: str | None) -> tuple[list[Part], str]:
    """The rendered prompt without the spaces at its end, and what comes before the answer's text."""
    if prompt is None:
        return [], ""
    if template.kind == "chat":
        frame = _chat_frame(template, tokenizer, str(tokenizer.chat_template))
        prompt = prompt.lstrip() if frame.strips_left else prompt
        prompt = prompt.rstrip() if frame.strips_right else prompt
        before, after, prefix = frame.before, frame.after, frame.answer_prefix
    else:
        before, _, after = str(template.text).partition(PLACE)
        prefix = template.answer_prefix
    parts = [Part(before, True), Part(prompt, False), Part(after, True)]
    for index in reversed(range(len(parts))):
        text = parts[index].text.rstrip(" ")
        prefix = parts[index].text[len(text) :] + prefix
        parts[index] = parts[index]._replace(text=text)
        if text:
            break
    return parts, prefix


# Chat templates


class _Frame(NamedTuple):
    """What a chat template writes around the user's text."""

    before: str
    after: str
    answer_prefix: str
    """Spaces that the template writes between its generation prompt and an answer."""
    strips_left: bool
    strips_right: bool


_USER_MARK, _ANSWER_MARK = "GRUNuserZ7c1e0f5b9dZ", "GRUNanswerZ2b8d6a4f03Z"


@functools.lru_cache(maxsize=8)
def _chat_frame(template: Template, tokenizer: PreTrainedTokenizerBase, jinja: str) -> _Frame:
    """Render marks instead of texts, so that a user's text is never read as part of the template.

    The user's text is stripped where the template strips it; other rewriting of it is not seen, and not done.
    `jinja` is in the cache's key only, since a tokenizer's template can be set anew.
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
    return _Frame(before, after, prefix, spaced_before == before, spaced_after == after)


def _around_mark(rendered: str) -> tuple[str, str]:
    if rendered.count(_USER_MARK) != 1:
        raise ConfigError(
            "the tokenizer's chat template does not write the user's text once; name another in data.template"
        )
    before, _, after = rendered.partition(_USER_MARK)
    return before, after


def _render(template: Template, tokenizer: PreTrainedTokenizerBase, user: str, answer: str | None = None) -> str:
    """The chat template's text for a question, up to where the answer starts, or with the answer."""
    messages = [{"role": "user", "content": user}]
    if template.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": template.system_prompt})
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    try:
        rendered = tokenizer.apply_chat_template(
            messages,
            chat_template=_with_pinned_clock(tokenizer.get_chat_template(), template.date),
            tokenize=False,
            add_generation_prompt=answer is None,
            date_string=template.date,
        )
    except Exception as error:  # templates raise what they like
        line = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "; unset data.system_prompt if it knows no system message" if template.system_prompt is not None else ""
        raise ConfigError(f"the tokenizer's chat template cannot be rendered: {line}{hint}") from error
    return str(rendered)


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
