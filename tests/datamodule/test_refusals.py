"""What a DataSelector refuses, and when: before the warm-up where it can be known then."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.datamodule import DataSelector
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.selection import Constraints, Newton
from tests.datamodule.test_data_selector import NO_VALIDATION, select
from tests.datamodule.toys import Data, Net, TrainOnly, fit, numbered, trainer


def test_unseeded_split_is_noticed():
    selector = DataSelector(Data(seeded=False), budget=3)
    select(selector)
    with pytest.raises(ValueError, match=r"is not the pool the selection was made in.*seed `random_split`"):
        fit(selector)


def test_positions_outside_the_pool():
    with pytest.raises(ValueError, match=r"position 16 lies outside the training data, which has 16 examples"):
        fit(DataSelector(Data(), selection=[3, 16]))


@pytest.mark.parametrize("ids", [[], [1, 1], [-1]])
def test_ids_that_are_none(ids):
    with pytest.raises(ValueError, match="expected at least one position, none twice, all >= 0"):
        DataSelector(Data()).select(ids=ids)


class Stream(IterableDataset):
    def __iter__(self):
        yield from numbered()


@NO_VALIDATION
@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ({"a": DataLoader(numbered())}, r"gives a dict \('a'\); expected one DataLoader"),
        ([DataLoader(numbered())], "gives a list; expected one DataLoader"),
        (DataLoader(Stream(), batch_size=2), "Stream is iterable and has no positions"),
        (DataLoader(numbered(), batch_size=None), "Pass `loader_fn=`"),
    ],
)
def test_loaders_without_positions(loader, message):
    with pytest.raises(ValueError, match=message):
        fit(DataSelector(TrainOnly(loader), selection=[0]))


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "all"])
def test_budget_is_checked_at_once(budget):
    with pytest.raises(ValueError, match=r"`DataSelector\(budget=.*\)`: expected an int >= 1 or a fraction"):
        DataSelector(Data(), budget=budget)


@NO_VALIDATION
@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (Constraints(exclude=[99]), "exclude names rows that are not in the pool: id 99"),
        (Constraints(sources=["a"] * 24, min_per_source={"b": 1}), "b"),
        (Constraints(must_include=[0, 1, 2, 3], duplicates="first"), "4"),
    ],
)
@pytest.mark.parametrize("part", [None, 0.5])
def test_constraints_that_no_choice_can_meet_are_refused_before_the_warm_up(constraints, message, part):
    selector = DataSelector(TrainOnly(DataLoader(numbered(), 2)), budget=3, constraints=constraints, warmup=part)
    with pytest.raises(ValueError, match=rf"`DataSelector\(constraints\)`.*{message}"):
        trainer().fit(Net(), datamodule=selector)
    with pytest.raises(ValueError, match=rf"`DataSelector\(constraints\)`.*{message}"):
        DataSelector(numbered(), budget=3, constraints=constraints, warmup=part)


@NO_VALIDATION
def test_a_budget_above_the_pool_is_refused_before_the_warm_up():
    message = r"`DataSelector\(budget={}\)`: .*The pool has {} rows"
    for pool in (numbered(), DataLoader(numbered(), batch_size=4)):
        with pytest.raises(ValueError, match=message.format(25, 24)):
            DataSelector(pool, numbered(6), budget=25)
    model, selector = Net(), DataSelector(Data(), budget=17)  # how many there are is known after setup
    with pytest.raises(ValueError, match=message.format(17, 16)):
        fit(selector, model)
    assert model.seen == []
    several = DataSelector(TrainOnly({"a": DataLoader(numbered())}), budget=99)
    with pytest.warns(UserWarning, match=r"a dict \('a'\); .* but `select\(model\)` will refuse it"):
        fit(several, Unasked())
    with pytest.raises(ValueError, match=r"a dict \('a'\); expected one DataLoader"):
        several.select(Net())


class Unasked(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "the data is empty; expected at least one example"),
        (DataLoader([]), "the data is empty; expected at least one example"),
        (Stream(), "Expected a map-style dataset"),
    ],
)
def test_targets_without_rows_are_refused_at_once(targets, message):
    with pytest.raises(ValueError, match=rf"`DataSelector\(targets={type(targets).__name__}\)`: .*{message}"):
        DataSelector(Data(), targets, budget=3)


def test_what_select_needs():
    selector = DataSelector(Data())
    with pytest.raises(ValueError, match="expected a model, or `ids=`, and not both"):
        selector.select()
    with pytest.raises(ValueError, match=r"`DataSelector\(budget=None\)`: expected an int >= 1"):
        selector.select(Net())
    plain = DataSelector(numbered(), budget=2)
    with pytest.raises(ValueError, match=r"`DataSelector\(targets=None\)`: the data has no single validation loader"):
        plain.select(Net())
    with pytest.raises(ValueError, match=r"`DataSelector\(val=...\)`: the datamodule has its own"):
        DataSelector(Data(), val=numbered())


def test_a_second_fit_with_the_same_trainer_trains_nothing():
    """A Trainer counts epochs across fits: a known limit, said in the documentation."""
    running, model = trainer(), Net()
    selector = DataSelector(Data())
    running.fit(model, datamodule=selector)
    selector.select(ids=[1])
    model.seen.clear()
    running.fit(model, datamodule=selector)
    assert model.seen == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        '{"version": 1}',
        '{"positions": 3, "selection": null, "fingerprint": ""}',
        '{"positions": [3, 3], "selection": null, "fingerprint": ""}',
        '{"positions": [3], "selection": {}, "fingerprint": ""}',
        '{"positions": [3], "selection": [1], "fingerprint": ""}',
        '{"id": 3, "rank": 0}\n{"id": 5, "rank": 1}\n',
    ],
)
def test_a_file_that_save_has_not_written(text, tmp_path):
    file = tmp_path / "selection.json"
    file.write_text(text)
    model = Net()
    told = r"\('?.*selection.json'\)`: expected a file written by `save`; what this one holds is no selection of"
    with pytest.raises(ValueError, match=r"`DataSelector" + told.replace("'?", "selection='")):
        fit(DataSelector(Data(), selection=str(file)), model)
    with pytest.raises(ValueError, match=r"`DataSelector\.load" + told):
        DataSelector(Data()).load(file)
    assert model.seen == []


def test_a_selection_file_that_is_not_there_when_a_fit_begins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, selector = Net(), DataSelector(Data(), selection="nope.json")  # it may be written until then
    told = rf"`DataSelector\(selection='nope.json'\)`: expected a file .*, and there is none at {tmp_path}"
    with pytest.raises(ValueError, match=told + r"/nope\.json now.* Write it before this fit, with `selector\.save"):
        fit(selector, model)
    assert model.seen == []
    other = DataSelector(Data())
    other.select(ids=[2, 5])
    other.save("nope.json")
    fit(selector, model)
    assert selector.selected_ids == [2, 5]


def test_a_selection_file_that_is_no_text(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02\xff")
    for path in (tmp_path, tmp_path / "weights.pt"):
        with pytest.raises(ValueError, match=rf"selection='{path}'\)`: .*this one cannot be read as text.* Check the"):
            fit(DataSelector(Data(), selection=path))


def test_more_landmarks_than_rows_are_refused_before_any_pass(monkeypatch):
    selector = DataSelector(Data(), budget=3, rule=Newton(landmarks=17))
    monkeypatch.setattr(InfluenceFunction, "fit", lambda *_: pytest.fail("a pass over the pool has begun"))
    with pytest.raises(ValueError, match=r"rule=Newton\(landmarks=17\)\)`: expected at most the 16 rows of the pool"):
        select(selector)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"rule": Newton("held-out", folds=9)}, r"DataSelector\(rule=Newton\(folds=9\)\)"),
        ({"weight": "held-out", "folds": 9}, r"DataSelector\(weight='held-out', folds=9\)"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_too_few_targets_to_hold_out_are_refused_before_the_warm_up(options, shown, given, tmp_path):
    """Eight of them, given or as validation data; not where the choice is made already."""
    model, selector = Net(), DataSelector(Data(), numbered(8) if given else None, budget=3, **options)
    with pytest.raises(ValueError, match=rf"`{shown}`: expected an int from 2 to the number of targets, 8, of which"):
        fit(selector, model)
    assert model.seen == []
    with pytest.raises(ValueError, match="expected an int from 2 to the number of targets, 8, of which"):
        select(selector)
    selector.select(ids=[1, 2])
    fit(selector, model)
    assert len(model.seen) == 2
