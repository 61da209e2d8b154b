"""Whether vLLM with GRUN's plugin answers as GrunModel and GrunStack do, and what the edits cost there.

Two steps, which may be run in two environments, since vLLM wants older packages than the tested ones:

    python scripts/check_vllm.py reference FOLDER --model MODEL_FOLDER     where GRUN and pyvene are
    python scripts/check_vllm.py compare FOLDER                            where vLLM and GRUN's plugin are
    python scripts/check_vllm.py reload FOLDER                             the same; a store read anew over HTTP
    python scripts/check_vllm.py cost FOLDER                               the same; what edits cost

The first writes random adapters of every kind of design and stores of them on the model, and the greedy tokens of six
prompts under each, one prompt at a time; the others compare with these, with prompts in chunks, prefix caching and
preemption, and while a store is read anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

NEW = 24
PUBLISHED = {"gate_read": "last_prompt", "gate_accumulate": "none", "edit_write": "last_prompt"}
EACH = {"gate_read": "every_token", "gate_accumulate": "none", "edit_write": "every_token"}
ROBUST = {**EACH, "gate_accumulate": "running_max", "gate": "noisy_mlp_3"}
STICKY = {**PUBLISHED, "edit_write": "sticky"}
DESIGNS: dict[str, dict[str, Any]] = {
    "published": {**PUBLISHED, "blocks": [10, 20]},
    "published2": {**PUBLISHED, "blocks": [11, 20]},
    "each": {**EACH, "blocks": [8, 9, 22]},
    "robust": {**ROBUST, "blocks": [12, 24]},
    "robust2": {**ROBUST, "blocks": [12, 24]},
    "sticky": {**STICKY, "gate": "noisy_mlp_3", "blocks": [10, 15]},
    "hard": {**ROBUST, "blocks": [12, 24], "gate_threshold": 0.6},
    "max_last": {**PUBLISHED, "blocks": [20], "gate_blocks": [2, 5], "gate_pool": "max"},
    "maxmin": {**STICKY, "blocks": [20, 26], "gate_blocks": [2, 5], "gate_pool": "maxmin", "gate_threshold": 0.5},
    "maxmin2": {**STICKY, "blocks": [20, 26], "gate_blocks": [2, 5], "gate_pool": "maxmin", "gate_threshold": 0.5},
    "mean_each": {**EACH, "blocks": [20, 26], "gate_blocks": [3], "gate_pool": "mean"},
    "last_sticky": {**STICKY, "blocks": [20], "gate_blocks": [3, 6], "gate_pool": "last"},
    "refuse": {
        **STICKY,
        "blocks": None,
        "gate_blocks": [2, 5],
        "gate_pool": "maxmin",
        "action": "refuse",
        "gate_threshold": 0.9,
    },
}
STORES = {
    "store_robust": (["robust", "robust2"], {}),
    "store_maxmin": (["maxmin", "maxmin2"], {}),
    "store_mixed": (["published", "each", "robust", "robust2", "sticky", "maxmin", "mean_each"], {}),
    "store_hard": (["robust", "sticky", "maxmin", "published2"], {"gate_threshold": 0.6}),
    "store_softmax": (["robust", "sticky", "maxmin"], {"rule": "softmax_gate"}),
}


# -- what transformers says -------------------------------------------------------------------------------------------


def reference(folder: Path, model_folder: str, dtype: str, names: list[str]) -> None:
    """Adapters, stores and reference.json."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grun import GrunModel, GrunStack
    from grun.data.rows import Row
    from grun.requests.store import RequestStore

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype)).eval()
    prompts = prompts_of(tokenizer)
    answers = {"base": answers_of(base, prompts)}
    for number, (name, options) in enumerate(DESIGNS.items()):
        if not (folder / name).exists():
            make_adapter(base, tokenizer, folder / name, options, number)
        if not names or name in names:
            model = GrunModel.from_pretrained(base, folder / name)
            answers[name] = answers_of(model, prompts)
            print(name, {block: f"{float(gates.max()):.3f}" for block, gates in model.last_gates.items()}, flush=True)
            model.unwrap()
    for name, (members, options) in STORES.items():
        if not (folder / name).exists():
            store = RequestStore.create(folder / name, **options)
            for member in members:
                store.add(member, folder / member, forget_rows=[Row("q?", "a")], config={})
        if not names or name in names:
            stack = GrunStack.from_folder(base, folder / name)
            answers[name] = answers_of(stack, prompts)
            stack.unwrap()
    file = folder / "reference.json"
    before = json.loads(file.read_text())["answers"] if file.exists() else {}
    file.write_text(json.dumps({"model": model_folder, "dtype": dtype, "answers": before | answers}))
    for name, rows in answers.items():
        same = sum(row["tokens"] == other["tokens"] for row, other in zip(rows, answers["base"], strict=True))
        print(f"{name}: {same} of {len(rows)} answers are the base's")


