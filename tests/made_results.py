"""Results folders made by hand: evaluations and runs whose numbers are known, without a model."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grun.evaluation.measure import measure
from grun.evaluation.table import GateRecord, GenerationRecord, ScoreRecord, Table
from grun.runtime.files import write_json

KNOWN = {
    "before": {"forget": 1.0, "forget_paraphrase": 0.9, "retain": 1.0, "heldout": 1.0, "unknown": 0.0},
    "retain_only": {"forget": 0.0, "forget_paraphrase": 0.0, "retain": 1.0, "heldout": 1.0, "unknown": 0.0},
    "gd": {"forget": 0.0, "forget_paraphrase": 0.05, "retain": 1.0, "heldout": 0.95, "unknown": 0.0},
    "idk": {"forget": 0.0, "forget_paraphrase": 0.0, "retain": 0.975, "heldout": 0.95, "unknown": 0.0},
    "npo": {"forget": 0.3, "forget_paraphrase": 0.4, "retain": 1.0, "heldout": 1.0, "unknown": 0.0},
}
"""Share of rows each model answers rightly."""
TOFU_SETS = ("forget", "retain", "real_authors", "world_facts", "heldout", "unknown")
WRONG_ANSWERS = {"forget": 5, "retain": 5, "real_authors": 3, "world_facts": 3}


def write_evaluation(
    folder: Path,
    shares: dict[str, float],
    *,
    rows: int = 40,
    facts: bool = True,
    gated: bool = False,
    wrong_answers: bool = False,
    text: Callable[[str], str] = lambda text: text,
    **more: Any,
) -> None:
    """An evaluation that answers a share of each set's rows rightly; `more` goes into evaluation.json.

    With `wrong_answers` the sets have the paraphrased and wrong answers that TOFU's have.
    """
    draw = random.Random(folder.name)
    table = Table()
    for name, share in shares.items():
        for index in range(rows):
            right = index >= rows * (1 - share)
            fact = f"town{index}" if facts else None
            said = f"Ada was born in town{index}." if right else "[b]Nobody[/b] can tell you that, I am afraid."
            question = f"Where was person {index} of the {name} set, the [red]one[/red] with the long name, born?"
            reference = f"Ada was born in town{index}."
            table.generations.append(GenerationRecord(name, index, question, reference, fact, text(said)))
            table.scores.append(_score(name, index, "answer", 0, 0.1 if right else 3.0))
            if wrong_answers and name in WRONG_ANSWERS:
                if name in ("forget", "retain"):
                    table.scores.append(_score(name, index, "paraphrase", 0, 0.5 if right else 2 + draw.random()))
                for variant in range(WRONG_ANSWERS[name]):
                    table.scores.append(_score(name, index, "perturbed", variant, 2 + draw.random()))
            if gated:
                gate = draw.betavariate(12, 1) if name.startswith("forget") else draw.betavariate(1, 12)
                table.gates.append(GateRecord(name, index, {5: gate, 6: gate**2}))
    folder.mkdir(parents=True)
    table.write(folder)
    write_json(folder / "evaluation.json", {"model": None, "seconds": {"total": 1.5}, **measure(table), **more})


def _score(name: str, index: int, kind: str, variant: int, loss: float) -> ScoreRecord:
    right = loss < 1
    return ScoreRecord(
        *(name, index, kind, variant, 9, 5, True, 20, [-loss] * 5, [right] * 5, [-1.0] * 5, [1.0] * 5),
    )


def write_run(folder: Path, objective: str, parametrization: str = "grun", **more: Any) -> None:
    """run.json (with `more`) and log.jsonl of an unlearning run."""
    record = {"objective": objective, "parametrization": parametrization, "seconds": 61.25}
    write_json(folder / "run.json", {**record, **more})
    draw = random.Random(objective)
    lines: list[dict[str, Any]] = []
    for step in range(1, 121):
        curves = {"gd": -2 - step / 20, "npo": 13.8 * math.exp(-step / 40)}
        forget = curves.get(objective, 3 * math.exp(-step / 25))
        lines.append(
            {
                "step": step,
                "epoch": step / 3,
                "loss": 0.0,
                "forget": forget + draw.gauss(0, 0.1),
                "retain": 0.1 + math.exp(-step / 10) + draw.gauss(0, 0.02),
                "gate": 1.4 * math.exp(-step / 15) + draw.gauss(0, 0.02),
            }
        )
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_demo(folder: Path) -> Path:
    """A results folder like the demo's: facts, gates, three runs."""
    for name, shares in KNOWN.items():
        write_evaluation(folder / "evaluation" / name, shares, gated=name in ("gd", "idk", "npo"))
    for objective in ("gd", "idk", "npo"):
        write_run(folder / objective, objective)
    return folder


