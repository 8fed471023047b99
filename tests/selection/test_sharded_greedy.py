"""Two processes with a part of the pool each make the picks of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_influence.selection import InteractionGreedy, greedy_search, select_sharded
from tests.selection.cases import clustered_pool

N, CUT, BUDGET = 80, 31, 60


def share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    greedy_search._FEWEST_CANDIDATES = 16
    pool = clustered_pool(N, 7, torch.float32)
    part = slice(0, CUT) if rank == 0 else slice(CUT, N)
    found = select_sharded(
        pool.values[part], pool.features[part], pool.metric, budget=BUDGET, ids=torch.tensor(pool.ids)[part]
    )
    whole = select_sharded(pool.values[part], pool.features[part], budget=0.5)
    errors = []
    for values, ids in (
        (pool.values[part] / (1 - rank), None),
        (pool.values[part], range(CUT if rank == 0 else N - CUT)),
    ):
        try:
            select_sharded(values, pool.features[part], budget=1, ids=ids)
        except ValueError as error:
            errors.append(str(error))
    Path(folder, f"{rank}.json").write_text(json.dumps([found.to_dict(), whole.to_dict(), errors]))
    dist.destroy_process_group()


def test_two_processes_make_the_picks_of_one(tmp_path: Path) -> None:
    mp.start_processes(share, (str(tmp_path),), nprocs=2, start_method="fork")
    (found, whole, errors), (again, whole_again, more_errors) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    assert (found, whole) == (again, whole_again)
    pool = clustered_pool(N, 7, torch.float32)
    one = InteractionGreedy().select(pool.values, pool.features, pool.metric, budget=BUDGET, ids=pool.ids)
    assert found["ids"] == list(one.ids)
    assert found["positions"] == list(one.positions)
    torch.testing.assert_close(torch.tensor(found["gains"]).double(), one.gains, rtol=1e-6, atol=1e-6)
    assert whole["ids"] == list(InteractionGreedy().select(pool.values, pool.features, budget=0.5).ids)
    assert errors == [
        "`select_sharded`: the arguments of rank 1 are unfit; its own error says why.",
        "`select_sharded(ids)`: expected ids that are unique in the whole pool, not only on each rank.",
    ]
    assert "expected finite numbers" in more_errors[0]
    assert more_errors[1] == errors[1]


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"Call `torch.distributed.init_process_group` first"):
        select_sharded(torch.ones(2), torch.ones(2, 2), budget=1)
