"""The end of a pipeline, from results on disk alone: what was evaluated, in words, tables and pictures.

`make.py` writes a report: `results.py` finds what was evaluated, `tables.py` is the table model, `page.py` the page.
Each suite has a file of its own: `answers.py` (with `columns.py`, `verdict.py` and `matrix.py`), `attacks.py`,
`knowledge.py`.
"""
