"""The choice from a warm-up model is that of the core, and what is trained on it is nothing else."""

from __future__ import annotations

import inspect

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_influence.callbacks import CurvatureRecorder
from lightning_influence.capture import FunctionLoss
from lightning_influence.curvature import EKFAC, Identity
from lightning_influence.datamodule import DataSelector
from lightning_influence.errors import StoreError
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.selection import Constraints, InteractionGreedy, Newton, Random, TokenBudget, TopK
from lightning_influence.selection.pipeline import select_training_data
from lightning_influence.store import Store
from tests.datamodule.toys import Data, Net, fit, numbered, numbers, trainer

NO_VALIDATION = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def rows(data: Data, positions: list[int]) -> list[int]:
    """Numbers of the rows at some positions of the training split."""
    return sorted(numbers(torch.stack([data.train[k][0] for k in positions])))


def select(selector: DataSelector, model: Net | None = None, **kwargs):
    seed_everything(0, verbose=False)
    return selector.select(model or Net(), progress=False, **kwargs)


def saver(folder) -> dict:
    return {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(dirpath=str(folder), filename="end")]}


def test_choice_from_a_warm_up_model_is_that_of_the_core():
    data = Data()
    options = {"rule": TopK(), "weight": "1/n", "components": "net", "normalise": False}
    selector = DataSelector(data, numbered(6, seed=3), 0.25, **options)
    model = fit(selector)
    selection = select(selector, model)
    expected = select_training_data(model, data.train, numbered(6, seed=3), budget=4, progress=False, **options)
    assert selection is selector.selection
    assert selection.ids == expected.ids
    # the loader's batches are smaller than those of the core: equal up to the rounding of float32 products
    torch.testing.assert_close(selection.gains, expected.gains, rtol=1e-5, atol=1e-7)
    assert sorted(fit(selector).seen) == rows(data, list(selection.ids))


def test_defaults_are_those_of_the_core():
    ours, core = (inspect.signature(f).parameters for f in (DataSelector, select_training_data))
    shared = ours.keys() & core.keys() - {"targets", "budget", "batch_size"}
    assert shared >= {"rule", "curvature", "components", "loss", "weight", "target_curvature", "normalise"}
    assert {name: ours[name].default for name in shared} == {name: core[name].default for name in shared}


def test_rows_without_a_target_do_not_shift_the_positions():
    x, labels = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3

    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    class Half(FunctionLoss):
        def supervised(self, batch):
            return (batch[2] >= 5).long()

    data = TensorDataset(x, labels, torch.arange(10))
    selector = DataSelector(data, numbered(6), 3, loss=Half(losses), curvature=Identity())
    selector._targets = TensorDataset(x[:4], labels[:4], torch.arange(10, 14))
    with pytest.warns(UserWarning, match="5 of 10 pool rows have no supervised target"):
        select(selector)
    assert min(selector.selected_ids) >= 5


def test_targets_come_in_batches_as_the_pool_does():
    def shifted(rows):
        x, y = default_collate(rows)
        return x + 1, y

    pool, targets = DataLoader(numbered(), 4, collate_fn=shifted), numbered(6, seed=3)
    found = select(DataSelector(pool, targets, budget=5))
    same = select(DataSelector(pool, DataLoader(targets, 4, collate_fn=shifted), budget=5))
    assert torch.equal(found.gains, same.gains)
    assert not torch.equal(found.gains, select(DataSelector(pool, DataLoader(targets, 4), budget=5)).gains)


@NO_VALIDATION
def test_a_loss_that_a_recorder_has_found(tmp_path):
    """Batches that fit no known loss: the recorder tries out what training_step returns."""

    class Named(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    data = [{"x": x, "y": y} for x, y in numbered(30)]
    recorder = CurvatureRecorder(EKFAC(fisher="empirical"), dirpath=str(tmp_path))
    selector = DataSelector(data[:24], data[24:], budget=3, batch_size=4)
    model = Named()
    trainer(callbacks=[recorder]).fit(model, datamodule=selector)
    store = recorder.records[-1].path
    with pytest.raises(ValueError, match=r"no per-example loss is known for a batch of type dict.*or pass loss="):
        select(selector, model, store=store)
    found = select(selector, model, store=store, loss=recorder.settled_loss)
    rows = list(numbered(30))
    expected = select(DataSelector(rows[:24], rows[24:], budget=3, batch_size=4), model, store=store)
    assert found.ids == expected.ids
    torch.testing.assert_close(found.gains, expected.gains)


def test_validation_data_are_the_targets_by_default():
    data = Data()
    selector = DataSelector(data, budget=3)
    found = select(selector)
    seed_everything(0, verbose=False)
    expected = select_training_data(Net(), data.train, data.val, budget=3, progress=False)
    assert found.ids == expected.ids
    assert data.calls == ["prepare_data", "setup"]  # by select itself: no fit has done so


def test_several_targets_by_name():
    data, named = Data(), {"a": numbered(3, seed=3), "b": numbered(6, seed=4)}
    options = {"target_weights": {"a": 2.0}, "across": "max", "rule": TopK()}
    found = select(DataSelector(data, named, 4, **options))
    seed_everything(0, verbose=False)
    expected = select_training_data(Net(), data.train, named, budget=4, progress=False, **options)
    assert found.ids == expected.ids
    with pytest.raises(ValueError, match=r"`DataSelector\(targets=dict\)`: .*the data is empty"):
        DataSelector(data, {"a": numbered(3), "b": []}, 4)


def test_budget_and_rule_of_one_call() -> None:
    data = Data()
    selector = DataSelector(data, budget=3)
    chosen = selector.select(Net(), budget=0.25, rule=Random(seed=1), progress=False)
    pool = len(selector.pool_dataloader().dataset)  # type: ignore[arg-type]
    assert chosen.budget == round(0.25 * pool)
    assert chosen.rule == repr(Random(seed=1))
    assert selector.select(Net(), progress=False).budget == 3
    assert selector.select(Net(), rule="newton", progress=False).rule.startswith("NewtonGreedy(ridge=")
    assert selector.select(Net(), rule=Newton(0.7), progress=False).rule == "NewtonGreedy(ridge=0.7)"
    with pytest.raises(ValueError, match=r"`DataSelector.select\(budget=0\)`"):
        selector.select(Net(), budget=0)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"rule": Newton("held-out", folds=3)}, "NewtonGreedy(ridge={})"),
        ({"weight": "held-out", "folds": 3}, "InteractionGreedy()"),
    ],
)
def test_held_out_targets_choose_the_ridge_or_the_weight(options, rule, tmp_path):
    """Through a warm-up, a file and a second fit, with the choice beside the selection."""
    data, targets = Data(), numbered(6, seed=3)
    selector = DataSelector(data, targets, budget=4, **options)
    model = fit(selector)
    selection = select(selector, model)
    expected = select_training_data(
        model, DataLoader(data.train, 4), DataLoader(targets, 4), budget=4, progress=False, **options
    )
    assert selection.ids == expected.ids
    assert selection.rule == rule.format(selection.held_out.best)
    assert selection.weight == (selection.held_out.best if "weight" in options else None)
    assert torch.equal(selection.held_out.explained, expected.held_out.explained)
    selector.save(tmp_path / "selection.json")
    again = DataSelector(data, targets, budget=4, selection=str(tmp_path / "selection.json"), **options)
    assert sorted(fit(again).seen) == rows(data, list(selection.ids))
    assert again.selection.to_dict() == selection.to_dict()
    assert torch.equal(again.selection.held_out.curve, selection.held_out.curve)


