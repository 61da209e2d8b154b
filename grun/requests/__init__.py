"""Requests to forget that arrive over time: a folder of adapters for one base model, and what is known of each.

store.py is the folder, for writers (`grun.method.stack` holds its manifest and reads it); adding.py, verify.py and
listing.py are the actions of `python -m grun requests`, command.py its command line.
"""
