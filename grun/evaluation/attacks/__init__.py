"""Attacks on what a model was made to forget: other ways to ask, to sample, and to open it.

`base.py` has the class with its three hooks, the decorator `attack` and the registry ATTACKS. Attacks are in
`prompts.py` (what is asked), `read_outs.py` (what is read), `weights.py` with `parts.py` (what is changed) and
`retention.py` (what they cost others); further modules here are found by themselves. `outcomes.py` makes numbers of
what came back, and `grun/evaluation/suites/attacks.py` runs them.
"""
