"""`python -m grun generate`: answer questions, with the gates beside the answers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from grun.config.options import GenerateConfig
from grun.errors import DataError


def ask(config: GenerateConfig, questions: list[str]) -> None:
    """Print the answer to each of `questions`; without any, ask on the terminal until an empty line.

    With an adapter, the answer of the untouched base is printed beside the edited one.
    """
    from grun.data import templates
    from grun.evaluation.generation import base_of, generate_answers
    from grun.loading.models import load_model

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
