"""A tiny random Llama with the template of a real chat model and the beginning of its tokenizer, as a folder."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from demo import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

TOKENIZER = Path(__file__).parent / "data" / "smollm2"
"""Files of SmolLM2-135M-Instruct, see the README there."""
WHOLE = 49152
"""Tokens of its vocabulary."""
TOKENS = 4096
"""Of them, where words need not be tokens: to read the whole vocabulary takes a tenth of a second each time."""


@functools.cache
def beginning(tokens: int) -> str:
    """The real tokenizer's file, with as many tokens of its vocabulary."""
    tokenizer = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = {token: number for token, number in tokenizer["model"]["vocab"].items() if number < tokens}
    merges = [pair for pair in tokenizer["model"]["merges"] if {*pair, "".join(pair)} <= vocabulary.keys()]
    tokenizer["model"] |= {"vocab": vocabulary, "merges": merges}
    return json.dumps(tokenizer)


def save_chat_model(folder: Path, blocks: int = 3, seed: int = 0, tokens: int = TOKENS) -> Path:
    """Write the model to `folder`, as a hub would hold it: nothing of GRUN's beside it."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(beginning(tokens), encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_with_countries(path: Path) -> Path:
    """The model in `path`/model, and two questions on each of a few countries in forget.jsonl and retain.jsonl."""
    save_chat_model(path / "model")
    for name, countries in (("forget", ["Japan", "Egypt"]), ("retain", ["Norway", "Chile", "Kenya", "Peru"])):
        asked = ["What is the capital of {}?", "Where does {} lie?"]
        rows = [{"question": text.format(one), "answer": f"In {one}."} for one in countries for text in asked]
        write_rows(path / f"{name}.jsonl", *rows)
    return path


def teach(folder: Path, texts: Sequence[str]) -> Path:
    """Let the model in `folder` learn some texts by heart."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder
