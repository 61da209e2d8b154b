"""What is minimized: forget, retain and gate terms as pure functions, and presets that combine them.

`terms.py` holds the functions and their registry, `presets.py` the named combinations and their weights.
"""
