"""Training again and again without, or on, parts of the data: in several processes, and going on where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_influence.estimators.factors import Id, few

Train: TypeAlias = Callable[[tuple[Any, ...], int], Any]
Measure: TypeAlias = Callable[[Any], Any]
Job: TypeAlias = tuple[tuple[Id, ...], int]  # ids to train on, and the seed

FORMAT = 1


@dataclass(frozen=True)
class Retraining:
    """How models are trained on parts of the data, and where the losses go.

    With several workers the functions are sent to fresh processes (spawn): they must be defined at the top of a module,
    or be objects of a class that is, and the script that calls needs ``if __name__ == "__main__":``.

    Attributes:
        train: ``train(ids, seed)`` trains on the examples of these ids alone and returns the loss of the target, or a
            loss for each of m target examples (numbers, list or tensor); or a model, if ``measure`` is given. The seed
            must be all that is random.
        measure: ``measure(model)`` gives the loss or losses of what ``train`` returned.
        path: File of one JSON line for each training, written as they end. A run that was killed goes on there, and
            one with more groups or seeds trains the missing ones only. None: nothing is kept.
        settings: Whatever a result depends on (data, model, epochs), plain values; written to the head of the file,
            which refuses others.
        workers: Number of processes, each with one thread; 1: this one, with the threads that it has.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If an argument does not fit.
    """

    train: Train
    measure: Measure | None = None
    path: str | Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("train", "measure"):
            given = getattr(self, name)
            if not callable(given) and (name == "train" or given is not None):
                raise ValueError(f"`Retraining({name}={given!r})`: expected a function.")
        if type(self.workers) is not int or self.workers < 1:
            raise ValueError(f"`Retraining(workers={self.workers!r})`: expected an int >= 1.")
        if self.workers > 1:
            self._check_portable()

    def losses(self, subsets: Sequence[Iterable[Id]], seeds: int | Sequence[int] = 3) -> Tensor:
        """Losses after training on each subset with each seed.

        Args:
            subsets: Ids to train on.
            seeds: Seeds, or their number, for 0, 1, ...

        Returns:
            Float64 [subsets, seeds, m], with m = 1 if ``train`` or ``measure`` gives a single loss.

        Raises:
            ValueError: As `run`, or if a subset or the seeds are empty or repeat.
        """
        numbers = seed_numbers("Retraining.losses", seeds)
        found = self.run([(plain_ids(subset), seed) for subset in subsets for seed in numbers])
        return found.reshape(-1, len(numbers), found.shape[-1])

    def run(self, jobs: Sequence[Job]) -> Tensor:
        """Losses of single trainings, float64 [jobs, m]; those that are in the file already are not trained again.

        Raises:
            ValueError: If there is no job, a job has no ids or repeats one, the file is of other settings, or a loss is
                not finite or of another number than those before (the job is named).
        """
        keys = [_key(ids, seed) for ids, seed in _checked(jobs)]
        results = _Results(self.path, self.settings)
        missing: dict[str, Job] = {}
        for key, job in zip(keys, jobs, strict=True):
            if key not in results.losses:
                missing.setdefault(key, job)
        with tqdm(total=len(missing), desc="retraining", delay=3, leave=False, disable=not self.progress) as bar:
            for key, losses in self._trained(missing):
                results.add(key, missing[key], losses)
                bar.update()
        return torch.tensor([results.losses[key] for key in keys], dtype=torch.float64)

    def _trained(self, jobs: Mapping[str, Job]) -> Iterator[tuple[str, Any]]:
        if self.workers == 1 or len(jobs) < 2:
            for key, job in jobs.items():
                yield key, _train(self.train, self.measure, job)
            return
        workers = min(self.workers, len(jobs))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _start, (self.train, self.measure)) as pool:
            futures: dict[Future[list[float]], str] = {pool.submit(_work, job): key for key, job in jobs.items()}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what is trained now ends, nothing else starts
                raise

    def _check_portable(self) -> None:
        try:
            ForkingPickler.dumps((self.train, self.measure))
        except Exception as error:
            raise ValueError(
                f"`Retraining(workers={self.workers})`: `train` and `measure` cannot be sent to other processes "
                f"({error}). Expected functions from the top of a module, or objects of a class there; or workers=1."
            ) from error


def seed_numbers(call: str, seeds: int | Sequence[int]) -> list[int]:
    """Seeds, of a number of them 0, 1, ...

    Raises:
        ValueError: If there is none, or they repeat or are no ints.
    """
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or len(set(numbers)) < len(numbers) or any(type(number) is not int for number in numbers):
        raise ValueError(f"`{call}(seeds={seeds!r})`: expected an int >= 1, or different ints.")
    return numbers


def plain_ids(ids: Iterable[Id]) -> tuple[Id, ...]:
    """Ids as ints or strs, of a tensor or an array too."""
    return tuple(name if isinstance(name, str) else int(name) for name in ids)


class _Results:
    """Losses by job, in memory and in a file that only grows; a line that was cut off when a run was killed is dropped.

    The file is ours alone while we run: two runs at a time would train the same jobs.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.losses: dict[str, list[float]] = {}
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        head = {"format": FORMAT, "settings": json.loads(json.dumps(dict(settings)))}
        if self.path.is_dir():
            raise ValueError(
                f"`Retraining(path={str(self.path)!r})`: that is a folder. Expected the path of a file, such as "
                "losses.jsonl."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._whole_lines()
        if not lines:
            self._append(head)
        elif json.loads(lines[0]) != head:
            raise ValueError(
                f"`Retraining(path={str(self.path)!r})`: the file is of other trainings: {lines[0].strip()}, expected "
                f"{json.dumps(head)}. Take another path, or remove the file."
            )
        for line in map(json.loads, lines[1:]):
            self.losses[line["key"]] = line["losses"]

    def add(self, key: str, job: Job, found: Any) -> None:
        losses = [float(loss) for loss in found]
        ids, seed = job
        what = f"training on {len(ids)} examples ({few(list(ids))}) with seed {seed}"
        if not losses or not all(map(math.isfinite, losses)):
            raise ValueError(f"`Retraining`: {what} gave {losses[:8]}; expected finite losses.")
        known = next(iter(self.losses.values()), losses)
        if len(known) != len(losses):
            raise ValueError(f"`Retraining`: {what} gave {len(losses)} losses, others {len(known)}; expected as many.")
        self.losses[key] = losses
        if self.path is not None:
            self._append({"key": key, "examples": len(ids), "seed": seed, "losses": losses})

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _whole_lines(self) -> list[str]:
        assert self.path is not None
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        return whole.splitlines(keepends=True)


def _checked(jobs: Sequence[Job]) -> Sequence[Job]:
    if not jobs:
        raise ValueError("`Retraining`: expected at least one set of ids to train on.")
    for number, (ids, _) in enumerate(jobs):
        if not ids or len(set(ids)) < len(ids):
            raise ValueError(f"`Retraining`: expected ids to train on, each once; set {number} has {few(list(ids))}.")
    return jobs


def _key(ids: Iterable[Id], seed: int) -> str:
    """Of the set of ids: their order is left to ``train``'s seed, and kept as it was given."""
    return hashlib.sha256(json.dumps([sorted(ids, key=str), seed]).encode()).hexdigest()[:32]


def _train(train: Train, measure: Measure | None, job: Job) -> list[float]:
    found = train(*job)
    losses = found if measure is None else measure(found)
    if isinstance(losses, torch.nn.Module):
        raise ValueError("`Retraining(train)`: returned a model; expected losses, or `measure` to take them from it.")
    if losses is None:
        name = "train" if measure is None else "measure"
        raise ValueError(f"`Retraining({name})`: returned None; expected a loss, or one for each target example.")
    return torch.as_tensor(losses, dtype=torch.float64).detach().reshape(-1).tolist()


_own: list[tuple[Train, Measure | None]] = []  # of a worker's process: what it was started with


def _start(train: Train, measure: Measure | None) -> None:
    torch.set_num_threads(1)
    _own[:] = [(train, measure)]


def _work(job: Job) -> list[float]:
    return _train(*_own[0], job)
