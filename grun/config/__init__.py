"""Options with their defaults and bounds, and the YAML definitions that come with the package."""
