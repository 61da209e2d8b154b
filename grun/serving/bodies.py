"""What clients send, as OpenAI's API has it; pydantic refuses what is not so, with the field's name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from grun.runtime.reading import is_unicode, texts_in

Name = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=4)]
MOST_ANSWERS = 16
"""To one prompt in one request."""


class Body(BaseModel):
    """Numbers are no texts, and a field that is not known is an error, so that nothing is passed over in silence."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @field_validator("*")
    @classmethod
    def _of_characters(cls, value: Any) -> Any:
        if not all(map(is_unicode, texts_in(value))):
            raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is no character")
        return value


class Part(Body):
    """A part of a message; texts alone."""

    type: Literal["text"]
    text: str


class Message(Body):
    """Who says what; a last message of the assistant is a begun answer, which goes on."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def text(self) -> str:
        """What is said."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Grun(Body):
    """GRUN's own field, for the owner's key."""

    gates: bool = False
    """Tell gate values."""
    edits: bool = True
    """False: the bare base answers."""
    off: Annotated[list[Name], Field(max_length=10_000)] = []
    """Requests whose edits are off for this answer."""


class Asking(Body):
    """Fields that both requests share."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Stops | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None
    grun: Grun = Grun()

    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def longest(self) -> int | None:
        """Longest answer that is asked for, tokens."""
        return self.max_tokens


class ChatBody(Asking):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None

    def longest(self) -> int | None:
        """See `Asking`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def top(self) -> int | None:
        """How many tokens are told beside each; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Asking):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_ANSWERS)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_ANSWERS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None

    def top(self) -> int | None:
        """See `ChatBody`."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids."""
        given: Any = self.prompt
        one = isinstance(given, str) or isinstance(given[0], int)
        return [given] if one else list(given)


class NewRequest(Body):
    """POST /grun/requests."""

    adapter: Annotated[str, Field(min_length=1, max_length=4096)]
    """Folder on the server's machine."""
    name: Name


class WaysBody(Body):
    """POST /grun/attacks."""

    prompt: Annotated[str, Field(min_length=1)]
    answer: str | None = None
    """What the model says without edits, for begun answers."""
