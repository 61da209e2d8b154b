"""Plain fine-tuning to compare GRUN with, run by the same trainer, data and evaluation; two published tools.

`full.py` changes all weights of the model, `lora.py` adds low-rank changes to frozen ones. `rmu/` and `llm360/` are
command lines with the flags of the published tools. `grun` names this package in one place, the registry of
parametrizations, and runs without it.
"""
