"""How much may be kept at a time."""

from __future__ import annotations

import torch

ACCELERATED = 2**26  # numbers in a piece where there is no cache to stay in, but a launch to pay for: 256 MiB


def check_bytes(call: str, name: str, value: object) -> None:
    """Refuse a budget that is no number of bytes.

    Args:
        call: How the caller's code reads, up to the bracket.
        name: Of the argument.
        value: What was given.

    Raises:
        ValueError: Unless it is an int >= 0.
    """
    if type(value) is not int or value < 0:
        raise ValueError(f"`{call}({name}={value!r})`: expected a number of bytes, an int >= 0, such as 2 * 1024**3.")


def at_once(cached: int, device: torch.device) -> int:
    """Numbers to work on at a time.

    Args:
        cached: On a processor, whose cache they shall stay in.
        device: Anything else gets larger pieces: every operation on one is a launch, whatever its size.
    """
    return cached if device.type == "cpu" else max(cached, ACCELERATED)
