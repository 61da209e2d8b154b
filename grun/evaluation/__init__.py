"""What a model knows: score and generate once, keep a table, compute every metric from the table.

`evaluate.py` runs what `plan.py` and `items.py` say; `scoring.py`, `shared_scoring.py` (faster) and `generation.py` ask
the model; `metrics/` and `gates.py` read `table.py`.
"""
