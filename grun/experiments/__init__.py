"""Many runs: sweeps (grids) and sequences of requests."""
