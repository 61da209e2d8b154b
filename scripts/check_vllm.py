"""Whether vLLM with GRUN's plugin answers as GrunModel and GrunStack do, and what the edits cost there.

Two steps, which may be run in two environments, since vLLM wants older packages than the tested ones:

    python scripts/check_vllm.py reference FOLDER --model MODEL_FOLDER     where GRUN and pyvene are
    python scripts/check_vllm.py compare FOLDER                            where vLLM and GRUN's plugin are
    python scripts/check_vllm.py cost FOLDER                               the same; seconds beside edits off

The first writes random adapters of every kind of design and stores of them on the model, and the greedy tokens of six
prompts under each, one prompt at a time; the second compares them, with prompts in chunks, prefix caching and
preemption, and while a store is read anew over HTTP.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
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
    "refuse": {**STICKY, "blocks": None, "gate_blocks": [2, 5], "gate_pool": "maxmin", "action": "refuse"},
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
HARD: dict[str, Any] = {"enable_prefix_caching": True, "max_num_batched_tokens": 40, "num_gpu_blocks_override": 17}
"""Prompts in chunks of 40 tokens at most, prefixes from the cache in the second pass, and too few pages for all."""


def engine(folder: Path, said: dict[str, Any], name: str, **options: Any) -> Any:
    """vLLM with what goes by the name, or the base."""
    from vllm import LLM

    os.environ.pop("GRUN_VLLM_SALT", None)
    options = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, "disable_log_stats": False, **options}
    if name != "base":
        options |= {"load_format": "grun", "model_loader_extra_config": {"adapter": str(folder / name)}}
    return LLM(said["model"], dtype=said["dtype"], seed=0, **options)


def compare(folder: Path, names: list[str], options: dict[str, Any]) -> int:
    """Print a line for each design and setting; the number of those that differ."""
    from vllm.distributed import cleanup_dist_env_and_memory

    said = json.loads((folder / "reference.json").read_text())
    differ = 0
    for name in names or said["answers"]:
        rows = said["answers"][name]
        for setting, given in (("plain", PLAIN), ("chunks, prefix caching, preemption", HARD)):
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


def cost(folder: Path, names: list[str], options: dict[str, Any], repeats: int = 7) -> None:
    """Seconds of prompts and of answers, each the median of several; beside the same model without the plugin."""
    from vllm import SamplingParams

    said = json.loads((folder / "reference.json").read_text())
    long = said["answers"]["base"][4]["prompt"]
    settings = {"prompts": (8, 1), "answers": (8, 64)}
    base: dict[str, float] = {}
    for name in ["base", *(names or ["published", "robust", "maxmin", "store_mixed"]), "base"]:
        llm = engine(folder, said, name, enable_prefix_caching=False, max_num_batched_tokens=2048, **options)
        for what, (count, new) in settings.items():
            sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
            prompts = [{"prompt_token_ids": long if new == 1 else long[-20:]} for _ in range(count)]
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                llm.generate(prompts, sampling, use_tqdm=False)
                seconds.append(time.perf_counter() - start)
            median = statistics.median(seconds)
            base.setdefault(what, median)
            spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
            print(f"{name} | {what} | {median:.3f} s ({spread}) | {median / base[what]:.3f} of the base's", flush=True)
        del llm


def main() -> int:
    """Run a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("reference", "compare", "cost"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", help="folder of a Llama with a chat template of ChatML, such as SmolLM2's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="*", default=[], help="designs, stores, or base")
    parser.add_argument("--engine", type=json.loads, default={}, help="options of vLLM's LLM, JSON")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if given.step == "reference":
        reference(folder, given.model, given.dtype, given.only)
        return 0
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process for all engines, one after another
    given.engine.setdefault("distributed_executor_backend", "uni")
    if given.step == "cost":
        cost(folder, given.only, given.engine)
        return 0
    return compare(folder, given.only, given.engine)


if __name__ == "__main__":
    sys.exit(main())
