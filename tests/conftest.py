from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs a network is a wrong test
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings

torch.set_num_threads(1)  # small tensors: more threads only wait for each other

settings.register_profile("tests", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("tests")
