"""What a server answers to many clients at once, beside one at a time; every answer is compared with the same alone.

    python benchmarks/serving.py [--clients 64] [--requests 64] [--seconds 60]   a random Llama with a random adapter
    python benchmarks/serving.py --model smollm2 --adapter results/smollm2/npo   a real model, and what it forgot

Starts `python -m grun serve` in a process of its own. There are so many requests (prompt, length, half of them greedy,
half drawn with a seed). First all are asked one after another, by one client; then every client asks one of them, the
next, and so on. Printed as JSON: tokens a second and seconds an answer of both, and how many answers were others than
alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, not installed

PLACES = ("Japan", "Kenya", "Norway", "Peru", "Spain", "Egypt", "Chile", "Nepal")
ASKED = (
    *("What is the capital of {}?", "Tell me about the food of {}.", "Which languages are spoken in {}?"),
    *("Write two sentences about {}.", "What is {} known for?", "Which rivers are in {}?"),
    *("How large is {}, and how many people live there?", "Name a city in {} and say why one should go there."),
)


class Answered(NamedTuple):
    number: int
    """Of the request."""
    text: str
    tokens: int
    seconds: float


def random_model(folder: Path) -> tuple[Path, Path]:
    """Folders of a random Llama (hidden 256, 8 blocks) and of a random adapter of the pooled design."""
    import torch

    from grun.config.options import DataConfig, DemoConfig, TinyConfig
    from grun.data.corpus import load_corpus
    from grun.data.templates import TEMPLATES, store
    from grun.loading.tiny import build_tiny
    from grun.method.model import GrunModel

    rows = load_corpus(DataConfig(demo=DemoConfig())).taught(without_forget=False)
    size = TinyConfig(hidden_size=256, blocks=8, heads=4, intermediate_size=704)
    model, tokenizer = build_tiny(size, [f"{row.prompt} {row.completion}" for row in rows], 0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    store(TEMPLATES.get("tiny"), folder / "model")
    torch.manual_seed(0)
    design: dict[str, Any] = {
        "blocks": [5, 6, 7],
        "gate_blocks": [1, 2],
        "gate_pool": "windows",
        "edit_write": "sticky",
    }
    GrunModel.wrap(model, **design, template=TEMPLATES.get("tiny")).save_pretrained(folder / "adapter")
    return folder / "model", folder / "adapter"


def requests(model: str, count: int) -> list[dict[str, Any]]:
    """Requests that differ."""
    found = []
    for number in range(count):
        question = ASKED[number // len(PLACES) % len(ASKED)].format(PLACES[number % len(PLACES)])
        drawn = {"temperature": 0.8, "top_p": 0.95, "seed": number} if number % 2 else {"temperature": 0}
        messages = [{"role": "user", "content": question}]
        found.append({"model": model, "messages": messages, "max_tokens": 16 + number * 7 % 33, **drawn})
    return found


async def answered(client: httpx2.AsyncClient, number: int, body: dict[str, Any]) -> Answered:
    started = time.perf_counter()
    response = await client.post("v1/chat/completions", json=body)
    response.raise_for_status()
    found = response.json()
    text = found["choices"][0]["message"]["content"]
    return Answered(number, text, found["usage"]["completion_tokens"], time.perf_counter() - started)


async def measure(url: str, clients: int, count: int, seconds: float) -> dict[str, Any]:
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        name = (await client.get("v1/models")).json()["data"][0]["id"]
        asked = requests(name, count)
        await answered(client, 0, asked[0])  # the first answer of a process is slower
        started = time.perf_counter()
        alone = [await answered(client, number, body) for number, body in enumerate(asked)]
        spent_alone = time.perf_counter() - started

        async def again(number: int) -> list[Answered]:
            found: list[Answered] = []
            while time.perf_counter() < until:
                place = (number + len(found)) % count
                found.append(await answered(client, place, asked[place]))
            return found

        started = time.perf_counter()
        until = started + seconds
        together = [one for found in await asyncio.gather(*map(again, range(clients))) for one in found]
        spent = time.perf_counter() - started
    one, many = summary(alone, spent_alone), summary(together, spent)
    others = [found.number for found in together if found.text != alone[found.number].text]
    return {
        "one at a time": one,
        f"{clients} clients": many,
        "times as many tokens a second": round(many["tokens a second"] / one["tokens a second"], 2),
        "answers that are others than alone": len(others),
        "their requests": sorted(set(others)),
    }


def summary(found: list[Answered], seconds: float) -> dict[str, Any]:
    took = sorted(one.seconds for one in found)
    tokens = sum(one.tokens for one in found)
    return {
        "answers": len(found),
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens a second": round(tokens / seconds, 2),
        "median seconds an answer": round(statistics.median(took), 3),
        "95 % of answers within seconds": round(took[int(0.95 * (len(took) - 1))], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="model.path; default: a random Llama")
    parser.add_argument("--adapter")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            model, adapter = map(str, random_model(Path(folder)))
        else:
            model, adapter = options.model, options.adapter
        command = [sys.executable, "-m", "grun", "serve", f"model.path={model}", f"adapter={adapter}", "port=0"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "GRUN_OWNER_KEY": "benchmark"}
        with open(os.devnull, "w") as nothing:
            server = subprocess.Popen(
                [*command, f"batch_size={options.clients}"], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                stderr=nothing, text=True,
            )  # fmt: skip
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            found = measure(line.split()[1], options.clients, options.requests, options.seconds)
            print(json.dumps(asyncio.run(found), indent=2))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
