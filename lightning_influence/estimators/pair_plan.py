"""In which order examples are visited, so that each pair meets in memory and hardly any is visited twice.

Every visit costs a forward and a backward pass. What it leaves behind, the example's gradients in compact form, stays
until all of its pairs are done, or until the memory is needed: then it is given up, and visited again later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

WINDOW = 3  # one part in so many of the memory is for examples that are visited together
BATCH = (
    48  # a further batch takes about as long as so many positions: the weights are read, and small products are slow
)


@dataclass(frozen=True)
class Step:
    """One batch.

    Attributes:
        drop: Nodes to give up before the batch.
        load: Nodes of the batch, all of one side.
        pairs: Numbers of the pairs to take once the batch is in memory; both nodes are there then.
    """

    drop: tuple[int, ...]
    load: tuple[int, ...]
    pairs: tuple[int, ...]


@dataclass(frozen=True)
class Examples:
    """What a plan needs to know of the examples, which are nodes 0, 1, ... here, of both sides.

    Attributes:
        sides: Which dataset each node is of.
        lengths: Positions of each.
        bytes: Memory that each takes once visited.
    """

    sides: Sequence[int]
    lengths: Sequence[int]
    bytes: Sequence[int]

    def __len__(self) -> int:
        return len(self.sides)


@dataclass(frozen=True)
class Batches:
    """How large a batch may be.

    Attributes:
        positions: Most positions, padding included; a longer example is a batch of its own.
        examples: Most examples.
    """

    positions: int
    examples: int


def plan(examples: Examples, pairs: Sequence[tuple[int, int]], *, memory: int, batches: Batches) -> list[Step]:
    """Steps after which every pair has met once; the same for the same arguments.

    A heuristic in two parts. First an order of single visits: next comes the node that brings those in memory nearest
    to being done, and what gives up its memory is what will be needed latest, as far as its partners tell. Then visits
    that follow one another are made together, a side and a length at a time, as far as a part of the memory allows.

    Args:
        examples: The nodes.
        pairs: Two nodes each, no pair twice.
        memory: Bytes that may be taken at any time, the batch included.
        batches: Size of a batch.

    Raises:
        ValueError: If two examples of a pair do not fit into the memory at once.
    """
    need = max((examples.bytes[a] + examples.bytes[b] for a, b in pairs), default=0)
    _check_memory(memory, need)
    window = min(memory // WINDOW, memory - need)
    steps: list[Step] = []
    late: list[int] = []  # what a group's later visits drop: within the group its pairs may still need it
    for group in _groups(examples, _Walk(examples, pairs, memory - window).visits(), window):
        closed = [number for visit in group for number in visit.closed]
        drop = [*late, *group[0].dropped]
        steps += _steps(examples, [visit.node for visit in group], closed, drop, batches)
        late = [node for visit in group[1:] for node in visit.dropped]
    return steps


def plan_all(examples: Examples, *, memory: int, batches: Batches) -> list[Step]:
    """Steps for every node of side 0 with every node of side 1; pairs are numbered row by row of side 0.

    Blocks of one side stay in memory while all of the other passes by: of that side which makes fewer visits.

    Raises:
        ValueError: As `plan`.
    """
    sides = [[node for node, side in enumerate(examples.sides) if side == k] for k in (0, 1)]
    largest = [max(examples.bytes[node] for node in side) for side in sides]
    _check_memory(memory, sum(largest))
    windows = [
        max(other, min(memory // WINDOW, memory - own)) for own, other in zip(largest, largest[::-1], strict=True)
    ]
    blocks = [list(_blocks(examples, side, memory - w)) for side, w in zip(sides, windows, strict=True)]
    costs = [len(sides[k]) + len(blocks[k]) * len(sides[1 - k]) for k in (0, 1)]
    kept = 0 if costs[0] <= costs[1] else 1
    place = {node: k for side in sides for k, node in enumerate(side)}
    steps: list[Step] = []
    drop: list[int] = []
    for block in blocks[kept]:
        steps += _steps(examples, block, [], drop, batches)
        drop = []
        for passing in _blocks(examples, sides[1 - kept], windows[kept]):
            rows, columns = (block, passing) if kept == 0 else (passing, block)
            pairs = [place[a] * len(sides[1]) + place[b] for a in rows for b in columns]
            steps += _steps(examples, passing, pairs, drop, batches)
            drop = passing
        drop = [*block, *drop]
    return steps


def _check_memory(memory: int, need: int) -> None:
    if need > memory:
        raise ValueError(
            f"memory_budget={memory}: the gradients of two examples take up to {need} bytes in their compact form; "
            f"expected a budget of at least {need} bytes. Look at fewer components, or at shorter examples."
        )


def _blocks(examples: Examples, nodes: Iterable[int], room: int) -> Iterator[list[int]]:
    """Nodes by length in blocks that fit into the room."""
    block: list[int] = []
    taken = 0
    for node in sorted(nodes, key=lambda n: (-examples.lengths[n], n)):
        if block and taken + examples.bytes[node] > room:
            yield block
            block, taken = [], 0
        block.append(node)
        taken += examples.bytes[node]
    if block:
        yield block


@dataclass(frozen=True)
class Visit:
    """A single visit: what is given up before it, the node, and the pairs that it closes."""

    dropped: list[int]
    node: int
    closed: list[int]


@dataclass
class _Walk:
    """Single visits, and what is in memory while they are made."""

    examples: Examples
    pairs: Sequence[tuple[int, int]]
    memory: int
    partners: list[dict[int, int]] = field(init=False)  # of each node: partner -> number of the pair, while open
    gains: list[int] = field(init=False)  # of each node: open pairs with nodes in memory
    held: dict[int, None] = field(default_factory=dict)
    used: int = 0
    closed: set[int] = field(default_factory=set)  # nodes of the pairs that the last visit closed

    def __post_init__(self) -> None:
        self.partners = [{} for _ in range(len(self.examples))]
        self.gains = [0] * len(self.examples)
        for number, (a, b) in enumerate(self.pairs):
            self.partners[a][b] = self.partners[b][a] = number

    def visits(self) -> Iterator[Visit]:
        waiting = {node for node, partners in enumerate(self.partners) if partners}
        while waiting:
            beside = {other for node in self.held for other in self.partners[node]}
            node = min(beside or waiting, key=self._urgency)
            dropped = self._make_room(node)
            waiting |= {other for other in dropped if self.partners[other]}
            yield Visit(dropped, node, self._meet(node))
            waiting.discard(node)
            waiting -= {other for other in self.closed if not self.partners[other]}

    def _urgency(self, node: int) -> tuple[float, int, int, int]:
        """Smallest first: brings most nodes nearest to being done, begins fewest pairs, longest, first."""
        partners = self.partners[node]
        nearer = sum(1 / len(self.partners[other]) for other in partners if other in self.held)
        done = self.gains[node] == len(partners)
        return (-nearer - done, len(partners) - self.gains[node], -self.examples.lengths[node], node)

    def _worth(self, node: int) -> tuple[float, int]:
        """Smallest is given up first: whose partners have fewest of their own in memory, and so come late."""
        partners = self.partners[node]
        return (sum(self.gains[other] for other in partners) / max(1, len(partners)), node)

    def _make_room(self, node: int) -> list[int]:
        """Give up what is done, and then, as far as needed, what is worth least; the node's partners last."""
        dropped = [other for other in self.held if not self.partners[other]]
        for other in dropped:
            self._release(other)
        size = self.examples.bytes[node]
        while self.used + size > self.memory:
            other = min(self.held, key=lambda held: (held in self.partners[node], self._worth(held)))
            self._release(other)
            dropped.append(other)
        return dropped

    def _meet(self, node: int) -> list[int]:
        """Take the node into memory, and close its pairs with what is there."""
        self.held[node] = None
        self.used += self.examples.bytes[node]
        self.closed = {node}
        done = []
        for partner, number in list(self.partners[node].items()):
            self.gains[partner] += 1
            if partner in self.held:
                done.append(number)
                self.closed.add(partner)
                del self.partners[node][partner], self.partners[partner][node]
                self.gains[node] -= 1
                self.gains[partner] -= 1
        return done

    def _release(self, node: int) -> None:
        del self.held[node]
        self.used -= self.examples.bytes[node]
        for partner in self.partners[node]:
            self.gains[partner] -= 1


