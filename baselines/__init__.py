"""Plain fine-tuning beside GRUN, run by the same trainer, data and evaluation.

`full.py` changes all weights of the model, `lora.py` puts low-rank changes beside frozen ones. `grun` names this
package in one place, the registry of parametrizations, and runs without it.
"""
