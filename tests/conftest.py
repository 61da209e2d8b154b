"""Settings of the whole suite, made before anything heavy is imported: one thread, no network, no display."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import torch  # noqa: E402

torch.set_num_threads(1)
