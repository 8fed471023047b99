"""Component-wise inner products for pairs of examples, at about the cost of passing each example once ([SP] A.2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.capture import GradientCapture, LayerRecord
from lightning_influence.capture.batches import to_device
from lightning_influence.estimators.compact import Compactor, Kept, shapes_of
from lightning_influence.estimators.component_dots import ComponentDots, read_columns
from lightning_influence.estimators.pair_inputs import Side, positions
from lightning_influence.estimators.pair_plan import Batches, Examples, Step, num_visits, plan, plan_all
from lightning_influence.estimators.products import products
from lightning_influence.store import RowWriter, Store

Advance: TypeAlias = Callable[[int], object]
Bar: TypeAlias = Callable[[int], AbstractContextManager[Advance]]  # of a number of examples
SHARD = 64  # pairs in one file of a store: what a kill can cost


@dataclass(frozen=True)
class PairDots:
    """Takes the inner products of pairs of queries and training examples, component by component.

    Attributes:
        capture: The model and its components.
        sides: Queries and training examples.
        pairs: (row of a query, row of a training example); None for all.
        memory: Bytes for gradients that are kept.
        batches: How large a batch may be.
        dtype: To which what is kept is rounded; None for not at all.
    """

    capture: GradientCapture
    sides: tuple[Side, Side]
    pairs: Sequence[tuple[int, int]] | None
    memory: int
    batches: Batches
    dtype: torch.dtype | None = None

    def run(self, formula: str, store: Store | None, name: str, bar: Bar) -> ComponentDots:
        """Everything; with a store, going on where an earlier run stopped, and ending with the same bytes.

        Raises:
            ValueError: If the memory does not hold two examples, or a loss is not finite (ids are named).
            StoreError: If the store was begun with other pairs, or another plan for them.
        """
        q, n = (side.loader.num_examples for side in self.sides)
        compactor, steps = self._planned()
        numbers = [number for step in steps for number in step.pairs]
        visited = list(dict.fromkeys(node for step in steps for node in step.load))
        kept = {"dtype": str(self.dtype)}
        tables = _tables(store, name, kept, numbers, [v for v in visited if v < q], [v - q for v in visited if v >= q])
        work = _Work(self, compactor, q, n, tables)
        with bar(num_visits(steps)) as advance:
            work.run(steps, advance)
        return self._labelled(formula, store, name, tables)

    def _planned(self) -> tuple[Compactor, list[Step]]:
        lengths = [length for side in self.sides for length in side.lengths()]
        q, n = (side.loader.num_examples for side in self.sides)
        count = q * n if self.pairs is None else len(self.pairs)
        compactor = self._compactor(lengths, (count + q + n) / (q + n))
        itemsize = max(p.element_size() for p in self.capture.model.parameters() if p.is_floating_point())
        sizes = [compactor.bytes(length, max(4, itemsize)) for length in lengths]
        examples = Examples([0] * q + [1] * n, lengths, sizes)
        if self.pairs is None:
            return compactor, plan_all(examples, memory=self.memory, batches=self.batches)
        return compactor, plan(examples, [(a, q + b) for a, b in self.pairs], memory=self.memory, batches=self.batches)

    def _compactor(self, lengths: Sequence[int], pairs: float) -> Compactor:
        """Forms of the components, as one example shows them."""
        with self.capture:
            records = list(self.records(0, [0]))
        _, batch = self.sides[0].batch([0])
        mask = self.sides[0].loss.position_mask(batch)
        padded = positions(batch) if mask is None else mask.shape[1]
        shapes = shapes_of(records, lengths[0], padded)
        return Compactor.of(shapes, sum(lengths) / len(lengths), pairs, self.dtype)

    def records(self, side: int, rows: Sequence[int]) -> Iterator[LayerRecord]:
        """Records of some rows of a side; the capture is active."""
        data, loss = self.sides[side], self.sides[side].loss
        ids, batch = data.batch(rows)
        batch = to_device(batch, next(self.capture.model.parameters()).device)
        layout = loss.position_mask(batch), loss.batch_size(batch)
        return self.capture.record(batch, loss.losses, ids, *layout, data.loader.what)

    def _labelled(self, formula: str, store: Store | None, name: str, tables: Sequence[_Table]) -> ComponentDots:
        dots, query_squares, train_squares = (table.values() for table in tables)
        left, right = self.sides
        n = right.loader.num_examples
        everything = torch.cartesian_prod(torch.arange(left.loader.num_examples), torch.arange(n))
        found = ComponentDots(
            components=tuple(c.name for c in self.capture.components),
            sizes=tuple(c.numel for c in self.capture.components),
            query_ids=tuple(left.loader.ids),
            train_ids=tuple(right.loader.ids),
            pairs=everything if self.pairs is None else torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2),
            dots=dots,
            query_squares=query_squares,
            train_squares=train_squares,
            formula=formula,
            reduction=left.loss.reduction,
        )
        if store is not None:
            found.save_labels(store, name)
        return found


class _Table:
    """Rows [c] by number, in a store or in memory."""

    def __init__(self, writer: RowWriter | None, store: Store | None, name: str, numbers: Sequence[int]) -> None:
        self._writer = writer
        self._store = store
        self._name = name
        self._rows: dict[int, Tensor] = {}
        self.missing = set(numbers if writer is None else writer.missing_ids)

    def write(self, number: int, row: Tensor) -> None:
        if number in self.missing:
            self.missing.discard(number)
            if self._writer is None:
                self._rows[number] = row
            else:
                self._writer.write([number], {"dots": row.unsqueeze(0)})

    def values(self) -> Tensor:
        """[c, rows], by number."""
        if self._store is not None:
            return read_columns(self._store, self._name)
        return torch.stack([self._rows[k] for k in range(len(self._rows))], dim=1)


def _tables(
    store: Store | None, name: str, settings: dict[str, str], *numbers: Sequence[int]
) -> tuple[_Table, _Table, _Table]:
    """Of the pairs, the queries and the training examples; the rows of each in the order in which they come."""
    names = [f"{name}.{part}" for part in ("pairs", "queries", "train")]
    writers = [
        None if store is None else store.row_writer(k, ids, SHARD, settings)
        for k, ids in zip(names, numbers, strict=True)
    ]
    pairs, queries, train = (_Table(w, store, k, ids) for w, k, ids in zip(writers, names, numbers, strict=True))
    return pairs, queries, train


@dataclass
class _Work:
    """A plan being carried out.

    Steps whose numbers are all there, those of an earlier run, are passed over; a batch of theirs that a later step
    needs is passed again as it was then, so that its numbers are the same to the last bit.
    """

    job: PairDots
    compactor: Compactor
    q: int
    n: int
    tables: tuple[_Table, _Table, _Table]  # of pairs, queries, training examples
    planned: dict[int, Step] = field(default_factory=dict)  # nodes that the plan holds now: the step that loaded each
    held: dict[int, Kept] = field(default_factory=dict)
    lone: list[int] = field(default_factory=list)  # nodes whose squares are to be taken before they are given up

    def run(self, steps: Sequence[Step], advance: Advance) -> None:
        begun = False
        with self.job.capture:
            for step in steps:
                if not set(self.lone).isdisjoint(step.drop):
                    self._take_squares()
                for node in step.drop:
                    del self.planned[node]
                    self.held.pop(node, None)
                self.planned |= dict.fromkeys(step.load, step)
                begun = begun or self._lacks(step)
                if begun:
                    self._load(step)
                    self._take(step)
                advance(len(step.load))
            self._take_squares()

    def _lacks(self, step: Step) -> bool:
        return any(map(self._lacks_square, step.load)) or not self.tables[0].missing.isdisjoint(step.pairs)

    def _load(self, step: Step) -> None:
        """Pass a batch, and keep what the plan holds of it."""
        rows = [k for k, node in enumerate(step.load) if self.planned.get(node) is step]
        side = 0 if step.load[0] < self.q else 1
        records = self.job.records(side, [node - side * self.q for node in step.load])
        self.held |= dict(zip((step.load[k] for k in rows), self.compactor.take(records, rows), strict=True))
        self.lone += [node for k, node in enumerate(step.load) if k in rows and self._lacks_square(node)]
        taken = sum(kept.bytes for kept in self.held.values())
        if taken > self.job.memory:
            warnings.warn(
                f"memory_budget={self.job.memory}: {len(self.held)} examples take {taken} bytes, more than the first "
                "one let foresee. Give a smaller budget if memory is short.",
                stacklevel=2,
            )

    def _take_squares(self) -> None:
        """Of several examples at once, so that every thread has one."""
        squares = products([(self.held[node], self.held[node]) for node in self.lone]).cpu() if self.lone else ()
        for node, values in zip(self.lone, squares, strict=True):
            table, number = self._square(node)
            table.write(number, values)
        self.lone.clear()

    def _take(self, step: Step) -> None:
        if step.pairs:
            self._take_squares()
        for start in range(0, len(step.pairs), SHARD):
            part = sorted(step.pairs[start : start + SHARD], key=self._nodes)
            if self.tables[0].missing.isdisjoint(part):
                continue  # else all of it: a product's last bit may depend on those that it is taken with
            pairs = [(self._kept(left), self._kept(right)) for left, right in map(self._nodes, part)]
            for number, values in zip(part, products(pairs).cpu(), strict=True):
                self.tables[0].write(number, values)

    def _kept(self, node: int) -> Kept:
        if node not in self.held:  # its batch was passed over
            self._load(self.planned[node])
        return self.held[node]

    def _lacks_square(self, node: int) -> bool:
        table, number = self._square(node)
        return number in table.missing

    def _square(self, node: int) -> tuple[_Table, int]:
        return (self.tables[1], node) if node < self.q else (self.tables[2], node - self.q)

    def _nodes(self, number: int) -> tuple[int, int]:
        a, b = divmod(number, self.n) if self.job.pairs is None else self.job.pairs[number]
        return a, self.q + b


@contextmanager
def tqdm_bar(total: int, label: str, progress: bool) -> Iterator[Advance]:
    """A bar with the time that remains, on what takes more than a few seconds."""
    with tqdm(total=total, desc=label, delay=3, unit="example", leave=False, disable=not progress) as bar:
        yield bar.update
