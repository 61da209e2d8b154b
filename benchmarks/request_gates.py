"""How often rows that nobody asked to forget open a gate, as gates multiply.

    python -m grun finetune profile=demo output_dir=MODEL
    python benchmarks/request_gates.py --model MODEL

MODEL is taught about the demo's people. All states are those of its last prompt tokens behind one block. A request is
one person; its gate is linear, fitted by logistic regression: the person's questions against those of other people.

    trained     a gate for each of the people that the model knows and that are not set aside
    synthetic   a gate for somebody made up: the real states of a person's questions, moved together to another mean,
                which is drawn with the covariance that the means of people have

Never used in a fit, and asked in two wordings each: people set aside whom the model knows (`taught`), and people it was
never taught about (`unknown`). Counted is how many of their rows open any of n gates. The bias of a gate may be lowered
until at most so many retain rows open it; these are the known people's second wordings and rows about further unknown
people. `own` is the share of the requests' second wordings that their gates find.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, not installed

from grun.config.options import DataConfig, DemoConfig, ModelConfig
from grun.data.corpus import load_corpus
from grun.data.encoding import collate_prompts, encode_rows
from grun.data.rows import Row
from grun.loading.models import load_base
from pyvene_custom import find_blocks

ASIDE = 20
"""Retain people whose rows are set aside, beside the demo's held-out people."""
UNKNOWN = 250
"""Unknown people; half of them are for calibration."""
BOUNDS = {"as fitted": None, "0.1 %": 0.001, "0 %": 0.0}
"""Share of retain rows that may open a gate; None: the bias stays."""
THRESHOLDS = (0.5, 0.9, 0.99)
SUBSETS = 10
"""Random subsets that a figure of fewer than all gates is averaged over."""


class Requests(NamedTuple):
    """What gates are fitted to and tested on."""

    states: Tensor
    """To open for, [requests, rows, hidden size]."""
    own: Tensor
    """Further states to open for, which the fit does not see, [requests, rows, hidden size]."""
    person: Tensor
    """Place of the known person that each is, or was made from; this person's rows are not kept shut, [requests]."""


