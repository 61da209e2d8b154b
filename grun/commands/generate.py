"""`python -m grun generate`: answer questions, and show how far the gates opened."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Iterator

from grun.config.options import GenerateConfig
from grun.config.values import describe
from grun.errors import DataError


def ask(config: GenerateConfig, questions: list[str]) -> None:
    """Print the answer to each of `questions`; without any, ask on the terminal until an empty line.

    With an adapter, the answer of the untouched base is printed too.
    """
    from grun.data import templates
    from grun.evaluation.generation import generate_answers
    from grun.evaluation.scoring import base_of
    from grun.loading.adapters import load_model

    loaded = load_model(config.model, config.adapter, strict=config.strict, gate_threshold=config.gate_threshold)
    model, tokenizer = loaded.model, loaded.tokenizer
    template = templates.in_force(config, loaded.template, tokenizer)
    pad_id = int(tokenizer.pad_token_id)
    for question in questions or _from_terminal():
        prompt = [templates.encode_prompt(template, tokenizer, question)]
        (answer,) = generate_answers(model, tokenizer, prompt, 1, config.max_new_tokens, pad_id)
        print(f"{question}\n  answer: {answer.text}")
        if answer.gates is not None:
            gates = "  ".join(f"block {block}: {gate:.3f}" for block, gate in sorted(answer.gates.items()))
            print(f"  gates:  {gates}")
            with model.disabled():
                (without,) = generate_answers(base_of(model), tokenizer, prompt, 1, config.max_new_tokens, pad_id)
            print(f"  without the adapter: {without.text}")


def _from_terminal() -> Iterator[str]:
    print("Ask a question; an empty line ends.", file=sys.stderr)
    lines: Iterable[str] = sys.stdin
    try:
        for line in lines:
            if not line.strip():
                return
            yield line.strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"what is asked is no text (byte {error.start} is not {error.encoding}); write UTF-8"
        ) from error


def without_questions(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options and flags of `generate`, and its questions; what follows `--` is a question whatever it looks like."""
    known = [key for key, _, _ in describe(GenerateConfig)]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    asked = [not _is_option(argument, known) for argument in arguments[:end]]
    options = [argument for argument, is_asked in zip(arguments, asked, strict=False) if not is_asked]
    return options, [q for q, is_asked in zip(arguments, asked, strict=False) if is_asked] + arguments[end + 1 :]


def _is_option(argument: str, known: list[str]) -> bool:
    """Whether an argument of `generate` is a flag, or an option that is known or misspelled, and not a question.

    A misspelled one is a name with dots, one that is close to a known name, or a word of three letters or more with a
    value without blanks: `what is x=3`, `x=3` and `2+2=?` are questions.
    """
    if re.match(r"--?[A-Za-z]", argument):
        return True
    key, equals, _ = argument.partition("=")
    if not equals or key in known:
        return bool(equals)
    named = re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key) is not None
    one_word = len(key) > 2 and not re.search(r"\s", argument)
    return named and ("." in key or one_word or bool(difflib.get_close_matches(key, known, n=1, cutoff=0.8)))
