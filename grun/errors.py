"""Errors meant for users: one line that says what was wrong, what was expected and what to do."""


class GrunError(Exception):
    """Base of every error whose message is written for the user; the command line prints it without a traceback."""


class ConfigError(GrunError):
    """An option, a name or a profile is unknown, missing or contradictory."""


class DataError(GrunError):
    """A data set is missing, malformed or inconsistent."""


class ModelError(GrunError):
    """A model or tokenizer cannot be used as asked."""


class AdapterError(GrunError):
    """An adapter is damaged or does not fit the model it is put on."""


class RunError(GrunError):
    """An output folder belongs to another run, or training cannot go on."""


class TooLowError(RunError):
    """An evaluation found less than was asked for; the command line's exit status is 3."""
