"""Conversations as chat data has them: lists of {role, content}, or of ShareGPT's {from, value}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grun.data.chat import System, Turn
from grun.errors import DataError

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= {"assistant": "assistant", "gpt": "assistant", "model": "assistant"}
"""Who speaks, by the value of the field role, or from."""


def read_turns(messages: Any, where: str) -> tuple[System | Turn, ...]:
    """A system message, if one stands first, and turns of user and assistant, of which the last one is whole.

    Args:
        messages: a list of them.
        where: names the field in errors, which never show what is said.
    """
    if not isinstance(messages, list):
        raise DataError(f"{where} must be a list of messages, each an object with role and content")
    said = [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, start=1)]
    system = [System(said.pop(0)[1])] if said and said[0][0] == "system" else []
    for number, (role, _) in enumerate(said):
        if role != ("user", "assistant")[number % 2]:
            raise DataError(
                f"{where}, message {number + 1 + len(system)} is of role {role}; a system message may stand first, "
                "then user and assistant speak in turn"
            )
    if len(said) % 2:
        raise DataError(f"{where} ends with the user; the last message must be the assistant's answer")
    texts = [text for _, text in said]
    return (*system, *(Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)))


def read_conversation(messages: Any, where: str) -> tuple[tuple[System | Turn, ...], str, str]:
    """What came before the last question, that question, and its answer, the last message; see `read_turns`."""
    turns = read_turns(messages, where)
    if not turns or isinstance(turns[-1], System):
        raise DataError(f"{where} holds no question and answer; the last message must be the assistant's answer")
    return turns[:-1], *turns[-1]


def read_history(pairs: Any, where: str) -> tuple[System | Turn, ...]:
    """Turns of a list of [question, answer]; see `read_turns`."""
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError(f"{where} must be a list of pairs [question, answer]")
    roles = ("user", "assistant")
    said = [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]
    return read_turns(said, where)


def to_messages(earlier: tuple[System | Turn, ...]) -> list[dict[str, str]]:
    """What `read_turns` reads."""
    said = [(role, text) for one in earlier for role, text in zip(("user", "assistant"), one, strict=False)]
    if earlier and isinstance(earlier[0], System):
        said[0] = ("system", earlier[0].text)
    return [{"role": role, "content": text} for role, text in said]


def _message(message: Any, where: str) -> tuple[str, str]:
    """Role and text."""
    if not isinstance(message, Mapping):
        raise DataError(f"{where} must be an object with role and content, or from and value")
    role, content = (message.get(name, message.get(other)) for name, other in (("role", "from"), ("content", "value")))
    role = role.lower() if isinstance(role, str) else ""
    if role not in ROLES:
        raise DataError(f"{where}: role must be one of {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)  # other parts are pictures and sounds
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where}: content must be a text that is not empty, or a list of parts of type text")
    return ROLES[role], content
