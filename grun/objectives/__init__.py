"""What is minimized: losses on forget rows, on retain rows and on gates, and the named objectives made of them.

One file a family (ascent, preference, distillation, refusal, rmu, entropy, retain, gate), each loss with its term and
its presets. `terms.py` has the decorators and an example; `objective.py` puts together what a run asks for.
"""
