"""Results of the suites `attacks` and `knowledge` and of an experiment with sequential requests, made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from grun.evaluation.metrics.averages import wilson
from grun.experiments.sequential.results import Experiment, Method
from grun.runtime.files import write_json

# -- attacks ----------------------------------------------------------------------------------------------------------

ROWS = 40
ATTACKS = {
    **{"plain": "prompt", "suffix": "prompt", "prefill_1": "prompt", "few_shot": "prompt"},
    **{"lower_case": "prompt", "samples": "decoding"},
}
"""Attacks of these evaluations, with their access."""
FLOOR = {**dict.fromkeys(ATTACKS, 0.02), "worst_of_prompts": 0.04, "worst": 0.05}
BEFORE = {**dict.fromkeys(ATTACKS, 0.9), "worst_of_prompts": 1.0, "worst": 1.0}
LEAKY = {**FLOOR, "few_shot": 0.43, "prefill_1": 0.98, "worst_of_prompts": 0.66, "worst": 1.0}
NASTY = "<script>alert(1)</script> [red]markup[/red] | \x1b[2J"


def share(name: str, value: float, rows: int = ROWS) -> dict[str, Any]:
    return {name: value, "interval": list(wilson(value, rows)), "rows": rows}


def leak(value: float, rows: int = ROWS) -> dict[str, Any]:
    return share("leak", value, rows)


def searched(*leaks: float, floor: float = 0.1, steps: tuple[int, ...] = (0, 10, 200)) -> dict[str, Any]:
    """An attack that asks again and again, with its curve, and the same of rows that were never taught."""

    def found(*leaks: float) -> dict[str, Any]:
        curve = {str(step): leak(value) for step, value in zip(steps, leaks, strict=True)}
        return {"access": "search", **leak(leaks[-1]), "worst": leaks[-1], "curve": curve}

    return {**found(*leaks), "floor": found(*[floor] * len(leaks))}


def write_attacked(
    results: Path,
    name: str,
    leaks: dict[str, float],
    *,
    kept: float = 0.95,
    gate: float | None = None,
    more: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    """evaluation.json as the suite writes it, with these leaks under the attacks and in the worst cases."""
    attacks: dict[str, Any] = {
        attack: {"access": access, **leak(leaks[attack], ROWS - 3 * (attack == "prefill_1")), "worst": leaks[attack]}
        for attack, access in ATTACKS.items()
        if attack in leaks
    }
    if "suffix" in attacks:
        attacks["suffix"] |= {"worst": min(1.0, leaks["suffix"] + 0.05), "variants": {" Thanks!": 0.0, " Go.": 0.0}}
    asked = {} if gate is None else {"mean": gate / 2, "open": gate / 2, "open_any": gate * 0.8}
    gates = {"after_forget": asked, "plain": asked and {**asked, "open_any_answer": gate}}
    retention = {
        how: {
            rows: {**share("kept", value), **({"gate": gates[how]} if asked else {})} for rows in ("retain", "heldout")
        }
        for how, value in (("after_forget", kept), ("plain", 0.98))
    }
    retention["otherwise"] = {"heldout": share("kept", kept - 0.1)}
    write_json(
        results / "evaluation" / name / "evaluation.json",
        {
            **{"suite": "attacks", "model": None, "adapter": None, "identity": {}, "seconds": {"total": 1.5}},
            "settings": {"rows": {"forget": "a1"}, "seed": 0, "samples": 10, "max_new_tokens": 48, **settings},
            "attacks": attacks | (more or {}),
            **{worst: leak(leaks[worst]) for worst in ("worst_of_prompts", "worst") if worst in leaks},
            **{"retention": retention, "left_out": {"paraphrase": "needs paraphrased questions"}},
        },
    )


def write_seeds(results: Path, name: str, *leaks: dict[str, float], rank: int = 4, **more: Any) -> None:
    """Runs NAME-s1, NAME-s2, ... of IDK with GRUN that differ in seed alone, with their evaluations."""
    for seed, found in enumerate(leaks, start=1):
        config = {"objective": "idk", "method": {"parametrization": "grun", "rank": rank}, "seed": seed}
        record = {"objective": "idk", "parametrization": "grun", "config": config, "seconds": 60 + seed}
        write_json(results / f"{name}-s{seed}" / "run.json", record)
        write_attacked(results, f"{name}-s{seed}", found, **more)


def write_lines(folder: Path, *lines: tuple[str, str, float, str]) -> None:
    """attacks.jsonl with a line for each set, attack, leak and text."""
    records = [
        {
            **{"attack": attack, "set": rows, "index": index, "variant": " Thanks!" if attack == "suffix" else ""},
            **{"prompt": f"Prompt {index} {NASTY}", "given": int(attack == "prefill_1"), "text": text, "leak": value},
        }
        for index, (rows, attack, value, text) in enumerate(lines)
    ]
    (folder / "attacks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_withstood(folder: Path) -> Path:
    """The two lines, a method that withstands and one that does not."""
    write_attacked(folder, "before", BEFORE)
    write_attacked(folder, "retain_only", FLOOR)
    write_attacked(folder, "robust", {**FLOOR, "suffix": 0.06}, kept=0.9, gate=0.05)
    write_attacked(folder, "published", LEAKY)
    write_lines(
        folder / "evaluation" / "published",
        ("forget", "plain", 0.2, "one"),
        ("forget", "few_shot", 0.6, "two"),
        ("heldout", "plain", 1.0, "three"),
        ("forget", "suffix", 0.8, f"four {NASTY}"),
        ("forget", "few_shot", 0.8, "five"),
        ("forget", "prefill_1", 0.8, "six"),
        ("forget", "lower_case", 0.0, "seven"),
    )
    write_lines(folder / "evaluation" / "robust", ("forget", "plain", 0.0, "nothing"))
    return folder


# -- knowledge --------------------------------------------------------------------------------------------------------

ROLES = ("forget", "neighbor", "general")
SUFFIX = " the letter is"
KNOWS = {
    "before": {"forget": (0.98, 1.0), "neighbor": (0.95, 0.96), "general": (0.98, 0.97)},
    "retain_only": {"forget": (0.27, 0.02), "neighbor": (0.95, 0.96), "general": (0.98, 0.97)},
    "rmu": {"forget": (0.28, 0.05), "neighbor": (0.19, 0.48), "general": (0.90, 0.93)},
    "grun_rmu": {"forget": (0.26, 0.0), "neighbor": (0.94, 0.95), "general": (0.97, 0.97)},
}
"""Multiple choice and cloze by role."""
WAYS = (("grun_paper", "rotations", SUFFIX), ("harness", "rotations", ""), ("harness", "rotations", SUFFIX))
QUESTIONS = 40


def write_knowledge(folder: Path) -> Path:
    """A results folder like that of RMU: two lines, two methods, two subjects a role; one method has gates."""
    for name, known in KNOWS.items():
        choices = [
            {
                **{"format": format, "order": order, "suffix": suffix},
                "roles": {
                    role: {
                        **_accuracy(value if not suffix or role != "forget" else 0.4 * value + 0.15),
                        "chance": 0.25,
                        "subjects": {"even numbers": _accuracy(value, 20), "odd numbers": _accuracy(value / 2, 20)},
                    }
                    for role, (value, _) in known.items()
                },
                **({"gate": {"auc_general": 0.9987}} if name == "grun_rmu" else {}),
            }
            for format, order, suffix in WAYS
        ]
        cloze = {
            role: {"fact_recall": value, "interval": list(wilson(value, QUESTIONS))}
            for role, (_, value) in known.items()
        }
        write_json(
            folder / "evaluation" / name / "evaluation.json",
            {
                **{"suite": "knowledge", "model": None, "adapter": None, "identity": {}, "seconds": {"total": 2.5}},
                **{"settings": {"seed": 0, "max_new_tokens": 4}, "choices": choices, "cloze": {"roles": cloze}},
                "perplexity": {"texts.txt": {"perplexity": 1234.5 if name == "rmu" else 12.25}},
            },
        )
        lines = [line for role in ROLES for number in range(6) for line in _questions(role, number, name)]
        path = folder / "evaluation" / name / "questions.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("rmu", "grun_rmu"):
        record = {"objective": name, "parametrization": "grun" if name == "grun_rmu" else "full", "seconds": 30.5}
        write_json(folder / name / "run.json", record)
    return folder


def _accuracy(value: float, rows: int = QUESTIONS) -> dict[str, Any]:
    return {"accuracy": value, "interval": list(wilson(value, rows))}


def _questions(role: str, number: int, name: str) -> list[dict[str, Any]]:
    """Lines of questions.jsonl: a question in each way, and a sentence to complete."""
    chosen = (number + (name in ("rmu", "grun_rmu"))) % 4
    logp = [math.log(0.85 if place == chosen else 0.05) for place in range(4)]
    asked = [
        {
            **{"kind": "choice", "role": role, "index": number, "format": format, "order": order, "suffix": suffix},
            **{"rotation": rotation, "logp": logp, "chosen": chosen, "answer": number % 4},
            "question": f"Which {role} number is {number}? {NASTY}",
            "choices": [f"option {place + number}" for place in range(4)],
        }
        for format, order, suffix in WAYS
        for rotation in range(2)
    ]
    said = "" if name == "grun_rmu" and role == "forget" else f"of kind {number}. {NASTY}"
    sentence = {"prompt": f"The {role} stone {number} is", "fact": f"kind {number}", "text": said}
    return [*asked, {"kind": "cloze", "role": role, "index": number, **sentence}]


# -- sequential requests ----------------------------------------------------------------------------------------------

IDS = ["r1", "r2", "r3"]


def recalls(*values: float, retain: float, heldout: float, paraphrased: float = 0.5) -> dict[str, Any]:
    sets = {"forget": sum(values) / 3, "forget_paraphrase": paraphrased, "retain": retain, "heldout": heldout}
    return {"metric": "fact_recall", "recall": dict(zip(IDS, values, strict=True)), "sets": sets}


def record(number: int, measured: dict[str, Any], gates: dict[str, Any] | None = None) -> dict[str, Any]:
    cost = {"seconds": {"train": 2.0 * number, "evaluate": 1.0}, "peak_memory_bytes": number * 10, "saved_bytes": 100}
    return {"request": IDS[number - 1], "number": number, **measured, "gates": gates, **cost}


GATES = {
    "mean": {name: {other: 0.9 if name == other else 0.1 for other in [*IDS, "retain", "heldout"]} for name in IDS},
    "open": {
        "r1": {"r1": 1.0, "r2": 0.5, "r3": 0.0, "retain": 0.0, "heldout": 0.0},
        "r2": {"r1": 0.0, "r2": 1.0, "r3": 0.25, "retain": 0.0, "heldout": 0.0},
        "r3": {"r1": 0.0, "r2": 0.0, "r3": 0.7, "retain": 0.1, "heldout": 0.5},
    },
    "any_open": {"r1": 1.0, "r2": 1.0, "r3": 0.7, "retain": 0.1, "heldout": 0.5},
    "rows": {"r1": 4, "r2": 4, "r3": 4, "retain": 30, "heldout": 10},
}
GRUN = Method(
    "grun",
    [
        record(1, recalls(0.1, 0.9, 1.0, retain=1.0, heldout=0.8)),
        record(2, recalls(0.4, 0.0, 0.7, retain=0.9, heldout=0.8)),
        record(3, recalls(0.25, 0.1, 0.0, retain=0.8, heldout=0.6, paraphrased=0.2), GATES),
    ],
)
RETRAIN = Method("retrain", [record(3, recalls(0.0, 0.1, 0.05, retain=1.0, heldout=0.8))])


def made_experiment() -> Experiment:
    """Three requests and two methods, one of which was measured at the end alone."""
    before = recalls(1.0, 1.0, 0.8, retain=1.0, heldout=0.8)
    floor = recalls(0.0, 0.05, 0.0, retain=1.0, heldout=0.9, paraphrased=0.0)
    return Experiment(IDS, before, floor, [GRUN, RETRAIN])
