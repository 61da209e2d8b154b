"""What an adapter costs while answers are generated: GrunModel.generate against generate of the bare model.

    python benchmarks/generation.py [--design every_token] [--gate mlp_3] [--hidden 512] [--threads 1] [--pairs 10]
    python benchmarks/generation.py --design pooled [--gates shut]

Both models have the same random weights and are asked the same prompts, one after the other in turns, so that whatever
else the machine does falls on both. Printed: seconds of each turn, and the median of the ratios of the pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, not installed

from grun.method.model import GrunModel

BLOCKS = 16
DESIGNS: dict[str, dict[str, Any]] = {
    "last_prompt": {"blocks": [10, 12, 15]},
    "every_token": {
        "blocks": [10, 12, 15], "gate_read": "every_token", "gate_accumulate": "running_max",
        "edit_write": "every_token",
    },
    "pooled": {"blocks": [12, 13, 14, 15], "gate_blocks": [1, 2], "gate_pool": "windows", "edit_write": "sticky"},
}  # fmt: skip
"""Where gates read and edits write: the published design, the robust one, and that of one gate for all edits."""
BIAS = {"open": 100.0, "shut": -100.0}
"""Of gates that are to be so whatever they read; edits are skipped below a probability of 0.5."""
ROWS, PROMPT, NEW = 16, 39, 64


def model(hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def seconds(asked: Any, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    with torch.no_grad():
        out = asked.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    spent = time.perf_counter() - started
    if out.shape != (ROWS, PROMPT + NEW):
        raise SystemExit(f"expected {ROWS} rows of {PROMPT + NEW} tokens, got {tuple(out.shape)}")
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--design", choices=sorted(DESIGNS), default="last_prompt")
    parser.add_argument("--gate", default="linear")
    parser.add_argument(
        "--gates", choices=sorted(BIAS), help="all of them, with a threshold; else neither, without one"
    )
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    design = {**DESIGNS[arguments.design], "gate_bias": BIAS.get(arguments.gates or "")}
    bare = model(arguments.hidden)
    edited = GrunModel.wrap(model(arguments.hidden), rank=4, gate=arguments.gate, **design).eval()
    if arguments.gates:
        edited.gate_threshold = 0.5
    ids = torch.randint(1, 4096, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    for asked in (bare, edited):
        seconds(asked, ids)  # the first call is slower
    print("      bare  with adapter   ratio")
    ratios = []
    for number in range(arguments.pairs):
        turns = [(bare, "bare"), (edited, "edited")][:: 1 if number % 2 == 0 else -1]
        spent = {name: seconds(asked, ids) for asked, name in turns}
        ratios.append(spent["edited"] / spent["bare"])
        print(f"{spent['bare']:8.2f} s {spent['edited']:11.2f} s {ratios[-1]:7.3f}")
    print(f"median ratio {statistics.median(ratios):.3f} ({ROWS} rows, {PROMPT} + {NEW} tokens)")
    if arguments.json:
        row = {
            "name": f"generation, {arguments.design}, {arguments.gate} gate / bare, hidden {arguments.hidden}",
            "ratio": round(statistics.median(ratios), 4),
            "ratios": ratios,
        }
        arguments.json.write_text(json.dumps([row], indent=2) + "\n")


if __name__ == "__main__":
    main()
