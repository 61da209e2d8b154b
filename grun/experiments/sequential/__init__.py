"""Requests to forget that arrive one after another: `python -m grun sequential`.

`definition.py` reads an experiment's file, `splitting.py` cuts the forget set into requests, `plan.py` resolves all
options; `chain.py` is one method's steps on disk and `steps.py` how each is made; `measuring.py` looks at them;
`results.py`, `tables.py` and `pictures.py` report; `command.py` is the command.
"""
