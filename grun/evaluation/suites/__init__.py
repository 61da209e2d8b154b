"""Evaluations other than the table of answers, chosen by `suite=NAME`: `base.py` carries one out.

`attacks.py` (with `open_questions.py`), `knowledge.py`, `lm_harness.py` (with `lm_harness_model.py`) and `judge.py` are
one suite each.
"""