def test_training_after_a_selection_is_that_of_the_same_loader():
    """Selecting draws no random number and leaves the model as it was."""
    data = Data()
    selector = DataSelector(data, budget=6, rule=InteractionGreedy())
    model = fit(selector)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    seed_everything(5, verbose=False)
    selector.select(model, progress=False)
    drawn = torch.rand(2)
    seed_everything(5, verbose=False)
    assert torch.equal(torch.rand(2), drawn)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


def test_a_loss_that_logs_leaves_no_trace_after_the_fit():
    """Outside of a fit Lightning's own ``self.log`` raises."""

    class Logs(Net):
        def example_losses(self, batch):
            self.calls += 1
            losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
            self.log("loss", losses.mean())
            return losses

    selector = DataSelector(Data(), budget=3, curvature=Identity())
    model = Logs()
    model.calls = 0
    fit(selector, model)
    model.net.weight.grad = torch.ones(3, 4)
    model.eval().net.train()
    select(selector, model)
    assert model.calls > 0
    assert "log" not in vars(model)
    assert torch.equal(model.net.weight.grad, torch.ones(3, 4))
    assert [module.training for module in model.modules()] == [False, True]


def test_recorded_factors_are_used(tmp_path, monkeypatch):
    data = Data()
    selector = DataSelector(data, budget=4)
    model = fit(selector)
    fitted = InfluenceFunction(model, EKFAC(damping=0.5), progress=False).fit(data.train)
    store = Store.create(tmp_path / "factors", model, fitted.components)
    store.write_curvature("curvature", fitted.curvature)
    monkeypatch.setattr(EKFAC, "fit", lambda *_, **__: pytest.fail("the recorded factors are fitted already"))
    found = select(selector, model, store=tmp_path / "factors")
    expected = select_training_data(model, data.train, data.val, budget=4, curvature=fitted.curvature, progress=False)
    assert found.ids == expected.ids
    torch.testing.assert_close(found.gains, expected.gains)
    with pytest.raises(StoreError, match="does not fit"):
        select(selector, Net(), store=tmp_path / "factors")


def test_a_curvature_is_fitted_anew_for_every_model():
    data, own, later = Data(), EKFAC(damping=0.5), fit(Data())
    selector = DataSelector(data, budget=4, curvature=own)
    select(selector)
    found = select(selector, later)
    expected = select(DataSelector(data, budget=4, curvature=EKFAC(damping=0.5)), later)
    assert (found.ids, own.fitted) == (expected.ids, False)
    assert torch.equal(found.gains, expected.gains)


def test_a_selection_made_elsewhere():
    data = Data()
    named = Random().select(torch.zeros(3), budget=2, ids=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"`DataSelector.use.*expected ids that are positions"):
        DataSelector(data).use(named)
    selection = Random().select(torch.zeros(16), budget=3)
    selector = DataSelector(data)
    assert selector.use(selection) is selection
    assert sorted(fit(selector).seen) == rows(data, list(selection.ids))
    assert selector.selection is selection


def test_constraints_and_a_budget_in_tokens():
    """Every row has one target, so that tokens are rows."""
    data, targets = Data(), numbered(6, seed=3)
    limits = Constraints(must_include=[3], exclude=[0, 1])
    selection = select(DataSelector(data, targets, TokenBudget(4), constraints=limits, leaks="refuse"))
    assert (selection.ids[0], len(selection), {0, 1} & set(selection.ids)) == (3, 4, set())
    with pytest.raises(ValueError, match="pool rows also stand in the target set"):
        select(DataSelector(data, data.train, 4, leaks="refuse"))
