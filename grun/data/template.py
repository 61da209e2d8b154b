"""Ways to ask: what a template is, and those that are known by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from grun.errors import ConfigError
from grun.registry import Registry
from grun.runtime.reading import typed

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

    def __post_init__(self) -> None:
        if self.kind not in ("chat", "string"):
            raise ConfigError(f"{FILE_NAME}, template {self.name!r}: kind must be chat or string, not {self.kind!r}")
        if self.kind == "string" and (not isinstance(self.text, str) or self.text.count(PLACE) != 1):
            raise ConfigError(
                f"{FILE_NAME}, template {self.name!r}: the text must contain {PLACE} exactly once; it is {self.text!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Fields for JSON; `arguments` and `prompt_hash` where there are any."""
        missing: tuple[tuple[str, Any], ...] = (("arguments", {}), ("prompt_hash", None))
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
