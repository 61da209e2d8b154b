"""What is minimized: forget, retain and gate terms as pure functions, and presets that combine them.

`losses.py` holds the formulas, `terms.py` says what a term is and registers it, `forget.py`, `retain.py` and `gate.py`
hold the terms, `presets.py` the named combinations and their weights.
"""

from grun.objectives import forget, gate, retain  # noqa: F401  what they define is registered