def write_tofu(folder: Path, **more: Any) -> Path:
    """A results folder like TOFU's: no facts, all of its metrics, a GRUN run and a plain one (full)."""
    everything = dict.fromkeys(TOFU_SETS, 1.0) | {"unknown": 0.0}
    shares = {
        "before": everything,
        "retain_only": {**everything, "forget": 0.0},
        "gd": {**everything, "forget": 0.25, "retain": 0.75},
        "npo_full": {**everything, "forget": 0.5, "retain": 0.0},
    }
    bases = {"before": "b1", "retain_only": "b2", "gd": "b1", "npo_full": "b3"}
    for name, known in shares.items():
        write_evaluation(
            folder / "evaluation" / name,
            known,
            **{
                "rows": 12,
                "facts": False,
                "gated": name == "gd",
                "wrong_answers": True,
                "key": f"key of {name}",
                "adapter": "somewhere/gd" if name == "gd" else None,
                "identity": {"base": bases[name], "dtype": "float32", "adapter": None, "version": "0.1.0"},
                "data": {"forget": "hash of forget05"},
                **more,
            },
        )
    write_run(folder / "gd", "gd", base_fingerprint="b1")
    write_run(folder / "npo_full", "npo", "full", base_fingerprint="b1")
    return folder


# -- the matrix -------------------------------------------------------------------------------------------------------

TRAINED = {"full": 1_000_000, "lora": 20_000, "reft": 3_000, "grun": 4_000}
"""Parameters that each parametrization trains."""
LEFT = {"full": 0.0, "lora": 0.05, "reft": 0.4, "grun": 0.0}
"""Share of the forget rows that it still answers rightly."""
HELDOUT = {"full": 0.7, "lora": 0.8, "reft": 0.975, "grun": 0.95}


def write_matrix(
    folder: Path,
    *,
    objectives: Sequence[str] = ("gd", "npo"),
    parametrizations: Sequence[str] = ("full", "lora", "reft", "grun"),
    seeds: Sequence[int] = (42, 43, 44),
    facts: bool = True,
    rows: int = 40,
    heldout: Mapping[str, float] | None = None,
    left_out: Sequence[str] = (),
) -> Path:
    """A results folder as a sweep fills it, with cells such as gd-lora-s42, without those `left_out`.

    Seeds move the share of held-out rows that is answered rightly by one row around `heldout` of the parametrization.
    """
    sets = ("forget", "forget_paraphrase", "retain", "heldout") if facts else TOFU_SETS
    shares = {"forget": 1.0, "forget_paraphrase": 0.9, "retain": 1.0, "heldout": 1.0}
    everything = {name: shares.get(name, 1.0) for name in sets}
    more: dict[str, Any] = {"rows": rows, "facts": facts, "wrong_answers": not facts}
    target = {**everything, "forget": 0.0}
    write_evaluation(folder / "evaluation" / "before", everything, identity={"base": "b1"}, **more)
    write_evaluation(folder / "evaluation" / "retain_only", target, identity={"base": "b2"}, **more)
    for objective in objectives:
        for kind in parametrizations:
            for number, seed in enumerate(seeds):
                name = f"{objective}-{kind}-s{seed}"
                if name in left_out:
                    continue
                kept = min(1.0, {**HELDOUT, **(heldout or {})}[kind] + (number - 1) / rows)
                write_evaluation(
                    folder / "evaluation" / name,
                    {**everything, "forget": LEFT[kind], "heldout": kept},
                    gated=kind == "grun",
                    identity={"base": "b1" if kind != "full" else name},
                    **more,
                )
                write_cell(folder / name, objective, kind, seed)
    return folder


def write_cell(folder: Path, objective: str, parametrization: str, seed: int, **config: Any) -> None:
    """The run of one cell and seed; `config` are more of its options."""
    trained = TRAINED[parametrization]
    write_run(
        folder,
        objective,
        parametrization,
        config={"objective": objective, "method": {"parametrization": parametrization}, "seed": seed, **config},
        parameters={"trained": trained, "base": 1_000_000},
        seconds=60.0 + seed + len(parametrization) + len(objective),
        peak_memory_bytes=2**30 + 2**20 * seed,
        saved_bytes=4 * trained,
        base_fingerprint="b1",
    )
