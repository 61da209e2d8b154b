"""Scoring and generation of an evaluation against a naive evaluator, on TOFU's text and a random model.

    GRUN_TOFU_DIR=folder python benchmarks/evaluation.py [--rows 16 | --full] [--threads 1] [--json FILE]

The model is a Llama with random weights (16 blocks, hidden size 512, 8 heads, intermediate size 1408), its tokenizer of
at most 4096 words trained on TOFU; the adapter is random, at blocks 10, 12 and 15. Rows are those of forget10, retain,
real_authors and world_facts with their paraphrased and wrong answers, `--rows` of each set.

The naive evaluator makes one pass for each input of a metric, as a suite does that computes its metrics one by one: in
file order, 32 rows at a time, padded to the longest, a log-softmax over the whole vocabulary at every position, and all
of it once for the base and once with the adapter. The answers of forget are scored three times, for probability,
extraction strength and membership inference. That is the default suite of open-unlearning on forget10, which scores
7,668 rows where 6,868 are distinct (800 are forget answers scored again; 400 are of a holdout set, left out here as it
is no set of TOFU's four). Ours scores the distinct rows of base and adapter together; "one by one" is two evaluations
of their own. Compared are the metrics of docs/metrics.md.

Generation: a random model never ends, so an answer ends where the true answer has its last token. The naive evaluator
asks transformers' `generate` in file order, 32 at a time, with a stopping rule by row; ours gets the same lengths as
`rooms`. `evaluate` asks for answers together whose references are about as long; here that is exactly where they end,
as in a model that knows them. "Lengths not expected" goes by the prompts' lengths instead. Tokens are compared, and
those that differ are counted: rounding depends on the batch, and a random model's best two words can be close.

Everything is measured in turns in one process; printed are medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, not installed

from grun.data.encoding import EncodedRow, collate, collate_prompts
from grun.data.tokenizer import train_tokenizer
from grun.evaluation.evaluate import measure
from grun.evaluation.generation import greedy
from grun.evaluation.scoring import ScoredRow
from grun.evaluation.shared_scoring import Subject, score_together
from grun.evaluation.table import ScoreRecord, Table
from grun.method.model import GrunModel

FILES = {
    "forget": "forget10_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
BLOCKS, EDITED, BATCH = 16, (10, 12, 15), 32
FORGET_ANSWER_PASSES = 3
ADAPTERS = 10

Place = tuple[str, int, str, int]
"""Set, number of the row, kind and number of the continuation."""


def read(rows: int | None) -> dict[str, list[dict[str, Any]]]:
    """Records of each set; the first `rows` of questions that are spread over the file."""
    folder = os.environ.get("GRUN_TOFU_DIR")
    if not folder:
        raise SystemExit("set GRUN_TOFU_DIR to the folder of TOFU's files")
    sets = {}
    for name, file in FILES.items():
        text = (Path(folder) / f"{file}.json").read_text()
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
        records = records[0] if isinstance(records[0], list) else records
        step = 1 if rows is None else max(1, len(records) // rows)
        sets[name] = records[::step][:rows]
    return sets


def texts(record: dict[str, Any]) -> list[tuple[str, int, str]]:
    """Kind, number and text of the continuations of a record."""
    found = [("answer", 0, record["answer"])]
    if record.get("paraphrased_answer"):
        found.append(("paraphrase", 0, record["paraphrased_answer"]))
    wrong = record["perturbed_answer"]
    return found + [("perturbed", n, text) for n, text in enumerate(wrong if isinstance(wrong, list) else [wrong])]


def encode(sets: dict[str, list[dict[str, Any]]]) -> tuple[dict[Place, EncodedRow], Any]:
    """All continuations as tokens, in file order, by a tokenizer trained on them."""
    words = [
        text for records in sets.values() for r in records for text in (r["question"], *(t for _, _, t in texts(r)))
    ]
    tokenizer = train_tokenizer(words, 4096)
    end = tokenizer.eos_token_id
    rows = {}
    for name, records in sets.items():
        for index, record in enumerate(records):
            prompt = tokenizer(f"Question: {record['question']}\nAnswer:", add_special_tokens=False).input_ids
            for kind, number, text in texts(record):
                answer = tokenizer(f" {text}", add_special_tokens=False).input_ids
                rows[name, index, kind, number] = EncodedRow(tuple(prompt), (*answer, end))
    return rows, tokenizer


def build(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=512, intermediate_size=1408, num_hidden_layers=BLOCKS, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=1024, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapter(base: LlamaForCausalLM, seed: int) -> GrunModel:
    """A random adapter, taken off its base again."""
    torch.manual_seed(seed)
    model = GrunModel.wrap(base, blocks=EDITED, rank=4).eval()
    model.unwrap()
    return model


# -- scoring ----------------------------------------------------------------------------------------------------------


def naive_passes(places: Sequence[Place]) -> list[list[Place]]:
    """The rows of each pass, in file order."""
    passes: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        passes.setdefault((place[0], place[2]), []).append(place)
    again = [passes["forget", "answer"]] * (FORGET_ANSWER_PASSES - 1)
    return [*passes.values(), *again]


@torch.no_grad()
def naive(model: Any, rows: dict[Place, EncodedRow]) -> dict[Place, ScoredRow]:
    """Every pass in file order, full logits, log-softmax at all positions."""
    found = {}
    for places in naive_passes(list(rows)):
        for start in range(0, len(places), BATCH):
            some = places[start : start + BATCH]
            batch = collate([rows[place] for place in some], 0)
            more = {"prompt_lengths": batch.prompt_lengths} if isinstance(model, GrunModel) else {}
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more).logits
            logp = logits.float().log_softmax(-1)[:, :-1]
            at_label = logp.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
            for number, place in enumerate(some):
                answer = (batch.labels[number, 1:] != -100).nonzero()[:, 0]
                chosen, labels = at_label[number, answer], batch.labels[number, 1:][answer]
                hit = logp[number, answer].argmax(-1) == labels
                found[place] = ScoredRow(chosen.tolist(), hit.tolist(), [-1.0] * len(answer), [1.0] * len(answer), None)
    return found


def ours(subjects: Sequence[Subject], rows: dict[Place, EncodedRow]) -> list[dict[Place, ScoredRow]]:
    results = score_together(subjects, list(rows.values()), BATCH, 0)
    return [dict(zip(rows, of_one, strict=True)) for of_one in results]


def metrics(scored: dict[Place, ScoredRow]) -> dict[str, float]:
    """Every metric that needs scores alone; Min-K++ is left out, since the naive evaluator computes no variance."""
    table = Table(
        [
            ScoreRecord(
                *place, 1, len(row.logp), True, 99, row.logp, row.hit, [-1.0] * len(row.hit), [1.0] * len(row.hit)
            )
            for place, row in scored.items()
        ]
    )
    measured = measure(table)
    sets = {f"{name}.{metric}": value for name, found in measured["sets"].items() for metric, value in found.items()}
    return sets | measured["overall"]


def compare_scoring(base: LlamaForCausalLM, rows: dict[Place, EncodedRow], turns: int) -> list[dict[str, Any]]:
    model = adapter(base, 1)
    subjects = [Subject(base), Subject(model)]

    def naively() -> list[dict[Place, ScoredRow]]:
        with subjects[1].put_on() as edited:
            with_adapter = naive(edited, rows)
        return [naive(base, rows), with_adapter]

    ways: dict[str, Callable[[], list[dict[Place, ScoredRow]]]] = {
        "naive": naively,
        "together": lambda: ours(subjects, rows),
        "one by one": lambda: [*ours(subjects[:1], rows), *ours(subjects[1:], rows)],
    }
    spent, results = in_turns(ways, turns)
    for name in ("together", "one by one"):
        for one, other in zip(results["naive"], results[name], strict=True):
            worst = max(abs(value - metrics(other)[key]) for key, value in metrics(one).items())
            if worst > 1e-4:
                raise SystemExit(f"metrics differ by {worst:.2g} from the naive evaluator's ({name})")
            print(f"  metrics of {name}: largest difference {worst:.1e}")
    calls = sum(map(len, naive_passes(list(rows))))
    print(f"  rows scored for each model: naive {calls}, distinct {len(set(rows.values()))}")
    return [
        row("scoring base + adapter, together", spent["naive"], spent["together"]),
        row("scoring base + adapter, one by one", spent["naive"], spent["one by one"]),
    ]


def compare_adapters(base: LlamaForCausalLM, rows: dict[Place, EncodedRow], turns: int) -> list[dict[str, Any]]:
    subjects = [Subject(adapter(base, seed)) for seed in range(ADAPTERS)]
    spent, _ = in_turns({"ten": lambda: ours(subjects, rows), "one": lambda: ours(subjects[:1], rows)}, turns)
    return [row(f"scoring {ADAPTERS} adapters / one", spent["ten"], spent["one"])]


# -- generation -------------------------------------------------------------------------------------------------------


class AtLength(StoppingCriteria):
    """Ends each row at its own length."""

    eos_token_id = torch.tensor([0])  # by which `generate` sees that rows end one by one

    def __init__(self, rooms: Sequence[int], prompt: int) -> None:
        self.ends = torch.tensor(rooms) + prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        return input_ids.shape[1] >= self.ends


def compare_generation(base: LlamaForCausalLM, rows: dict[Place, EncodedRow], turns: int) -> list[dict[str, Any]]:
    asked = [(row.prompt_ids, len(row.answer_ids)) for place, row in rows.items() if place[2] == "answer"]
    orders = {
        "hinted": sorted(range(len(asked)), key=lambda number: asked[number][1], reverse=True),
        "unhinted": sorted(range(len(asked)), key=lambda number: len(asked[number][0]), reverse=True),
    }

    def naively() -> dict[int, list[int]]:
        found = {}
        for start in range(0, len(asked), BATCH):
            some = asked[start : start + BATCH]
            batch = collate_prompts([prompt for prompt, _ in some], 0)
            rooms = [room for _, room in some]
            width = batch.input_ids.shape[1]
            ids = base.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=max(rooms),
                do_sample=False, pad_token_id=0, stopping_criteria=[AtLength(rooms, width)],
            )  # fmt: skip
            for number, room in enumerate(rooms):
                found[start + number] = ids[number, width : width + room].tolist()
        return found

    def ours(order: Sequence[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        with torch.no_grad():
            for start in range(0, len(asked), BATCH):
                some = order[start : start + BATCH]
                batch = collate_prompts([asked[number][0] for number in some], 0)
                answers, _ = greedy(base, batch, [asked[number][1] for number in some], (), 0)
                found |= dict(zip(some, answers, strict=True))
        return found

    ways = {"naive": naively} | {name: lambda order=order: ours(order) for name, order in orders.items()}
    spent, results = in_turns(ways, turns)
    for name in orders:
        differing = sum(results["naive"][number] != results[name][number] for number in range(len(asked)))
        print(f"  answers, {name}: {len(asked)}, of which differ: {differing}")
        if differing > 0.02 * len(asked):
            raise SystemExit("more answers differ than rounding explains")
    return [
        row("generation", spent["naive"], spent["hinted"]),
        row("generation, lengths not expected", spent["naive"], spent["unhinted"]),
    ]


# -- measuring --------------------------------------------------------------------------------------------------------


def in_turns(ways: dict[str, Callable[[], Any]], turns: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each way in each turn, and what it gave last."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(turns):
        for name, way in ways.items():
            started = time.perf_counter()
            results[name] = way()
            spent[name].append(time.perf_counter() - started)
    return spent, results


def row(name: str, numerator: list[float], denominator: list[float]) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(numerator, denominator, strict=True)]
    line = {"name": name, "ratio": round(statistics.median(ratios), 3)}
    return line | {"seconds": [round(statistics.median(numerator), 2), round(statistics.median(denominator), 2)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="questions of each set (default 16)")
    parser.add_argument("--full", action="store_true", help="all questions, one turn")
    parser.add_argument("--what", default="scoring,adapters,generation", help="default: all three")
    parser.add_argument("--turns", type=int, default=2, help="how often each is measured (default 2)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, tokenizer = encode(read(None if arguments.full else arguments.rows))
    base = build(len(tokenizer))
    turns = 1 if arguments.full else arguments.turns
    print(f"{len(rows)} rows, {sum(map(len, rows.values()))} tokens, vocabulary {len(tokenizer)}")
    parts = {"scoring": compare_scoring, "adapters": compare_adapters, "generation": compare_generation}
    lines = [line for name in arguments.what.split(",") for line in parts[name](base, rows, turns)]
    for line in lines:
        print(f"{line['name']:36} {line['seconds'][0]:9.2f} s / {line['seconds'][1]:8.2f} s = {line['ratio']:6.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