def make_adapter(base: Any, tokenizer: Any, folder: Path, options: dict[str, Any], seed: int) -> None:
    """A random adapter whose edits change answers."""
    import torch

    from grun import GrunModel

    options = dict(options)
    threshold = options.pop("gate_threshold", None)
    turn = tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    if options.get("action") == "refuse":
        options["answer_ids"] = [*tokenizer("I cannot help with that.")["input_ids"], tokenizer.eos_token_id]
    torch.manual_seed(seed)
    model = GrunModel.wrap(base, rank=4, reset_ids=turn, **options)
    with torch.no_grad():
        for edit in model.own_edits().values():
            edit.edit.source.weight.mul_(8)
        gates = [*model.own_edits().values()] if model.pooled is None else [model.pooled]
        for of in gates:
            for parameter in of.gate.parameters():
                parameter.mul_(0.3 if len([*of.gate.parameters()]) == 2 and model.pooled is None else 3)
    if threshold is not None:
        model.keep_threshold(threshold)
    model.save_pretrained(folder)
    model.unwrap()


def prompts_of(tokenizer: Any) -> list[list[int]]:
    """Six prompts of different lengths, one of them with earlier turns, one without a template."""

    def chat(*said: str) -> list[int]:
        turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
        ids: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        return ids

    long = "The quick brown fox jumps over the lazy dog near the river bank. " * 25
    return [
        chat("What is the capital of France?"),
        chat("Name three rivers of Europe and say where each of them begins and ends, please."),
        chat("Hi"),
        chat("Who wrote Hamlet?", "William Shakespeare wrote Hamlet around 1600.", "And when did he die?"),
        chat(f"Tell me about the following text. {long}What does the fox do?"),
        tokenizer("Water boils at")["input_ids"],
    ]


