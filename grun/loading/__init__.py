"""From names and folders to what they stand for: resolved options, base models, adapters of every kind."""
