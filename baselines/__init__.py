"""Plain fine-tuning beside GRUN, run by the same trainer, data and evaluation.

`full.py` changes all weights of the model. `grun` names this package in one place, the registry of parametrizations,
and runs without it.
"""
