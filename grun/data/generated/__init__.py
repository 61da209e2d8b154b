"""Corpora of invented people, places and minerals."""
