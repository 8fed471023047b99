"""How much may be kept at a time."""

from __future__ import annotations


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
