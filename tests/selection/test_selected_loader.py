from __future__ import annotations

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_influence.selection.selected_loader import selected_loader, subset


def data(n: int = 8) -> TensorDataset:
    return TensorDataset(torch.arange(n))


def collate(rows):
    return [row[0] for row in rows]


def start(worker):
    """A worker_init_fn."""


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one processor
def test_everything_the_user_set_is_kept():
    generator = torch.Generator()
    settings = {
        "batch_size": 3,
        "num_workers": 2,
        "collate_fn": collate,
        "pin_memory": False,
        "drop_last": True,
        "timeout": 7,
        "worker_init_fn": start,
        "generator": generator,
        "prefetch_factor": 4,
        "persistent_workers": True,
    }
    users = DataLoader(data(), shuffle=True, **settings)
    chosen = selected_loader(users, [1, 5, 6, 7])
    assert {name: getattr(chosen, name) for name in settings} == settings
    assert isinstance(chosen.sampler, RandomSampler)
    assert len(chosen) == 1
    assert users.dataset is not chosen.dataset


@pytest.mark.parametrize("shuffle", [True, False])
def test_serves_the_selected_rows(shuffle):
    chosen = selected_loader(DataLoader(data(), batch_size=2, shuffle=shuffle), [6, 1, 3])
    seen = torch.cat([batch[0] for batch in chosen]).tolist()
    assert sorted(seen) == [1, 3, 6]
    assert shuffle or seen == [6, 1, 3]


@pytest.mark.parametrize("kind", [SequentialSampler, RandomSampler])
def test_a_batch_sampler_of_torch_is_served_as_the_arguments_that_it_stands_for(kind):
    users = DataLoader(data(), batch_sampler=BatchSampler(kind(data()), 2, True))
    loader = selected_loader(users, [6, 1, 3])
    seen = [batch[0].tolist() for batch in loader]
    assert [len(batch) for batch in seen] == [2]
    assert set(seen[0]) <= {6, 1, 3}
    assert (loader.batch_size, loader.drop_last, type(loader.sampler)) == (2, True, kind)
    with pytest.raises(ValueError, match="1 selected examples give no batch with batch_size=2 and drop_last=True"):
        selected_loader(users, [1])


def test_a_sampler_keeps_its_generator():
    users = DataLoader(data(), sampler=RandomSampler(data(), generator=torch.Generator().manual_seed(2)))
    orders = []
    for _ in range(2):
        users.sampler.generator.manual_seed(2)
        torch.rand(3)  # other global numbers
        orders.append([int(batch[0]) for batch in selected_loader(users, range(8))])
    assert orders[0] == orders[1]


class Sampling(BatchSampler):
    """Somebody's own batches."""


class Loading(DataLoader):
    """Somebody's own loader."""


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (Loading(data()), "the loader is a Loading"),
        (DataLoader(data(), batch_sampler=Sampling(range(8), 2, False)), "has a Sampling as batch_sampler"),
        (DataLoader(data(), batch_size=None), "has no batches as batch_sampler"),
        (DataLoader(data(), sampler=WeightedRandomSampler([1.0] * 8, 8)), "has a WeightedRandomSampler of its own"),
        (DataLoader(data(), sampler=RandomSampler(data(), num_samples=4)), "has a RandomSampler of its own"),
        (DataLoader(data(), sampler=RandomSampler(data(), replacement=True)), "has a RandomSampler of its own"),
        (DataLoader(data(), sampler=SequentialSampler(range(4))), "has a SequentialSampler of its own"),
    ],
)
def test_loaders_that_cannot_be_rebuilt_are_refused(loader, message):
    with pytest.raises(ValueError, match=f"{message}.*Pass `loader_fn=`"):
        selected_loader(loader, [1])


def test_weights_are_how_often_a_row_is_drawn():
    users = DataLoader(data(), batch_size=3, collate_fn=list, generator=torch.Generator().manual_seed(1))
    loader = selected_loader(users, [2, 5, 7], [1.0, 0.0, 3.0])
    drawn = [int(row[0]) for _ in range(400) for batch in loader for row in batch]
    assert len(drawn) == 1200
    assert (loader.batch_size, loader.collate_fn) == (3, list)
    counts = [drawn.count(k) for k in (2, 5, 7)]
    assert counts[1] == 0
    assert abs(counts[0] - 300) < 5 * (1200 * 0.25 * 0.75) ** 0.5  # five standard deviations
    again = selected_loader(
        DataLoader(data(), 3, generator=torch.Generator().manual_seed(1)), [2, 5, 7], [1.0, 0.0, 3.0]
    )
    assert [int(x) for batch in again for x in batch[0].flatten()[:3]] == drawn[:3]


def test_a_selection_without_a_batch_is_refused():
    users = DataLoader(data(), batch_size=4, drop_last=True)
    with pytest.raises(ValueError, match="3 selected examples give no batch with batch_size=4 and drop_last=True"):
        selected_loader(users, [0, 1, 2])
    assert len(selected_loader(users, [0, 1, 2, 3])) == 1


def test_hugging_face_datasets_stay_what_they_are():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": list(range(5))})
    assert subset(rows, [4, 0])["x"] == [4, 0]
    assert isinstance(subset(rows, [4, 0]), datasets.Dataset)
    assert isinstance(subset(data(), [1]), Subset)
