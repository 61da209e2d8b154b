"""GRUN's edits inside vLLM, as a plugin that changes no line of it: `vllm serve MODEL --load-format grun ...`.

`plugin.py` is what vLLM finds. What is done to the states of a pass is in `edits.py`, which needs no vLLM: tokens of
all sequences side by side (`step.py`), and what gates remember of them by page of the key/value cache (`memory.py`).
"""
