"""How a question and its answer become token ids: the same for training, scoring and generation.

The ids of a row are prompt ids + answer ids:

- Prompt ids: what the tokenizer puts before every text, a start token or several (a chat template renders its own), and
  the rendered prompt, tokenized in one go. Spaces at the end of the rendered prompt go to the answer, so that the
  prompt ends with a token that is more than blanks, and the answer starts with " Paris", the way text is tokenized
  anywhere else.
- Answer ids: what the joint text adds to the prompt, and the end token. Where the joint text does not begin with the
  prompt's ids, the answer is tokenized alone, and `Encoded.joint_differs` is set.

Text of a user or of a data set never becomes a control token, whatever it spells (`grun.data.control_tokens`). Only a
row that spells one is tokenized in pieces, cut at the template's own control tokens, where a SentencePiece-like
tokenizer may put a blank before a piece that it would not put in one go.

This module imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grun.config.options import DataConfig, is_stored, is_users
from grun.data.chat import (
    FILE_NAME,
    OPTIONS,
    PLACE,
    SET_ELSEWHERE,
    TEMPLATES,
    Earlier,
    System,
    Template,
    Turn,
    chat_frame,
    chat_turns,
    put_system,
    variables,
    with_system_mark,
    without_system,
    writes_system,
)  # fmt: skip
from grun.data.control_tokens import ControlTokens, Part, find_control_tokens, tokenize
from grun.data.tokenizer import ANSWER, USER
from grun.errors import ConfigError, ModelError
from grun.runtime.files import content_hash, read_json, write_json
from grun.runtime.runs import RUN_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PROBE = "Who is it?"
"""Question whose tokens show whether a template still writes what it wrote."""


class Encoded(NamedTuple):
    """Token ids of one row, as generation will see them."""

    prompt_ids: list[int]
    """Start tokens and prompt."""
    answer_ids: list[int]
    """Answer and end token."""
    joint_differs: bool
    """Whether tokenizing prompt and answer as one text gives other ids than these."""


def resolve(
    name_or_text: str,
    stored: Template | None,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None,
    date: str,
    arguments: Mapping[str, Any] | None = None,
) -> Template:
    """The template that an option means; one line where it was stored and the tokenizer now makes other tokens of it.

    Args:
        name_or_text: a name in `TEMPLATES`; or a text with {prompt}; or auto: `stored`, else the tokenizer's chat
            template, else question_answer.
        stored: what was saved with the model; None: nothing.
        tokenizer: of the model.
        system_prompt: system message for chat templates; with auto it must agree with what is stored.
        date: today's date for chat templates; a stored template keeps its own.
        arguments: further arguments for chat templates; a stored template keeps its own.

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
    else:
        template = _named(name_or_text, tokenizer)
        if template.kind == "chat":
            given = dict(arguments or {})
            template = dataclasses.replace(template, system_prompt=system_prompt, date=date, arguments=given)
        if stored is not None:
            template = stored.guarding(template)
    _check(template, tokenizer, system_prompt, arguments)
    missing = [token for token in (USER, ANSWER) if token not in tokenizer.get_vocab()]
    if template.name == "tiny" and missing and template != stored:
        raise ConfigError(
            f"data.template=tiny is for the demo's tokenizer; this one has no token {missing[0]}, so a question would "
            "be put in text that the model was never taught: set data.template=auto"
        )
    made = content_hash(encode_prompt(template, tokenizer, PROBE))
    if stored is not None and template == stored and stored.prompt_hash not in (None, made):
        log.warning(
            "the tokenizer, or its chat template, is not the one that the template %r was stored with: questions are "
            "other tokens now, so gates may not open and answers may be others; take the tokenizer's files of then",
            stored.name,
        )
    return dataclasses.replace(template, prompt_hash=made)


def _named(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of a name, of a text, or of the tokenizer (auto)."""
    if PLACE in name:
        return Template("custom", "string", name)
    if name == "auto":
        name = "chat" if tokenizer.chat_template else "question_answer"
    if name not in TEMPLATES and not name.replace("_", "").isalnum():
        raise ConfigError(
            f"data.template must be auto, a name from `list templates`, or a text with {PLACE}; it is {name!r}"
        )
    return TEMPLATES.get(name)


def _check(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None,
    arguments: Mapping[str, Any] | None,
) -> None:
    """ConfigError where the template cannot take what is asked."""
    if template.kind == "chat":
        if not tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template; set data.template to a name from `list templates` or to a text "
                f"with {PLACE}"
            )
        check_arguments(template.arguments, tokenizer)
    elif system_prompt is not None:
        raise ConfigError(f"template {template.name!r} takes no system prompt; unset data.system_prompt or use chat")
    elif arguments:
        raise ConfigError(f"template {template.name!r} takes no arguments; unset data.template_arguments or use chat")


def in_force(config: Any, stored: Template | None, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that a command asks with: what its user sets, else what is stored, else a profile's or the default.

    `config` is of a command with `data` and `sources`; `stored` lies with the adapter, else with the model.

    Raises:
        ConfigError: as `resolve`; and where a part of the stored template is set and the template is not, so that
            nobody can have meant it.
    """
    given = {f"data.{name}": getattr(config.data, name) for name in OPTIONS}
    if stored is None:
        return _of_options(given, None, tokenizer)
    there = stored.options()
    users = {key: value for key, value in given.items() if is_users(config, key) and value != "auto"}
    changed = {key: value for key, value in users.items() if value != there.get(key, value)}
    if "data.template" not in users:
        if changed:
            key, value = next(iter(changed.items()))
            raise ConfigError(
                f"{key}={value!r}, but the model was taught with the template {stored.name!r} and {there[key]!r}; "
                f"leave {key} unset, or name a template in data.template to ask in another way"
            )
        template = _of_options({**users, "data.template": "auto"}, stored, tokenizer)
        if given["data.template"] not in ("auto", there["data.template"]):
            log.warning("data.template=%s gives way to the stored template %s", given["data.template"], stored.name)
        return template
    kept = {key: value for key, value in given.items() if not is_stored(config, key)}
    template = _of_options({**kept, **(there if users["data.template"] == "chat" else {}), **users}, stored, tokenizer)
    if template != stored:
        log.warning(
            "%s: set by you; stored is %s. Gates may not open in another template than they were trained in",
            _shown(changed), _shown(there),
        )  # fmt: skip
    return template


def _of_options(values: Mapping[str, Any], stored: Template | None, tokenizer: PreTrainedTokenizerBase) -> Template:
    name, system_prompt, date, arguments = (values.get(f"data.{option}") for option in OPTIONS)
    return resolve(str(name), stored, tokenizer, system_prompt, date or DataConfig.date, arguments)


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items() if value not in (None, {}))


