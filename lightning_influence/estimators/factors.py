"""Group influence in factored form, checked once: what `Interactions` evaluates and a selection rule minimises."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral, Real

import torch
from torch import Tensor

Id = int | str

_BLOCK_ON_CPU = 2**18  # elements: a float64 copy of a block stays in the cache, converting it costs no time
_BLOCK_ELSEWHERE = 2**26
_ROOT_ERROR = 64 * torch.finfo(torch.float64).eps
_SMALL_RANK = 8  # a metric of at most one in so many of its rows is applied as two products with a root


@dataclass(frozen=True, eq=False)
class Factors:
    """First-order values b and interactions K = F M Fᵀ of a pool of n examples; K itself is never formed.

    With U_S = Σ_{i∈S} f_i, adding the group S changes the target loss by −Σ_{i∈S} b_i + ½ U_Sᵀ M U_S
    ([IA] section 3.1, eq. 8). Products are accumulated in float64 whatever the dtype of the features.

    Attributes:
        values: b [n], float64; b_i > 0: adding example i lowers the target loss.
        features: F [n, r] in the dtype and on the device in which they were given; None: no interactions.
        metric: M [r, r], float64, symmetric, not necessarily definite; None: the identity.
        ids: one id per row; a range of row numbers, which takes no memory, where none were given.
        scratch: Room for a block of features in float64, from `with_scratch`; None: allocated whenever it is needed.
    """

    values: Tensor
    features: Tensor | None
    metric: Tensor | None
    ids: Sequence[Id]
    scratch: Tensor | None = None

    @classmethod
    def checked(
        cls,
        call: str,
        values: Tensor,
        features: Tensor | None = None,
        metric: Tensor | None = None,
        ids: Iterable[Id] | None = None,
    ) -> Factors:
        """Factors from a caller's arguments; ``call`` is how the caller's code reads, for the error text.

        Raises:
            ValueError: If the pool is empty, shapes do not fit, ids repeat or are of mixed types, numbers are
                NaN or infinite (the ids are named), or the metric is not symmetric.
        """
        values = _values(call, values)
        names = range(len(values)) if ids is None else check_ids(call, ids, len(values))
        features = _features(call, features, len(values))
        metric = _metric(call, metric, features)
        device = values.device if features is None else features.device
        metric = metric if metric is None else metric.to(device)
        factors = cls(values.to(device), features, metric, names)
        factors._check_finite(call)
        return factors

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def id_ranks(self) -> Tensor:
        """Place [n] of each row's id among the sorted ids: the order in which ties are resolved."""
        if isinstance(self.ids, range):
            return torch.arange(len(self), device=self.values.device)
        ranks = torch.empty(len(self), dtype=torch.long)
        by_id = sorted(range(len(self)), key=self.ids.__getitem__)
        ranks[torch.tensor(by_id)] = torch.arange(len(self))
        return ranks.to(self.values.device)

    @cached_property
    def rows(self) -> dict[Id, int]:
        """Row number of each id."""
        return {name: row for row, name in enumerate(self.ids)}

    def lift(self, shifts: Tensor) -> Tensor:
        """M applied to parameter shifts [..., r], float64."""
        if self.metric is None:
            return shifts.double()
        if self._moves is not None:
            places, numbers = self._moves
            return shifts.double()[..., places] * numbers
        if self._root is None:
            return shifts.double() @ self.metric
        return (shifts.double() @ self._root.T) @ self._root

    @cached_property
    def _moves(self) -> tuple[Tensor, Tensor] | None:
        """Place and number [r] of the only entry of each column of M, where it swaps parts of F, or has signs alone."""
        if self.metric is None or int(self.metric.count_nonzero(dim=0).max()) > 1:
            return None
        places = self.metric.abs().argmax(dim=0)
        return places, self.metric.gather(0, places[None])[0]

    @cached_property
    def _root(self) -> Tensor | None:
        """A [q, r] with M = AᵀA up to rounding, where few rows will do, as for the Fisher of a few targets."""
        return None if self.metric is None else low_rank_root(self.metric, len(self.metric) // _SMALL_RANK)

    @cached_property
    def scales(self) -> Tensor | None:
        """d [n], float64, where F is diag(d), as where the metric is K itself; products with F take no time then."""
        if self.features is None or self.features.shape != (len(self), len(self)):
            return None
        diagonal = self.features.diagonal()
        return diagonal.double() if self.features.count_nonzero() == diagonal.count_nonzero() else None

    def lifted(self, rows: Sequence[int] | Tensor) -> Tensor:
        """M f_j of some rows [k, r], float64."""
        assert self.features is not None
        index = self._index(rows)
        if self.scales is None or self.metric is None:
            return self.lift(self.features[index])
        return self.scales[index, None] * self.metric[index]

    def shift(self, rows: Sequence[int]) -> Tensor:
        """U_S = Σ f_i over some rows, [r], float64; r = 0 without interactions."""
        if self.features is None:
            return self.values.new_zeros(0)
        total = self.values.new_zeros(self.features.shape[1])
        for block in self.blocks(rows):
            total += block.sum(dim=0)
        return total

    def products(self, direction: Tensor) -> Tensor:
        """F·direction [n] for a direction [r] in feature space, float64."""
        if self.scales is not None:
            return self.scales * direction
        return torch.cat([block @ direction for block in self.blocks()])

    def self_interactions(self) -> Tensor:
        """K_jj = f_jᵀ M f_j [n], float64."""
        if self.scales is not None:
            return self.scales.square() * (1.0 if self.metric is None else self.metric.diagonal())
        return torch.cat([(block * self.lift(block)).sum(dim=1) for block in self.blocks()])

    def norms(self) -> Tensor:
        """Euclidean norm ‖f_j‖ [n], float64."""
        if self.scales is not None:
            return self.scales.abs()
        return torch.cat([block.norm(dim=1) for block in self.blocks()])

    def largest(self) -> float:
        """max |F_ij|, taken in the dtype of the features; NaN or infinite where one of them is."""
        assert self.features is not None
        low, high = self.features.aminmax()
        return float(torch.stack([low.double().abs(), high.double().abs()]).max())

    def in_order(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """First-order and interaction part [len(rows)] of the change that each row causes when added in turn.

        With S the rows before j: −b_j and ⟨U_S, M f_j⟩ + ½ f_jᵀ M f_j ([IA] section 3.2, eq. 12).
        """
        first_order = -self.values[self._index(rows)]
        if self.features is None or len(rows) == 0:
            return first_order, torch.zeros_like(first_order)
        interaction, before, start = torch.empty_like(first_order), self.shift([]), 0
        scratch = None  # one for all blocks, as in `blocks`
        for block in self.blocks(rows):
            scratch = torch.empty_like(block) if scratch is None else scratch
            midway = torch.cumsum(block, 0, out=scratch[: len(block)])
            midway.add_(before).sub_(block, alpha=0.5)  # U_S + ½ f_j
            stop = start + len(block)
            lifted = self.lift(block) if self.scales is None else self.lifted(rows[start:stop])
            torch.sum(midway.mul_(lifted), dim=1, out=interaction[start:stop])
            before, start = before + block.sum(dim=0), stop
        return first_order, interaction

    def _index(self, rows: Sequence[int] | Tensor) -> Tensor:
        return torch.as_tensor(rows, dtype=torch.long, device=self.values.device)

    def blocks(self, rows: Sequence[int] | Tensor | None = None) -> Iterator[Tensor]:
        """All features, or those of some rows, in float64, a few rows at a time; each valid until the next."""
        assert self.features is not None
        size = self._block_rows()
        index = None if rows is None else self._index(rows)
        count = len(self) if index is None else len(index)
        scratch = self.scratch
        if scratch is None and self.features.dtype != torch.float64:
            scratch = self._new_scratch(min(size, count))  # one for all: fresh memory for every block costs up to 10 x
        for start in range(0, count, size):
            part = slice(start, start + size)
            block = self.features[part if index is None else index[part]]
            yield block if scratch is None or block.dtype == torch.float64 else scratch[: len(block)].copy_(block)

    def with_scratch(self) -> Factors:
        """The same, for many short passes: one block is allocated for all, so that there can be only one at a time."""
        return replace(self, scratch=self._new_scratch(min(self._block_rows(), len(self))))

    def _block_rows(self) -> int:
        assert self.features is not None
        elements = _BLOCK_ON_CPU if self.features.device.type == "cpu" else _BLOCK_ELSEWHERE
        return max(1, elements // self.features.shape[1])

    def _new_scratch(self, rows: int) -> Tensor:
        assert self.features is not None
        return self.values.new_empty(rows, self.features.shape[1])

    def _check_finite(self, call: str) -> None:
        finite = {"values": self.values.isfinite()}
        if self.features is not None and not math.isfinite(self.largest()):
            finite["features"] = torch.cat([block.isfinite().all(dim=1) for block in self.blocks()])
        for argument, good in finite.items():
            check_finite(call, argument, good, self.ids)


def low_rank_root(matrix: Tensor, most: int) -> Tensor | None:
    """A [q, r] with q <= most and AᵀA the matrix up to rounding, by Cholesky with pivots; None where there is none.

    Args:
        matrix: Symmetric [r, r], float64.
        most: Rows of A; the work is O(r most²).
    """
    left, root = matrix.diagonal().clone(), matrix.new_zeros(most, len(matrix))
    enough, q = 8 * torch.finfo(matrix.dtype).eps * float(left.abs().sum()), 0
    while float(left.sum()) > enough:
        pivot = int(left.argmax())
        if q == most or float(left[pivot]) <= 0:
            return None
        row = (matrix[pivot] - root[:q, pivot] @ root[:q]) / left[pivot].sqrt()
        root[q] = row
        left -= row.square()
        left[pivot], q = 0.0, q + 1
    found = root[:q]
    error = torch.linalg.matrix_norm(matrix - found.T @ found)  # an indefinite matrix ends here
    return found if float(error) <= _ROOT_ERROR * float(torch.linalg.matrix_norm(matrix)) else None


def few(names: Sequence[Id], limit: int = 5) -> str:
    """The first few of a list of ids, for an error text.

    >>> few([3, 1, 4, 1, 5, 9, 2])
    'ids 3, 1, 4, 1, 5, ... (2 more)'
    """
    more = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return ("id " if len(names) == 1 else "ids ") + ", ".join(repr(name) for name in names[:limit]) + more


def check_ids(call: str, ids: Iterable[Id] | None, n: int) -> tuple[Id, ...]:
    """Ids of a pool of n examples as plain ints or strs, row numbers for None; raises ValueError if unfit."""
    if ids is None:
        return tuple(range(n))
    names = check_labels(call, "ids", ids, n)
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise ValueError(f"`{call}(ids)`: expected unique ids. More than once: {few(repeated)}.")
    return names


def check_labels(call: str, argument: str, labels: Iterable[Id], n: int) -> tuple[Id, ...]:
    """One label for each of n examples, as plain ints or strs; raises ValueError if unfit."""
    given = [_plain(name) for name in (labels.tolist() if hasattr(labels, "tolist") else labels)]
    if len(given) != n:
        raise ValueError(
            f"`{call}({argument})`: expected one {argument[:-1]} for each of the {n} values. Got {len(given)}."
        )
    kinds = sorted({type(name).__name__ for name in given})
    if kinds not in (["int"], ["str"]):
        raise ValueError(
            f"`{call}({argument})`: expected {argument} that are all int or all str. Got {', '.join(kinds)}."
        )
    return tuple(name for name in given if isinstance(name, int | str))


def check_weight(call: str, weight: object) -> None:
    """Raises ValueError unless the weight of an example is a finite number > 0."""
    if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 < float(weight) < math.inf:
        raise ValueError(
            f"`{call}(weight={weight!r})`: expected a number > 0, such as 1/n for n training examples, or 1/k when "
            "the model will be trained on k selected examples alone."
        )


def members(call: str, group: Iterable[Id]) -> list[Id]:
    """The ids of a group.

    Raises:
        ValueError: If it is a single id.
    """
    if isinstance(group, str) or not isinstance(group, Iterable) or (isinstance(group, Tensor) and not group.dim()):
        raise ValueError(f"`{call}`: expected the ids of each group in a list, as [[3, 4]]. Got {group!r} for a group.")
    return group.tolist() if isinstance(group, Tensor) else list(group)


def rows_of(call: str, group: Iterable[Id], rows: Mapping[Id, int]) -> list[int]:
    """Row numbers of the examples of a group.

    Raises:
        ValueError: If an id is not among the rows, or stands in the group twice, or the group is a single id.
    """
    names = members(call, group)
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise ValueError(
            f"`{call}`: expected a group of the {len(rows)} examples it was made of. Unknown: {few(unknown)}."
        )
    if len(set(names)) < len(names):
        twice = [name for name, times in Counter(names).items() if times > 1]
        raise ValueError(f"`{call}`: expected each example of a group once. Repeated: {few(twice)}.")
    return [rows[name] for name in names]


def check_finite(call: str, argument: str, finite: Tensor, ids: Sequence[Id], what: str = "examples") -> None:
    """Raises ValueError with the ids of the examples [n] whose ``argument`` is not ``finite``."""
    if finite.all():
        return
    bad = [ids[row] for row in (~finite).nonzero().flatten().tolist()]
    raise ValueError(
        f"`{call}({argument})`: expected finite numbers. {len(bad)} of {len(finite)} {what} have NaN or infinite "
        f"{argument}: {few(bad)}. Look at their loss, or leave them out."
    )


def _values(call: str, values: Tensor) -> Tensor:
    values = torch.as_tensor(values).detach()
    if values.dim() != 1 or values.is_complex():
        raise ValueError(f"`{call}(values)`: expected a real tensor [n], one number per example. Got {_shape(values)}.")
    if len(values) == 0:
        raise ValueError(f"`{call}(values)`: expected at least one example. The pool is empty.")
    return values.double()


def _features(call: str, features: Tensor | None, n: int) -> Tensor | None:
    if features is None:
        return None
    with warnings.catch_warnings():  # of arrays that may not be written to, such as a memory map: we only read
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        features = torch.as_tensor(features).detach()
    if features.dim() != 2 or features.shape[0] != n or features.shape[1] == 0 or features.is_complex():
        raise ValueError(
            f"`{call}(features)`: expected a real tensor [n, r], one row for each of the n = {n} values and "
            f"r >= 1. Got {_shape(features)}."
        )
    return features


def _metric(call: str, metric: Tensor | None, features: Tensor | None) -> Tensor | None:
    if metric is None:
        return None
    metric = torch.as_tensor(metric).detach()
    if features is None:
        raise ValueError(f"`{call}(metric)`: expected features to go with the metric. Pass `features` [n, r] too.")
    r = features.shape[1]
    if metric.shape != (r, r) or metric.is_complex():
        raise ValueError(
            f"`{call}(metric)`: expected a real tensor [r, r] with r = {r}, the columns of the features. "
            f"Got {_shape(metric)}."
        )
    if not metric.isfinite().all():
        raise ValueError(f"`{call}(metric)`: expected finite numbers. The metric holds NaN or infinity.")
    return _symmetric(call, metric)


def _symmetric(call: str, metric: Tensor) -> Tensor:
    """Metric in float64, the rounding of its own dtype averaged out."""
    rounding = math.sqrt(torch.finfo(metric.dtype).eps) if metric.is_floating_point() else 0.0
    metric = metric.double()
    if torch.equal(metric, metric.T):
        return metric
    if (metric - metric.T).abs().max() > rounding * metric.abs().max():
        raise ValueError(
            f"`{call}(metric)`: expected a symmetric matrix, as a Hessian or Fisher is; it need not be definite. "
            "Pass (metric + metric.T) / 2 if the difference is only rounding."
        )
    return (metric + metric.T) / 2


def _plain(name: object) -> object:
    """An id as a plain int or str where it is one of numpy's."""
    if isinstance(name, bool):
        return name  # True is no row number; the caller refuses it by its type
    if isinstance(name, Integral):
        return int(name)
    return str(name) if isinstance(name, str) else name


def _shape(tensor: Tensor) -> str:
    kind = "complex " if tensor.is_complex() else ""
    return f"a {kind}tensor of shape {list(tensor.shape)}"
