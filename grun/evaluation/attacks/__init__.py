"""Attacks on what a model was made to forget: other ways to ask, to sample and, later, to open it.

`base.py` has the class with its three hooks and the registry ATTACKS; each other file is one attack, `strings.py` what
they write, `weights.py` and `fine_tuning.py` what those share that change the model;
`grun/evaluation/attack_suite.py` runs them.
"""