def check_arguments(arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """ConfigError for arguments that are set elsewhere; one line for those that the chat template does not read."""
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, *SET_ELSEWHERE} - {"tools", "documents"}
    for name in arguments:
        if not isinstance(name, str):
            raise ConfigError(f"data.template_arguments maps names to values; {name!r} is no name")
        if name in taken:
            raise ConfigError(f"data.template_arguments: {name} is set by GRUN itself (data.date, data.system_prompt)")
    read = variables(str(tokenizer.chat_template))
    if arguments and read is not None and (unread := sorted(set(arguments) - read)):
        known = ", ".join(sorted(read - taken)) or "no further one"
        log.warning("the chat template does not read the argument %s; it reads: %s", unread[0], known)


def store(template: Template, folder: Path) -> None:
    """Write the template into the folder of a model or an adapter."""
    write_json(folder / FILE_NAME, template.to_dict())


def load(folder: Path) -> Template | None:
    """The template stored in a folder, or the one that its run.json names; None where there is none."""
    path, run = folder / FILE_NAME, folder / RUN_FILE
    if path.is_file():
        return Template.from_dict(read_json(path, ConfigError), str(path))
    values = read_json(run, ConfigError) if run.is_file() else None
    used = values.get("template") if isinstance(values, dict) else None
    return None if used is None else Template.from_dict(used, str(run))


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
        prompt: the question; None: plain text, whose prompt is what starts every text.
        completion: the answer; a blank at its beginning is dropped where the template puts one there.
        earlier: a system message, in place of the template's, and what was asked and answered before, which become the
            beginning of the prompt; see `_earlier_parts`. The template's guard and examples stand in front of both.

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
    """Put the start tokens in front, except where a chat template or the text itself has written them."""
    written = control.start and ids[: len(control.start)] == control.start
    if prompt is not None and (template.kind == "chat" or written):
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
    system, guard = next((one.text for one in earlier if isinstance(one, System)), None), template.guard
    if guard is not None and writes_system(template, tokenizer):
        own = template.system_prompt if system is None else system
        system, guard = guard if own is None else f"{guard}\n\n{own}", None
    template = template if system is None else with_system_mark(template)
    turns = [*(Turn(*example) for example in template.examples), *without_system(earlier)]
    if template.kind == "chat":
        frame = chat_frame(template, tokenizer, str(tokenizer.chat_template))
        prompt = prompt.lstrip() if frame.strips_left else prompt
        prompt = prompt.rstrip() if frame.strips_right else prompt
        before, after, prefix = frame.before, frame.after, frame.answer_prefix
    else:
        before, _, after = str(template.text).partition(PLACE)
        prefix = template.answer_prefix
    start = _earlier_parts(template, tokenizer, turns) if turns else [Part(before, True)]
    if guard is not None:
        start.insert(1, Part(f"{guard}\n\n", False))
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


def user_turn_ids(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The shortest run of ids that stands before a second question of a conversation and not before an answer.

    It holds a control token of the tokenizer, so that text which spells it, being tokenized as text, is not taken for
    it. Empty where the template begins a user's turn with plain text.
    """
    parts, _ = prompt_parts(template, tokenizer, "a", [Turn("b", "c")])
    groups = [(written, "".join(part.text for part in group)) for written, group in groupby(parts, lambda p: p.written)]
    written = [text for is_written, text in groups if is_written]
    if len(written) < 3:
        return []
    before_answer, before_question = (
        list(tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]) for text in written[-3:-1]
    )
    control = set(_control_tokens(template, tokenizer).ids.values())
    starts = range(len(before_answer))
    for count in range(1, len(before_question) + 1):
        ids = before_question[-count:]
        if control & set(ids) and all(before_answer[start : start + count] != ids for start in starts):
            return ids
    return []
