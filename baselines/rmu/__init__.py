"""`python -m baselines.rmu`: the command line of the published RMU tool."""
