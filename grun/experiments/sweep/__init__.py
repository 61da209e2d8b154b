"""Grids of unlearning runs, each followed by its evaluation: `python -m grun sweep`.

`definition.py` reads a sweep's file and `plan.py` makes its cells; `cells.py` is the job of one cell; `tuning.py`
chooses settings; `command.py` is the command.
"""
