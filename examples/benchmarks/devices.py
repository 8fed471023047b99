"""Where a benchmark runs, and its clock."""

from __future__ import annotations

import argparse
import time

import torch


def runs_on(name: str) -> torch.device:
    """The device of an argument `--device`: the processor, or a GPU of CUDA that is there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"expected a GPU for {name!r}, torch finds none; use cpu")
    return device


def clock(device: torch.device) -> float:
    """Seconds, those of the processor with one thread on it; a GPU has done by then what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
