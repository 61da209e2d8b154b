"""What is minimized: losses on forget rows, on retain rows and on gates, and the named objectives made of them.

One file a family, each loss with its term and its presets. `terms.py` has the decorators and an example; `objective.py`
puts together what a run asks for. Another file here, or a plugin's, is found without being named.
"""

# In this order, whichever is imported first.
from grun.objectives import ascent, distillation, entropy, gate, preference, refusal, retain, rmu  # noqa: F401
