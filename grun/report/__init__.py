"""The end of a pipeline, from results on disk alone: what was evaluated, in words, tables and pictures.

`make.py` writes a report: `results.py` finds what was evaluated, `tables.py` is the table model, `suites.py` what all
reports share. What is a suite's own is data in `answers.py`, `attacks.py` and `knowledge.py`.
"""
