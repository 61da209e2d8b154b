"""What a model knows: score and generate once, keep a table, compute every metric from the table.

`evaluate.py` runs what `plan.py` and `items.py` lay out; `scoring.py`, `generation.py` and, faster, `shared_scoring.py`
and `packed_scoring.py` ask the model; `measure.py` and `metrics/` read `table.py`. `suites/` and `attacks/` ask for
other things.
"""
