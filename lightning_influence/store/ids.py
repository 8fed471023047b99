"""Ids of examples on their way to disk: whole numbers or strings, and they stay what they are."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeAlias

Id: TypeAlias = int | str


def plain_ids(ids: Iterable[Any], what: str) -> tuple[Id, ...]:
    """The ids as Python ints or strings.

    Args:
        ids: Ints (NumPy's and tensors' too) or strings, each once.
        what: The call and the argument, for the message.

    Raises:
        ValueError: If an id is neither int nor string, the types are mixed, or an id comes twice.

    >>> import torch
    >>> plain_ids(torch.tensor([3, 1]), "ids")
    (3, 1)
    """
    plain = tuple(_plain(value, what) for value in ids)
    if len({type(value) for value in plain}) > 1:
        raise ValueError(f"`{what}`: expected ids of one type, got ints and strings; turn all of them into str.")
    if len(set(plain)) < len(plain):
        twice = [value for value, times in Counter(plain).items() if times > 1][:5]
        raise ValueError(f"`{what}`: expected every id once, these come more than once: {twice}.")
    return plain


def _plain(value: Any, what: str) -> Id:
    if isinstance(value, str):
        return str(value)
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"`{what}`: expected ids that are ints or strings, got {value!r}.")
