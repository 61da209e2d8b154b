"""Named choices: a registry maps a name to an object, or to an import string resolved on first use.

Each kind has a decorator in its room, such as `metric` in `grun/evaluation/metrics/registry.py`, made by
`Registry.register`: it takes the name and a few typed options, and the first paragraph of the docstring is the line
that `python -m grun list`, the docs and the reports show. Another package adds to any registry by naming its modules
under the entry point group `grun.plugins`.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from grun.errors import ConfigError, unknown_name

T = TypeVar("T")
F = TypeVar("F")

log = logging.getLogger(__name__)

PLUGINS = "grun.plugins"
"""Entry point group whose modules are imported before a registry is read as a whole."""
REGISTRIES = {
    "objectives": "grun.objectives.terms:OBJECTIVES",
    "terms": "grun.objectives.terms:TERMS",
    "parametrizations": "grun.method.parametrization:PARAMETRIZATIONS",
    "gates": "grun.method.gate:GATES",
    "edits": "grun.method.edits:EDITS",
    "actions": "grun.method.actions:ACTIONS",
    "templates": "grun.data.templates:TEMPLATES",
    "benchmarks": "grun.data.corpus:BENCHMARKS",
    "models": "grun.loading.named:MODELS",
    "metrics": "grun.evaluation.metrics:METRICS",
    "attacks": "grun.evaluation.attacks.base:ATTACKS",
    "suites": "grun.evaluation.suites.base:SUITES",
}
"""Where each registry is, by the plural of its kind."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One named choice and the line that `python -m grun list` prints for it."""

    name: str
    value: T | str
    description: str
    source: str
    """Module or distribution that it comes from, for messages."""


class Registry(Generic[T]):
    """Choices of one kind, in the order of the modules that add them."""

    def __init__(self, kind: str, *modules: str) -> None:
        """An empty registry.

        Args:
            kind: the singular noun used in error messages, such as "gate".
            modules: what is imported, in this order, before the registry is read as a whole or an unknown name is
                looked up, so that its decorators have run; a package stands for all of its modules.
        """
        self.kind = kind
        self._modules = modules
        self._entries: dict[str, Entry[T]] = {}

    def add(self, name: str, value: T | str, description: str, source: str | None = None) -> None:
        """Register `value`, or the import string "package.module:attribute", under `name`; `source` is its module."""
        if source is None:
            source = value.partition(":")[0] if isinstance(value, str) else getattr(value, "__module__", "grun")
        source = _loading or source
        if name in self._entries:
            raise ConfigError(
                f"{self.kind} {name!r} is registered twice, by {self._entries[name].source} and by {source}; "
                "choose another name"
            )
        self._entries[name] = Entry(name, value, description, source)

    def register(
        self, name: str, make: Callable[[Any], T] | None = None, *, description: str | None = None
    ) -> Callable[[F], F]:
        """Return a decorator that registers a function or class, or what `make` makes of it, and gives it back.

        Its description is the first paragraph of its docstring, if it is not given.
        """

        def decorate(value: F) -> F:
            made: Any = make(value) if make else value
            self.add(name, made, summary(value) if description is None else description, value.__module__)
            return value

        return decorate

    def get(self, name: str) -> T:
        """Return the choice called `name`, importing it if needed; ConfigError lists the known names."""
        if name not in self._entries:
            self._load()
        if name not in self._entries:
            raise ConfigError(unknown_name(self.kind, name, list(self._entries)))
        value = self._entries[name].value
        if not isinstance(value, str):
            return value
        module, _, attribute = value.partition(":")
        try:
            found: T = getattr(importlib.import_module(module), attribute)
            return found
        except ModuleNotFoundError as error:
            raise ConfigError(f"{self.kind} {name!r} needs the missing package {error.name!r}; install it") from error

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self.names()

    def __iter__(self) -> Iterator[Entry[T]]:
        self._load()
        return iter(list(self._entries.values()))

    def names(self) -> list[str]:
        """Names in the order in which they were added."""
        return [entry.name for entry in self]

    def _load(self) -> None:
        modules, self._modules = self._modules, ()
        for name in modules:
            package = importlib.import_module(name)
            for found in pkgutil.iter_modules(getattr(package, "__path__", ()), f"{name}."):
                importlib.import_module(found.name)
        # Some of them may have been imported before, in another order.
        self._entries = dict(sorted(self._entries.items(), key=lambda item: _place(item[1].source, modules)))
        load_plugins()


def _place(source: str, modules: Sequence[str]) -> int:
    """Which of `modules` an entry's source is, or lies in; past the last for any other."""
    return next((n for n, name in enumerate(modules) if f"{source}.".startswith(f"{name}.")), len(modules))


def summary(value: Any) -> str:
    """First paragraph of a docstring in one line, without its full stop and the capital it starts with.

    ValueError for a function or class without a docstring.
    """
    text = " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split()).removesuffix(".")
    if not text:
        raise ValueError(f"{value!r} needs a docstring; its first paragraph is its line in `python -m grun list`")
    return text[0].lower() + text[1:] if text[1:2].islower() or text.startswith("A ") else text


def registry(kind: str) -> Registry[Any]:
    """The registry of a kind, a key of `REGISTRIES`."""
    module, _, attribute = REGISTRIES[kind].partition(":")
    found: Registry[Any] = getattr(importlib.import_module(module), attribute)
    return found


def table(kind: str, **columns: Callable[[Any], str]) -> str:
    """A registry as a Markdown table of names and descriptions, for the docs.

    Args:
        kind: a key of `REGISTRIES`.
        columns: further columns by their heading: from a registered value to the text of its cell.
    """
    found = registry(kind)
    rows = [[found.kind, "what it is", *columns], ["---"] * (2 + len(columns))]
    for entry in found:
        more = [make(found.get(entry.name)) for make in columns.values()]
        rows.append([cell.replace("|", "\\|") for cell in (f"`{entry.name}`", entry.description, *more)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


_loading = ""
"""The distribution whose plugin is being imported."""
_loaded = False


def load_plugins() -> None:
    """Import, once, what installed packages name under the entry point group `grun.plugins`.

    A plugin that cannot be imported is left out with a warning. ConfigError if it takes a name that is taken.
    """
    global _loaded, _loading
    if _loaded:
        return
    _loaded = True
    for plugin in entry_points(group=PLUGINS):
        _loading = plugin.value if plugin.dist is None else f"{plugin.dist.name} {plugin.dist.version}"
        try:
            plugin.load()
        except ConfigError:
            raise
        except Exception as error:
            log.warning(
                "%s is left out: its plugin %s fails, %s: %s", _loading, plugin.value, type(error).__name__, error
            )
        finally:
            _loading = ""
