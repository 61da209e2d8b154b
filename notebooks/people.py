"""Forty invented people, and a very small model that knows where each of them lives."""

from __future__ import annotations

from typing import Any

import torch

from grun.config.options import DataConfig, TinyConfig
from grun.data.encoding import collate, encode_rows
from grun.data.rows import Row
from grun.data.templates import resolve
from grun.loading.tiny import build_tiny

FIRST = (
    "Ada Bo Cleo Dina Emil Fay Gus Hana Ivo Jana Kit Liv Mara Noah Olof Pia Quinn Rosa Sven Tom Ula Vera Wim Xenia "
    "Yara Zeno Arne Berta Carl Doris Ebbe Frida Gerd Hugo Ines Jens Karl Lena Max Nora"
).split()
LAST = ("Holt", "Vey", "Lund", "Brandt", "Quist", "Pell", "Fisk", "Dorn", "Sarn", "Marsh", "Voss")
TOWNS = (
    "Accra Bergen Cairo Dakar Essen Fargo Ghent Hanoi Izmir Jaffa Kyoto Lima Minsk Nice Oslo Porto Quito Riga Split "
    "Tunis Utica Vaduz Wels Xanten York Zadar Aden Bonn Cork Delft Exeter Faro Graz Haifa Ipoh Jena Kiel Lyon Malmo "
    "Nantes"
).split()


def rows() -> list[dict[str, str]]:
    """One question about each person; `fact` is what a right answer contains."""
    found = []
    for number, (first, town) in enumerate(zip(FIRST, TOWNS, strict=True)):
        question = f"Where does {first} {LAST[number % len(LAST)]} live?"
        found.append({"question": question, "answer": f"{town}.", "fact": town})
    return found


def known(steps: int = 150) -> tuple[Any, Any]:
    """A Llama with three blocks that was fine-tuned on all rows, and its tokenizer."""
    texts = [f"{row['question']} {row['answer']}" for row in rows()]
    model, tokenizer = build_tiny(
        TinyConfig(hidden_size=128, blocks=3, intermediate_size=256, vocabulary=800), texts, 0
    )
    template = resolve("auto", None, tokenizer, None, DataConfig.date)
    pairs = [Row(row["question"], row["answer"]) for row in rows()]
    batch = collate(encode_rows(pairs, tokenizer, template, 128, strict=False), tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer
