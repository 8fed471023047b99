"""Which loaders have rows to choose from."""

from __future__ import annotations

import pytest
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lightning_influence.datamodule import DataSelector
from lightning_influence.datamodule.pool import check_single, check_size, checked_pool, pool_size
from lightning_influence.datamodule.warm_up import WarmUp
from lightning_influence.selection import TokenBudget
from tests.datamodule.test_data_selector import NO_VALIDATION
from tests.datamodule.test_refusals import Stream
from tests.datamodule.toys import Net, fit, numbered


def test_a_map_style_dataset():
    loader = DataLoader(numbered(9), batch_size=2)
    assert checked_pool(loader) is loader
    assert pool_size(loader) == 9


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([DataLoader(numbered())], r"gives a list; expected one DataLoader.* `ConcatDataset\(\[...\]\)`, behind one"),
        ({"a": 1, "b": 2}, r"gives a dict \('a', 'b'\); expected one DataLoader"),
        (CombinedLoader({"a": [1]}), r"gives a CombinedLoader \('a'\); .* give that one alone to a DataSelector"),
        (DataLoader(Stream()), "Stream is iterable and has no positions.*keep its rows first"),
    ],
)
def test_no_positions(loader, message):
    assert pool_size(loader) is None
    with pytest.raises(ValueError, match=message):
        checked_pool(loader)


def test_sizes_are_checked_where_they_are_known():
    loader = DataLoader(numbered(9))
    check_size(loader, 9, WarmUp(9, 0))
    check_size(loader, TokenBudget(99), None)
    for other, what in ((DataLoader(Stream()), "Stream is iterable"), ({"a": loader}, r"a dict \('a'\)")):
        check_size(other, None, WarmUp(99, 0))
        with pytest.warns(UserWarning, match=rf"{what}.*served it as it is, but `select\(model\)` will refuse it"):
            check_size(other, 99, WarmUp(99, 0))
    for budget, warmup in ((10, None), (None, WarmUp(10, 0)), (0.01, None)):
        with pytest.raises(ValueError, match=r"The pool has 9 rows|Of a pool of 9 rows"):
            check_size(loader, budget, warmup)


@pytest.mark.parametrize("argument", ["data", "val"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": DataLoader(numbered())}, r"got a dict \('a'\); expected one DataLoader or dataset\. To choose from all"),
        ({"train": numbered()}, r"got a dict \('train'\); .* Of a dictionary of datasets, such as splits, pass one"),
        ([DataLoader(numbered())], r"got a list; expected one DataLoader or dataset\. To choose from all of them"),
        (CombinedLoader([DataLoader(numbered())]), "got a CombinedLoader; expected one"),
    ],
)
def test_several_loaders_are_refused_at_once(argument, given, message):
    with pytest.raises(ValueError, match=rf"`DataSelector\({argument}=...\)`: {message}"):
        DataSelector(**{"data": numbered(), argument: given})
    check_single("data", [(1, 2), (3, 4)])  # a list of rows


@NO_VALIDATION
@pytest.mark.filterwarnings("ignore:.*Stream is iterable:UserWarning")
def test_a_stream_is_served_and_nothing_is_chosen_from_it():
    selector, model = DataSelector(DataLoader(Stream(), batch_size=4), numbered(6), budget=3), Net()
    assert fit(selector, model).seen == list(range(24))
    with pytest.raises(ValueError, match="Stream is iterable"):
        selector.select(model)
    with pytest.raises(ValueError, match="Stream is iterable"):
        fit(DataSelector(DataLoader(Stream(), batch_size=4), warmup=3))