def _groups(examples: Examples, visits: Iterable[Visit], room: int) -> Iterator[list[Visit]]:
    """Visits that follow one another and fit into the room; none is of a node that was dropped in its group."""
    group: list[Visit] = []
    taken, dropped = 0, set[int]()
    for visit in visits:
        size = examples.bytes[visit.node]
        if group and (taken + size > room or visit.node in dropped):
            yield group
            group, taken, dropped = [], 0, set()
        group.append(visit)
        taken += size
        dropped.update(visit.dropped)
    if group:
        yield group


def _steps(
    examples: Examples, nodes: Sequence[int], pairs: Sequence[int], drop: Sequence[int], batches: Batches
) -> list[Step]:
    """Nodes as batches, a side at a time; what is dropped goes before them, pairs are taken after the last."""
    loads = [
        load
        for side in sorted({examples.sides[node] for node in nodes})
        for load in _batched(examples, [node for node in nodes if examples.sides[node] == side], batches)
    ]
    steps = [Step((), tuple(load), ()) for load in loads]
    steps[0] = replace(steps[0], drop=tuple(drop))
    steps[-1] = replace(steps[-1], pairs=tuple(pairs))
    return steps


def _batched(examples: Examples, nodes: Iterable[int], batches: Batches) -> list[list[int]]:
    """Nodes, longest first, in the batches that take least time together: padding is weighed against their number."""
    nodes = sorted(nodes, key=lambda n: (-examples.lengths[n], n))
    costs, starts = [0.0], [0]  # of the best batches for the first 0, 1, ... nodes, and where the last of these begins
    for end in range(1, len(nodes) + 1):
        first = max(0, end - batches.examples)
        sizes = {k: examples.lengths[nodes[k]] * (end - k) for k in range(first, end)}
        fitting = [k for k, size in sizes.items() if size <= batches.positions or k == end - 1]
        best = min(fitting, key=lambda k: (costs[k] + sizes[k], k))
        costs.append(costs[best] + sizes[best] + BATCH)
        starts.append(best)
    loads: list[list[int]] = []
    end = len(nodes)
    while end > 0:
        loads.insert(0, nodes[starts[end] : end])
        end = starts[end]
    return loads


def num_visits(steps: Iterable[Step]) -> int:
    """Number of examples that are passed through the model, those that come again included."""
    return sum(len(step.load) for step in steps)
