"""The gated edit itself: gates, low-rank edits, where they act, and the model that carries them.

Nothing here knows a benchmark or an objective. Start at `model.py` (GrunModel); the formula is in `intervention.py`.
"""
