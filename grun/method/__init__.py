"""The gated edit itself: gates, low-rank edits, where they act, and the model that carries them.

Nothing here knows a benchmark or an objective. Start at `host.py` (what wrapping does to a base) and
`model.py` (GrunModel: one adapter) or `stack.py` (GrunStack: many); the formula is in `intervention.py`.
"""
