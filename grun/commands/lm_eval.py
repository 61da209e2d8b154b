"""`python -m grun lm_eval`: lm-evaluation-harness's own command line, which then knows the model `grun`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from grun.errors import GrunError, RunError
from grun.evaluation.suites.lm_harness import MODEL_ARGUMENTS, check_installed
from grun.runtime.reading import in_one_line

MODEL = "grun.evaluation.suites.lm_harness_registered"
"""Module whose import registers the model."""


def usage() -> str:
    """Lines of the help: a command, and the arguments of the model."""
    known = {name: option for name, option in MODEL_ARGUMENTS.items() if name != option}
    lines = ["python -m grun lm_eval --model grun --model_args pretrained=MODEL,adapter=ADAPTER --tasks mmlu"]
    lines += [
        "",
        "All arguments are lm-evaluation-harness's (lm_eval run --help) and are handed to it as they are.",
        "",
    ]
    lines += ["model_args of grun, and the option of `evaluate` that each stands for where it has another name:"]
    lines += [f"  {name}" + (f" ({known[name]})" if name in known else "") for name in MODEL_ARGUMENTS]
    return "\n".join(lines)


def run_harness(arguments: Sequence[str]) -> None:
    """Run the harness' command line on `arguments`, as if it had been called with them.

    Raises:
        ConfigError: the harness is not installed, or an argument of the model is wrong.
        RunError: the harness refuses something: a task, a model, a file.
        SystemExit: arguments that the harness does not know.
    """
    check_installed("lm_eval")
    from lm_eval.__main__ import cli_evaluate

    import_module(MODEL)
    before = sys.argv
    sys.argv = ["lm_eval", *arguments]  # which the harness reads
    try:
        cli_evaluate()
    except GrunError:
        raise
    except (ValueError, KeyError, ImportError, FileNotFoundError) as error:
        raise RunError(f"lm_eval: {in_one_line(error)}") from error
    finally:
        sys.argv = before
