"""What a model knows: score and generate once, keep a table, compute every metric from the table.

`evaluate.py` runs it, `scoring.py` and `generation.py` ask the model, `metrics/` and `gates.py` read `table.py`.
"""
