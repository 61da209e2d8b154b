"""Many runs: grids (`sweep/`) and requests one after another (`sequential/`).

Both are jobs: `job.py` is one on disk, `running.py` starts them here or through a launcher. `options.py` makes options
of an experiment's file, `models.py` looks after its models.
"""