def answers_of(model: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Greedy tokens and their log-probabilities, one prompt at a time."""
    import torch

    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=2,
        )
        tokens = answer.sequences[0, len(prompt) :]
        chances = torch.stack(answer.logits, dim=1)[0].float().log_softmax(-1)
        chosen = chances.gather(1, tokens.unsqueeze(1))[:, 0]
        rows.append({"prompt": prompt, "tokens": tokens.tolist(), "logprobs": chosen.tolist()})
    return rows


# -- what vLLM says ---------------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {"enable_prefix_caching": False}
HARD: dict[str, Any] = {
    **{"enable_prefix_caching": True, "max_num_batched_tokens": 40},
    **{"block_size": 32, "num_gpu_blocks_override": 23},
}
"""Prompts in chunks of 40 tokens at most, prefixes from the cache in the second pass, and too few pages for all."""


def engine(folder: Path, said: dict[str, Any], name: str, **options: Any) -> Any:
    """vLLM with what goes by the name, or the base."""
    from vllm import LLM

    os.environ.pop("GRUN_VLLM_SALT", None)
    options = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, "disable_log_stats": False, **options}
    if name != "base":
        options |= {"load_format": "grun", "model_loader_extra_config": {"adapter": str(folder / name)}}
    return LLM(said["model"], dtype=said["dtype"], seed=0, **options)


SETTINGS = {"plain": PLAIN, "chunks, prefix caching, preemption": HARD}


def compare(folder: Path, names: list[str], options: dict[str, Any], settings: list[str]) -> int:
    """Print a line for each design and setting; the number of those that differ."""
    from vllm.distributed import cleanup_dist_env_and_memory

    said = json.loads((folder / "reference.json").read_text())
    differ = 0
    for name in names or said["answers"]:
        rows = said["answers"][name]
        for setting in settings:
            given = SETTINGS[setting]
            llm = engine(folder, said, name, **given, **options)
            for number in range(2 if given is HARD else 1):
                same, apart, cached = told(llm, rows)
                differ += same != NEW * len(rows)
                line = f"{name} | {setting}, pass {number + 1} | {same} of {NEW * len(rows)} tokens equal"
                print(f"{line} | log-probabilities differ by up to {apart:.1e} | {cached} tokens cached", flush=True)
            preempted = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
            print(f"{name} | {setting} | preemptions {preempted}", flush=True)
            del llm
            cleanup_dist_env_and_memory()
    return differ


def told(llm: Any, rows: list[dict[str, Any]]) -> tuple[int, float, int]:
    """Tokens that are equal up to the first other one, largest difference of log-probabilities there, cached tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": row["prompt"]} for row in rows], sampling, use_tqdm=False)
    same, apart = 0, 0.0
    for output, row in zip(outputs, rows, strict=True):
        tokens = list(output.outputs[0].token_ids)
        equal = next((n for n, (a, b) in enumerate(zip(tokens, row["tokens"], strict=True)) if a != b), NEW)
        same += equal
        for place in range(equal):
            got = output.outputs[0].logprobs[place][tokens[place]].logprob
            apart = max(apart, abs(got - row["logprobs"][place]))
    return same, apart, sum(output.num_cached_tokens or 0 for output in outputs)


def cost(folder: Path, names: list[str], options: dict[str, Any], repeats: int = 9) -> None:
    """Seconds of the processor for prompts and for answers, with edits and without, in turns in one engine."""
    from vllm import SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from grun_vllm.held import HELD

    said = json.loads((folder / "reference.json").read_text())
    long = said["answers"]["base"][4]["prompt"]
    for name in names or ["published", "robust", "maxmin", "mean_each", "store_mixed"]:
        llm = engine(folder, said, name, enable_prefix_caching=False, max_num_batched_tokens=2048, **options)
        for what, length, new in (("prompts of 390 tokens", 390, 1), ("answers of 64 tokens", 20, 64)):
            sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
            prompts = [{"prompt_token_ids": long[:length]} for _ in range(8)]
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for number in range(2 * repeats):
                off = number % 2 == 0
                with HELD[-1].resting() if off else contextlib.nullcontext():
                    start = time.process_time()
                    llm.generate(prompts, sampling, use_tqdm=False)
                seconds[off].append(time.process_time() - start)
            ratios = sorted(on / off for on, off in zip(seconds[False], seconds[True], strict=True))
            medians = f"{statistics.median(seconds[False]):.3f} s, off {statistics.median(seconds[True]):.3f} s"
            spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
            print(f"cost | {name} | 8 {what} | {medians} | ratio {statistics.median(ratios):.3f}, {spread}", flush=True)
        del llm
        cleanup_dist_env_and_memory()


def reload(folder: Path, options: dict[str, Any]) -> int:
    """Answers before and after a store is read anew, while a long answer is running; the number that differ."""
    said = json.loads((folder / "reference.json").read_text())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    live = folder / "store_live"
    shutil.rmtree(live, ignore_errors=True)
    shutil.copytree(folder / "store_robust", live)
    extra = json.dumps({"adapter": str(live)})
    command = ["vllm", "serve", said["model"], "--load-format", "grun", "--model-loader-extra-config", extra]
    command += ["--dtype", said["dtype"], "--port", str(port), "--max-model-len", "1024", "--served-model-name", "m"]
    command += ["--enforce-eager", *(f"--{name}={value}" for name, value in options.items())]
    variables = {"VLLM_PLUGINS": "grun,grun_admin", "GRUN_OWNER_KEY": "secret", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    server = subprocess.Popen(command, env={**os.environ, **variables})
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        differ = asked(port, said["answers"]["store_robust"], "before the reload")
        long: list[int] = []
        body = {"prompt": said["answers"]["base"][0]["prompt"], "max_tokens": 300}
        thread = threading.Thread(target=lambda: long.extend(completed(port, body)))
        thread.start()
        time.sleep(3)
        shutil.copytree(folder / "store_mixed/requests", live / "requests", dirs_exist_ok=True)
        shutil.copy(folder / "store_mixed/stack.json", live / "new.json")
        (live / "new.json").replace(live / "stack.json")
        start, running = time.perf_counter(), thread.is_alive()
        told = ask(port, "/grun/reload", {}, key="secret")
        print(f"reload | {time.perf_counter() - start:.2f} s | an answer was running: {running}", flush=True)
        print(f"reload | in force: {', '.join(one['name'] for one in told['requests'])}", flush=True)
        differ += asked(port, said["answers"]["store_mixed"], "after the reload")
        thread.join()
        print(f"reload | the long answer has {len(long)} of 300 tokens", flush=True)
        return differ + (len(long) != 300)
    finally:
        server.terminate()
        server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(address)
            return
        except OSError:
            time.sleep(1)
    raise SystemExit("the server ended")


def ask(port: int, path: str, body: dict[str, Any], key: str = "") -> Any:
    """What the server answers to a POST."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def completed(port: int, body: dict[str, Any]) -> list[int]:
    """Greedy tokens of a prompt."""
    fixed = {"model": "m", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    tokens: list[int] = ask(port, "/v1/completions", {**fixed, **body})["choices"][0]["token_ids"]
    return tokens


def asked(port: int, rows: list[dict[str, Any]], when: str) -> int:
    """Print how many tokens are equal; whether any differ."""
    same = 0
    for row in rows:
        tokens = completed(port, {"prompt": row["prompt"], "max_tokens": NEW})
        pairs = enumerate(zip(tokens, row["tokens"], strict=True))
        same += next((place for place, (got, wanted) in pairs if got != wanted), NEW)
    print(f"reload | {when} | {same} of {NEW * len(rows)} tokens equal", flush=True)
    return int(same != NEW * len(rows))


def main() -> int:
    """Run a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("reference", "compare", "reload", "cost"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", help="folder of a Llama with a chat template of ChatML, such as SmolLM2's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="*", default=[], help="designs, stores, or base")
    parser.add_argument("--settings", nargs="*", choices=[*SETTINGS], default=[*SETTINGS], help="of compare")
    parser.add_argument("--engine", type=json.loads, default={}, help="options of vLLM's LLM, JSON")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if given.step == "reference":
        reference(folder, given.model, given.dtype, given.only)
        return 0
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if given.step == "reload":
        return reload(folder, given.engine)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process for all engines, one after another
    given.engine.setdefault("distributed_executor_backend", "uni")
    if given.step == "cost":
        cost(folder, given.only, given.engine)
        return 0
    return compare(folder, given.only, given.engine, given.settings)


if __name__ == "__main__":
    sys.exit(main())
