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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grun.data.chat import Earlier, System, Turn, chat_frame, chat_turns, put_system, with_system_mark, without_system
from grun.data.control_tokens import ControlTokens, Part, find_control_tokens, tokenize
from grun.errors import ConfigError, ModelError
from grun.files import read_json, write_json
from grun.reading import typed
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
            raise ConfigError(f"{FILE_NAME}, template {self.name!r}: kind must be chat or string, not {self.kind!r}")
        if self.kind == "string" and (not isinstance(self.text, str) or self.text.count(PLACE) != 1):
            raise ConfigError(
                f"{FILE_NAME}, template {self.name!r}: the text must contain {PLACE} exactly once; it is {self.text!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Fields for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Any, where: str = "a template") -> Template:
        """The template that `to_dict` wrote; ConfigError for anything else, which says that it stands in `where`."""
        template: Template = typed(cls, fields, where, ConfigError)
        return template


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
    return Template.from_dict(read_json(path, ConfigError), str(path))


def encode(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | None,
    completion: str,
    earlier: Earlier = (),
) -> Encoded:
    """Token ids of a row.

    Args:
        template: as `resolve` gives it; not used where `prompt` is None.
        tokenizer: any transformers tokenizer with an end token.
        prompt: the question; None: plain text, whose prompt is the start token alone.
        completion: the answer; a blank at its beginning is dropped where the template puts one there.
        earlier: a system message, in place of the template's, and what was asked and answered before, which become the
            beginning of the prompt; see `_earlier_parts`.

    Raises:
        ModelError: the tokenizer has no end token.
        ConfigError: the chat template cannot be used.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ModelError("the tokenizer has no end token, so an answer cannot end; set its eos_token")
    control = _control_tokens(template, tokenizer)
    parts, prefix = prompt_parts(template, tokenizer, prompt, earlier)
    prompt_ids = _with_start(template, prompt, control, tokenize(parts, tokenizer, control))
    answer = Part(_behind(prefix, completion), written=False)
    joint_ids = _with_start(template, prompt, control, tokenize([*parts, answer], tokenizer, control))
    if joint_ids[: len(prompt_ids)] == prompt_ids:
        return Encoded(prompt_ids, [*joint_ids[len(prompt_ids) :], end], joint_differs=False)
    return Encoded(prompt_ids, [*tokenize([answer], tokenizer, control), end], joint_differs=True)


def encode_prompt(
    template: Template, tokenizer: PreTrainedTokenizerBase, prompt: str | None, earlier: Earlier = ()
) -> list[int]:
    """Prompt ids alone: the same as `encode` gives, whatever the answer."""
    control = _control_tokens(template, tokenizer)
    parts, _ = prompt_parts(template, tokenizer, prompt, earlier)
    return _with_start(template, prompt, control, tokenize(parts, tokenizer, control))


def _control_tokens(template: Template, tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    return find_control_tokens(tokenizer, f"{template.text}\n{tokenizer.chat_template}")


def _with_start(template: Template, prompt: str | None, control: ControlTokens, ids: list[int]) -> list[int]:
    """Put the start token in front, except where a chat template or the text itself has written it."""
    if prompt is not None and (template.kind == "chat" or (control.start and ids[:1] == control.start)):
        return ids
    return control.start + ids


def _behind(prefix: str, completion: str) -> str:
    return prefix + (completion.lstrip(" ") if prefix.endswith(" ") else completion)


def prompt_parts(
    template: Template, tokenizer: PreTrainedTokenizerBase, prompt: str | None, earlier: Earlier = ()
) -> tuple[list[Part], str]:
    """The rendered prompt without the spaces at its end, and what comes before the answer's text."""
    if prompt is None:
        return [], ""
    system = next((one.text for one in earlier if isinstance(one, System)), None)
    template = template if system is None else with_system_mark(template)
    turns = without_system(earlier)
    if template.kind == "chat":
        frame = chat_frame(template, tokenizer, str(tokenizer.chat_template))
        prompt = prompt.lstrip() if frame.strips_left else prompt
        prompt = prompt.rstrip() if frame.strips_right else prompt
        before, after, prefix = frame.before, frame.after, frame.answer_prefix
    else:
        before, _, after = str(template.text).partition(PLACE)
        prefix = template.answer_prefix
    start = _earlier_parts(template, tokenizer, turns) if turns else [Part(before, True)]
    start = start if system is None else put_system(start, system)
    parts = [*start, Part(prompt, False), Part(after, True)]
    for index in reversed(range(len(parts))):
        text = parts[index].text.rstrip(" ")
        prefix = parts[index].text[len(text) :] + prefix
        parts[index] = parts[index]._replace(text=text)
        if text:
            break
    return parts, prefix


def _earlier_parts(template: Template, tokenizer: PreTrainedTokenizerBase, earlier: Sequence[Turn]) -> list[Part]:
    """What comes before the last question of a conversation: earlier turns, and what begins the last one.

    A chat template renders them as turns. A string template that has control tokens is written again for each turn,
    and each answer ends with the end token; any other one makes a plain text with blank lines between turns.
    """
    if template.kind == "chat":
        return chat_turns(template, tokenizer, earlier)
    before, _, after = str(template.text).partition(PLACE)
    control = find_control_tokens(tokenizer, "")
    has_turns = control.pattern is not None and control.pattern.search(str(template.text)) is not None
    between = str(tokenizer.eos_token) if has_turns else "\n\n"
    parts = [Part(before, True)]
    for question, answer in earlier:
        parts += [Part(question, False), Part(after, True), Part(_behind(template.answer_prefix, answer), False)]
        parts += [Part(between, True), Part(before, True)]
    return parts
