"""Requests to forget that arrive one after another: `python -m grun sequential`.

`definition.py` reads an experiment's file, `splitting.py` cuts the forget set into requests, `plan.py` resolves all
options; `chain.py` is the job of one method and `steps.py` how it serves each request; `measuring.py` looks at them;
`results.py`, `tables.py` and `pictures.py` report; `command.py` is the command.
"""
