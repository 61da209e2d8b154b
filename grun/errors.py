"""Errors meant for users: one line with what was wrong, what was expected and what to do."""

import difflib


class GrunError(Exception):
    """Base of every error whose message is written for the user; the command line prints it without a traceback."""

    exit_status = 1
    """Of the command line."""


class ConfigError(GrunError):
    """An option, a name or a profile is unknown, missing or contradictory."""

    exit_status = 2


class DataError(GrunError):
    """A data set is missing, malformed or inconsistent."""


class ModelError(GrunError):
    """A model or tokenizer cannot be used as asked."""


class AdapterError(GrunError):
    """An adapter is damaged or does not fit the model it is put on."""


class RunError(GrunError):
    """An output folder belongs to another run, or training cannot go on."""


class HubError(GrunError):
    """The Hugging Face hub refuses what is sent, or cannot be reached."""


class TooLowError(RunError):
    """An evaluation found less than was asked for."""

    exit_status = 3


LISTED = 300
"""Characters up to which known names are listed where they stand somewhere else too."""


def unknown_name(kind: str, name: str, known: list[str], whole: str = "") -> str:
    """Message for a name that is not among `known`: the nearest ones if any is near, and the known ones.

    Args:
        kind: what it should be the name of.
        name: as it was given.
        known: what could be meant; a dotted name is near too where its last part is.
        whole: what lists them all, such as `--help`, named in place of a list that is too long for a line.
    """
    last = {one.rpartition(".")[2]: one for one in reversed(known)}
    near = difflib.get_close_matches(name, known, n=1)
    near = near or [last[part] for part in difflib.get_close_matches(name.rpartition(".")[2], [*last], n=1)]
    hint = f"did you mean {near[0]!r}? " if near else ""
    names = ", ".join(sorted(known)) or "none"
    if whole and len(names) > LISTED:
        return f"unknown {kind} {name!r}: {hint}{whole} lists all {len(known)}"
    return f"unknown {kind} {name!r}: {hint}known: {names}"
