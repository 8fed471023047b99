"""Which components two models have in common: the same layer under the same or another name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import nn

from lightning_influence.capture import Component

Match: TypeAlias = Mapping[str, str] | Callable[[str], str | None] | None

HEADS = ("lm_head", "embed_out", "head", "score", "classifier", "unembed", "unembedding", "qa_outputs")


def is_head(model: nn.Module, component: Component) -> bool:
    """Whether a component makes the outputs: a tied embedding does too.

    Known by ``get_output_embeddings`` of transformers, or by a part of its name that is in `HEADS`.
    """
    outputs = [
        found
        for module in model.modules()
        if callable(get := getattr(module, "get_output_embeddings", None)) and (found := get()) is not None
    ]
    used = [(use.module, model.get_submodule(use.module)) for use in component.uses]
    return any(module in outputs or set(name.split(".")) & set(HEADS) for name, module in used)


def is_inner(model: nn.Module, component: Component) -> bool:
    """Whether a component is neither head nor normalisation ([MS] section 4 leaves both out)."""
    return component.kind != "norm" and not is_head(model, component)


def match_components(
    left: Sequence[Component], right: Sequence[Component], match: Match = None
) -> list[tuple[Component, Component]]:
    """Pairs of components of the same layer in two models, in the order of the first.

    Args:
        left: Components of one model.
        right: Components of the other.
        match: Name in the one model to the name in the other, as a mapping or a function that returns None for what
            has no counterpart. None: the two names are equal but for a prefix of whole parts, such as ``model`` and
            ``backbone.net``; the pair of prefixes is taken that fits most components.

    Raises:
        ValueError: If a mapping or function names a component that does not exist, or of another shape or kind.

    >>> [[one]] = [[Component("net.up", "linear", (), ("net.up.weight",), (3, 2))]]
    >>> [[two]] = [[Component("backbone.net.up", "linear", (), ("backbone.net.up.weight",), (3, 2))]]
    >>> [(a.name, b.name) for a, b in match_components([one], [two])]
    [('net.up', 'backbone.net.up')]
    """
    if match is not None:
        return _named(left, right, match)
    before, after = _prefixes(left, right)
    found = {c.name: c for c in right}
    pairs = []
    for component in left:
        name = component.name
        if not _starts(name, before):
            continue
        other = found.get(_join(after, name[len(before) :].lstrip(".")))
        if other is not None and _alike(component, other):
            pairs.append((component, other))
    return pairs


def distance(
    left: tuple[nn.Module, Component], right: tuple[nn.Module, Component], dtype: torch.dtype = torch.float64
) -> tuple[float, float]:
    """``|θ_right - θ_left|`` of a component's parameters and ``|θ_left|``, accumulated in ``dtype``."""
    parts, norms = [], []
    for one, other in zip(left[1].parameters, right[1].parameters, strict=True):
        before = left[0].get_parameter(one).detach().to(dtype)
        after = right[0].get_parameter(other).detach().to(before.device, dtype)
        parts.append(torch.linalg.vector_norm(after - before))
        norms.append(torch.linalg.vector_norm(before))
    return float(torch.stack(parts).norm()), float(torch.stack(norms).norm())


def _named(
    left: Sequence[Component], right: Sequence[Component], match: Mapping[str, str] | Callable[[str], str | None]
) -> list[tuple[Component, Component]]:
    wanted = match if isinstance(match, Mapping) else {c.name: name for c in left if (name := match(c.name))}
    one, other = ({c.name: c for c in side} for side in (left, right))
    problems = [f"{a!r} is no component of the pre-trained model" for a in wanted if a not in one]
    problems += [f"{b!r} is no component of the fine-tuned model" for b in wanted.values() if b not in other]
    pairs = [(one[a], other[b]) for a, b in wanted.items() if a in one and b in other]
    problems += [f"{a.name!r} {a.shape} is not alike {b.name!r} {b.shape}" for a, b in pairs if not _alike(a, b)]
    if len(set(wanted.values())) < len(wanted):
        problems.append("two components have the same counterpart")
    if problems:
        raise ValueError(
            f"`MultiStageInfluence(match=...)`: expected names of alike components; {'; '.join(problems[:8])}. "
            f"The models have {list(one)[:6]} and {list(other)[:6]}."
        )
    place = {c.name: k for k, c in enumerate(left)}
    return sorted(pairs, key=lambda pair: place[pair[0].name])


def _alike(one: Component, other: Component) -> bool:
    return (one.kind, one.shape, len(one.parameters)) == (other.kind, other.shape, len(other.parameters))


def _prefixes(left: Iterable[Component], right: Sequence[Component]) -> tuple[str, str]:
    """What the names of most alike components begin with before the parts that they end with in common."""
    votes: Counter[tuple[str, str]] = Counter()
    for one in left:
        votes.update({_apart(one.name, o.name) for o in right if _alike(one, o) and _last(one) == _last(o)})
    if not votes:
        return "", ""
    return min(votes, key=lambda pair: (-votes[pair], len(pair[0]) + len(pair[1]), pair))


def _apart(one: str, other: str) -> tuple[str, str]:
    """The beginnings of two names without the parts that they end with in common."""
    left, right = one.split("."), other.split(".")
    while left and right and left[-1] == right[-1]:
        del left[-1], right[-1]
    return ".".join(left), ".".join(right)


def _last(component: Component) -> str:
    return component.name.rpartition(".")[2]


def _starts(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _join(prefix: str, rest: str) -> str:
    return f"{prefix}.{rest}" if prefix and rest else prefix or rest
