"""Requests to forget that arrive over time: a folder of adapters for one base model, and what is known of each.

manifest.py: what stack.json holds; store.py, copying.py, checking.py, forget_rows.py: the folder; command.py,
adding.py, verify.py, listing.py: `python -m grun requests`.
"""