class People:
    """States of rows by group, in the order of people: [people, rows of a person, hidden size]."""

    def __init__(self, folder: Path, block: int) -> None:
        config = json.loads((folder / "run.json").read_text())["config"]["data"]
        if (config["name"], config["subset"], config["demo"]["naming"]) != ("demo", "all", "names"):
            raise SystemExit(f"{folder} must be taught about all of the demo's people, by name (finetune profile=demo)")
        demo = DemoConfig(**config["demo"] | {"unknown": UNKNOWN})
        corpus = load_corpus(DataConfig(demo=demo))
        base, tokenizer, template = load_base(ModelConfig(path=str(folder)))
        if template is None:
            raise SystemExit(f"{folder} has no template; teach it with `python -m grun finetune`")
        self._asked = base, tokenizer, template, block
        count = demo.questions
        known = corpus.forget + corpus.retain
        first, second = self._both(known, count)
        self.fitted, self.reworded = first[:-ASIDE], second[:-ASIDE]
        aside = self._both(corpus.heldout, count)
        self.taught = torch.cat([first[-ASIDE:], second[-ASIDE:], *aside]).flatten(0, 1)
        unknown = torch.cat(self._both(corpus.unknown, count), dim=1)
        self.unknown = unknown[: UNKNOWN // 2].flatten(0, 1)
        self.further = unknown[UNKNOWN // 2 :].flatten(0, 1)

    def _both(self, rows: Sequence[Row], count: int) -> tuple[Tensor, Tensor]:
        """States of both wordings."""
        wordings = list(rows), [row.paraphrase or row for row in rows]
        first, second = (self._states(wording).unflatten(0, (-1, count)) for wording in wordings)
        return first, second

    def _states(self, rows: Sequence[Row]) -> Tensor:
        """[rows, hidden size]."""
        base, tokenizer, template, block = self._asked
        _, blocks = find_blocks(base)
        found: list[Tensor] = []

        def keep(_: Any, __: Any, output: Any) -> None:
            found.append((output[0] if isinstance(output, tuple) else output)[:, -1])

        handle = blocks[block].register_forward_hook(keep)
        encoded = encode_rows(rows, tokenizer, template, None, False)
        for start in range(0, len(rows), 64):
            batch = collate_prompts(encoded[start : start + 64], tokenizer.pad_token_id or 0)
            base(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        handle.remove()
        return torch.cat(found).float()


def trained(people: People) -> Requests:
    """A request for each known person."""
    return Requests(people.fitted, people.reworded, torch.arange(len(people.fitted)))


def synthetic(people: People, count: int) -> Requests:
    """Requests of people who are made up: real rows, moved to a mean that is drawn as means of people lie."""
    random = torch.Generator().manual_seed(0)
    persons, rows, hidden = people.fitted.shape
    means = people.fitted.mean(1)
    within = (people.fitted - means.unsqueeze(1)).flatten(0, 1)
    # A mean of few rows varies by what rows do, too; that part is taken off.
    between = means.T.cov() - within.T @ within / (persons * (rows - 1)) / rows
    values, vectors = torch.linalg.eigh(between)
    root = vectors * values.clamp(min=0).sqrt()  # [hidden, hidden]; root @ root.T is the covariance
    person = torch.randint(persons, (count,), generator=random)
    drawn = means.mean(0) + torch.randn(count, hidden, generator=random) @ root.T
    moved = (drawn - means[person]).unsqueeze(1)
    return Requests(people.fitted[person] + moved, people.reworded[person] + moved, person)


def fit(requests: Requests, people: People, decay: float) -> tuple[Tensor, Tensor]:
    """Weights [hidden size, requests] and biases [requests] of all gates at once, by logistic regression.

    A gate's own rows and all others count the same. `decay`: L2 penalty of the weights on normalized states.
    """
    rows = people.fitted.flatten(0, 1)
    mean, scale = rows.mean(0), rows.std(0)
    shut, opened = (rows - mean) / scale, (requests.states - mean) / scale
    others = not_of(people, requests.person)
    share = others / others.sum(0)
    weight = torch.zeros(rows.shape[1], len(opened), requires_grad=True)
    bias = torch.zeros(len(opened), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        wanted = softplus(-torch.einsum("nrd,dn->rn", opened, weight) - bias).mean(0)
        unwanted = (softplus(shut @ weight + bias) * share).sum(0)
        total = (wanted / 2 + unwanted / 2 + decay * weight.square().sum(0)).sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    raw = weight.detach() / scale.unsqueeze(1)
    return raw, bias.detach() - mean @ raw


def not_of(people: People, person: Tensor) -> Tensor:
    """Which of the known people's rows are another person's than `person` [requests]: bool, [rows, requests]."""
    persons, rows, _ = people.fitted.shape
    return torch.arange(persons).repeat_interleave(rows).unsqueeze(1) != person


def report(kind: str, requests: Requests, people: People, counts: Sequence[int], decay: float) -> list[dict[str, Any]]:
    """Print and return the shares of rows that open a gate, by threshold, calibration and number of gates."""
    weight, bias = fit(requests, people, decay)
    others = torch.cat([not_of(people, requests.person), torch.ones(len(people.further), len(bias), dtype=torch.bool)])
    retain = torch.cat([people.reworded.flatten(0, 1), people.further]) @ weight + bias
    retain = retain.masked_fill(~others, -torch.inf)
    own = torch.einsum("nrd,dn->nr", requests.own, weight) + bias.unsqueeze(1)
    sets = {"taught": people.taught @ weight + bias, "unknown": people.unknown @ weight + bias}
    order = torch.Generator().manual_seed(0)
    found = []
    for count in [count for count in counts if count <= len(bias)]:
        subsets = [
            torch.randperm(len(bias), generator=order)[:count] for _ in range(SUBSETS if count < len(bias) else 1)
        ]
        for threshold in THRESHOLDS:
            for bound, share in BOUNDS.items():
                cut = torch.full_like(bias, threshold).logit()
                if (
                    share is not None
                ):  # what opens a gate lies above the cut, so as many retain rows may as lie above it
                    cut = torch.maximum(cut, retain.topk(int(share * len(retain)) + 1, dim=0).values[-1])
                opened = {name: logits > cut for name, logits in sets.items()}
                shares = {
                    name: sum(float(values[:, chosen].any(1).float().mean()) for chosen in subsets) / len(subsets)
                    for name, values in opened.items()
                }
                shares["own"] = float((own > cut.unsqueeze(1)).float().mean())
                figures = "".join(f"  {name} {100 * value:5.1f} %" for name, value in shares.items())
                print(f"{kind:9} {count:5} gates  threshold {threshold:<5} retain rows {bound:9}{figures}")
                found.append({"kind": kind, "gates": count, "threshold": threshold, "retain": bound, **shares})
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that `finetune profile=demo` made")
    parser.add_argument("--block", type=int, default=5)
    parser.add_argument("--counts", default="1,10,100,1000", help="ascending, with commas between")
    parser.add_argument("--decay", type=float, default=1e-3, help="L2 penalty of a gate's weights")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts = [int(count) for count in arguments.counts.split(",")]
    people = People(arguments.model, arguments.block)
    print(f"{len(people.taught)} rows of known people set aside (taught), {len(people.unknown)} of unknown people; "
          f"calibration: {people.reworded.flatten(0, 1).shape[0] + len(people.further)} retain rows")  # fmt: skip
    rows = []
    for kind, requests in (("trained", trained(people)), ("synthetic", synthetic(people, max(counts)))):
        rows += report(kind, requests, people, counts, arguments.decay)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
