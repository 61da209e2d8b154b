"""Benchmarks, each a command: see README.md."""
