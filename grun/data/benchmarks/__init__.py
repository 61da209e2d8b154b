"""One file a benchmark: how its rows are made or read, and the evaluation sets of its own."""
