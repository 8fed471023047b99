"""Progress of a recording, shown where the Trainer shows its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from tqdm.auto import tqdm

Advance = Callable[[int], None]


@contextmanager
def progress(trainer: Trainer, total: int, description: str) -> Iterator[Advance]:
    """Show a second bar below the Trainer's own and yield the function that advances it by some steps.

    A bar of our own inside a live Rich display would garble both, so a Rich bar gets one more task and a tqdm bar
    one more line. Without a bar, with a disabled one, and on ranks other than 0 nothing is shown.
    """
    bar: Any = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero or getattr(bar, "is_disabled", True):
        yield lambda _: None
    elif hasattr(getattr(bar, "progress", None), "add_task"):  # by what it has: Lightning has two namespaces
        yield from _on_rich(bar, total, description)
    elif hasattr(bar, "process_position"):
        yield from _on_tqdm(total, description, position=2 * bar.process_position + 1)
    else:
        yield from _on_tqdm(total, description, position=None)


def _on_rich(bar: Any, total: int, description: str) -> Iterator[Advance]:
    display = bar.progress
    task = display.add_task(description.replace("[", "\\["), total=total)  # brackets are markup there

    def advance(steps: int) -> None:
        display.update(task, advance=steps)
        bar.refresh()

    try:
        yield advance
    finally:
        display.remove_task(task)
        bar.refresh()


def _on_tqdm(total: int, description: str, position: int | None) -> Iterator[Advance]:
    with tqdm(
        desc=description, total=total, position=position, leave=False, dynamic_ncols=True, file=sys.stdout
    ) as line:

        def advance(steps: int) -> None:
            line.update(steps)

        yield advance
