"""Recorded factors are those of a fit on the same weights, and serve a process that never saw the training."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import seed_everything
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_influence.callbacks.curvature_recorder import CurvatureRecorder
from lightning_influence.callbacks.records import find_records
from lightning_influence.capture import ClassificationLoss, ExampleLoader, omit_nonfinite
from lightning_influence.curvature import CG, EKFAC, KFAC, Arnoldi, Curvature, Exact, Identity, LiSSA
from lightning_influence.datamodule import DataSelector
from lightning_influence.errors import StoreError
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.selection.pipeline import select_training_data
from lightning_influence.store import Store
from tests.callbacks.toys import Toy, assert_same, data, every_step, fit, loader, run, steps, trainer

LINEAR = ["net.0", "net.4"]


@pytest.mark.parametrize("curvature", [EKFAC(damping=0.1), KFAC(fisher="empirical"), Identity(), Exact(damping=0.1)])
def test_factors_are_those_of_a_fit_on_the_weights_in_the_file(curvature, tmp_path):
    recorder = CurvatureRecorder(curvature, "checkpoint", components=LINEAR, batch_size=5)
    run(tmp_path, [recorder, every_step(tmp_path, 3)])
    assert steps(recorder) == [3, 6]
    for record in recorder.records:
        model = Toy.load_from_checkpoint(record.checkpoint)
        found = Store.open(record.path).read_curvature("curvature")
        expected = type(curvature)(**curvature.settings()).fit(model, data(), components=LINEAR, progress=False)
        assert type(found) is type(curvature)
        assert found.settings() == curvature.settings()
        gradients = {c.name: torch.randn(2, *c.shape) for c in expected.components}
        for name, solved in found.precondition(gradients).items():
            torch.testing.assert_close(solved, expected.precondition(gradients)[name], rtol=1e-4, atol=1e-5)
    assert not curvature.components  # the one that was handed over stays as it was


def test_training_is_bit_identical(tmp_path):
    plain = fit([every_step(tmp_path / "a", 2)], tmp_path)
    recorder = CurvatureRecorder(components=LINEAR, when="both")
    assert_same(fit([recorder, every_step(tmp_path / "b", 2)], tmp_path), plain)
    assert steps(recorder) == [2, 4, 6, 8]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_later_process_scores_and_selects_with_the_recording(tmp_path):
    recorder = CurvatureRecorder(EKFAC(damping=0.1), components=LINEAR)
    seed_everything(1, verbose=False)
    model, selector = Toy(), DataSelector(data(), data(4, seed=8), 5, components=LINEAR, batch_size=4)
    trainer(tmp_path, [recorder], max_epochs=1).fit(model, datamodule=selector)
    path = find_records(recorder.root)[0].path
    influence = InfluenceFunction.from_store(model, str(path), progress=False)
    scores = influence.score(data(4, seed=8), data())
    assert scores.values.shape == (4, 16)
    found = selector.select(model, store=path, progress=False)
    curvature = EKFAC(damping=0.1).fit(model, data(), components=LINEAR, progress=False)
    expected = select_training_data(
        model, data(), data(4, seed=8), budget=5, curvature=curvature, components=LINEAR, progress=False
    )
    assert found.ids == expected.ids
    with pytest.raises(StoreError, match="does not fit"):
        DataSelector(data(), data(4, seed=8), 5, components="net.0").select(model, store=path, progress=False)
    with pytest.raises(StoreError, match="does not fit"):
        selector.select(Toy(), store=path, progress=False)


class Partly(ClassificationLoss):
    """Rows with a negative first feature have no target."""

    def supervised(self, batch):
        return (batch[0][:, 0] >= 0).long()


def test_rows_without_a_target_are_left_out_and_named(tmp_path):
    x, y = data().tensors
    keep = x[:, 0] >= 0
    recorder = CurvatureRecorder(EKFAC(damping=0.1), loss=Partly(), components=LINEAR, train=data())
    with pytest.warns(UserWarning, match="of 16 training examples have no supervised target and are left out"):
        model, _ = run(tmp_path, [recorder], max_epochs=1)
    found = Store.open(recorder.records[0].path).read_curvature("curvature")
    indices = [k for k in range(16) if keep[k]]
    expected = EKFAC(damping=0.1)
    expected.fit(model, ExampleLoader(TensorDataset(x, y), indices=indices), components=LINEAR, progress=False)
    gradients = {c.name: torch.randn(2, *c.shape) for c in expected.components}
    for name, solved in found.precondition(gradients).items():
        torch.testing.assert_close(solved, expected.precondition(gradients)[name], rtol=1e-4, atol=1e-5)


def test_nothing_with_a_target_is_an_error(tmp_path):
    class Never(ClassificationLoss):
        def supervised(self, batch):
            return torch.zeros(len(batch[0]), dtype=torch.int64)

    with pytest.raises(RuntimeError, match="no training example has a supervised target"):
        run(tmp_path, [CurvatureRecorder(loss=Never(), components=LINEAR)], max_epochs=1)


def test_a_loss_that_cannot_sample_is_refused_before_training(tmp_path):
    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    recorder = CurvatureRecorder(loss=losses, components=LINEAR)
    with pytest.raises(ValueError, match=r"cannot sample labels\. Ask for fisher='empirical'"):
        run(tmp_path, [recorder])
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("curvature", [EKFAC(damping=0.1), Exact(damping=0.1)])
def test_two_ranks_record_what_one_does(curvature, tmp_path):
    found = []
    for name, settings in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        seed_everything(1, verbose=False)
        recorder = CurvatureRecorder(curvature, components=LINEAR, batch_size=2)
        model = Toy(lr=0.0)
        model.net[1].momentum = 0.0
        trainer(tmp_path / name, [recorder], max_epochs=1, **settings).fit(model, loader(15))
        [record] = find_records(next((tmp_path / name).rglob("curvature")))
        found.append(Store.open(record.path).read_curvature("curvature"))
    one, two = found
    gradients = {c.name: torch.randn(2, *c.shape) for c in one.components}
    for name, solved in one.precondition(gradients).items():
        torch.testing.assert_close(solved, two.precondition(gradients)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("curvature", [EKFAC(damping=0.1), Exact(damping=0.1)])
def test_a_rank_without_an_example_adds_nothing(curvature, tmp_path):
    found = []
    for name, settings in (("one", {}), ("three", {"devices": 3, "strategy": "ddp_fork"})):
        seed_everything(1, verbose=False)
        recorder = CurvatureRecorder(curvature, components=LINEAR, train=data(2))
        model = Toy(lr=0.0)
        model.net[1].momentum = 0.0
        trainer(tmp_path / name, [recorder], max_epochs=1, **settings).fit(model, loader(12))
        [record] = find_records(next((tmp_path / name).rglob("curvature")))
        found.append(Store.open(record.path).read_curvature("curvature"))
    one, three = found
    gradients = {c.name: torch.randn(2, *c.shape) for c in one.components}
    for name, solved in one.precondition(gradients).items():
        torch.testing.assert_close(solved, three.precondition(gradients)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("answer", [None, 3.0])
def test_a_loss_that_is_no_tensor_is_refused_before_training(answer, tmp_path):
    recorder = CurvatureRecorder(EKFAC(fisher="empirical"), loss=lambda model, batch: answer, components=LINEAR)
    with pytest.raises(ValueError, match=rf"has shape {type(answer).__name__}; expected one loss per example"):
        run(tmp_path, [recorder])
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("curvature", ["ekfac", EKFAC])
def test_a_curvature_that_is_none(curvature):
    with pytest.raises(ValueError, match=r"`CurvatureRecorder\(curvature=.*\)`: expected a Curvature, such as EKFAC\("):
        CurvatureRecorder(curvature)


@pytest.mark.parametrize("curvature", [CG(), LiSSA(), Arnoldi()], ids=lambda c: type(c).__name__)
def test_curvatures_that_leave_no_factors_are_refused(curvature: Curvature) -> None:
    kind = type(curvature).__name__
    with pytest.raises(ValueError, match=rf"curvature={kind}\(.*use InfluenceFunction\(model, {kind}\(\.\.\.\)\)"):
        CurvatureRecorder(curvature)


def test_factors_can_be_stored_in_half_the_room(tmp_path):
    recorder = CurvatureRecorder(EKFAC(damping=0.1), components=LINEAR, dtype="bfloat16")
    run(tmp_path, [recorder])
    entry = Store.open(recorder.records[-1].path).manifest["curvature"]["curvature"]
    assert entry["dtype"] == {"float32": "bfloat16"}
    with pytest.raises(ValueError, match=r"CurvatureRecorder\(dtype='half'\)`: expected 'bfloat16', or None"):
        CurvatureRecorder(dtype="half")


def test_examples_that_were_left_out_are_told(tmp_path):
    x, y = data().tensors
    x = x.clone()
    x[3] = torch.nan
    with pytest.warns(UserWarning, match=r"1 of 16 examples are left out .*\(ids \[3\]\)"):
        clean = omit_nonfinite(Toy(), TensorDataset(x, y))
    recorder = CurvatureRecorder(EKFAC(damping=0.1), components=LINEAR, train=clean)
    model, _ = run(tmp_path, [recorder], max_epochs=1)
    found = Store.open(recorder.records[0].path).read_curvature("curvature")
    assert found.omitted == (3,)
    expected = EKFAC(damping=0.1).fit(model, clean, components=LINEAR, progress=False)
    gradients = {c.name: torch.randn(2, *c.shape) for c in expected.components}
    for name, solved in found.precondition(gradients).items():
        torch.testing.assert_close(solved, expected.precondition(gradients)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.filterwarnings("ignore:CurvatureRecorder, step")
@pytest.mark.parametrize("settings", [{}, {"devices": 2, "strategy": "ddp_fork"}], ids=["one rank", "two ranks"])
def test_examples_without_a_finite_loss_are_left_out_where_that_is_asked(settings, tmp_path):
    """Those of the first batch too, which is looked at before the training."""
    x, y = data().tensors
    x = x.clone()
    x[[1, 11]] = torch.nan
    broken, kept = TensorDataset(x, y), [k for k in range(16) if k not in (1, 11)]
    for policy in ("raise", "omit"):
        seed_everything(1, verbose=False)
        model = Toy(lr=0.0)
        model.net[1].momentum = 0.0
        recorder = CurvatureRecorder(
            EKFAC(damping=0.1), components=LINEAR, train=broken, batch_size=4, nan_policy=policy
        )
        fitting = trainer(tmp_path / policy, [recorder], max_epochs=1, **settings)
        if policy == "raise" and not settings:
            with pytest.raises(ValueError, match="not finite"):
                fitting.fit(model, loader())
        elif policy == "omit":
            fitting.fit(model, loader())
    [record] = find_records(next((tmp_path / "omit").rglob("curvature")))
    found = Store.open(record.path).read_curvature("curvature")
    assert found.omitted == (1, 11)
    assert Store.open(record.path).manifest["curvature"]["curvature"]["meta"]["num_examples"] == 14
    clean = ExampleLoader(broken, 4, indices=kept)
    expected = EKFAC(damping=0.1).fit(model.cpu(), clean, components=LINEAR, progress=False)
    gradients = {c.name: torch.randn(2, *c.shape) for c in expected.components}
    for name, solved in found.precondition(gradients).items():
        torch.testing.assert_close(solved, expected.precondition(gradients)[name], rtol=1e-4, atol=1e-5)


def test_the_ones_that_are_left_out_are_told_and_all_is_an_error(tmp_path):
    x, y = data().tensors
    x = x.clone()
    x[5] = torch.nan
    recorder = CurvatureRecorder(components=LINEAR, train=TensorDataset(x, y), nan_policy="omit")
    with pytest.warns(UserWarning, match=r"step 8: 1 of 16 training examples are left out .*\(positions \[5\]\)"):
        run(tmp_path, [recorder])
    recorder = CurvatureRecorder(components=LINEAR, train=TensorDataset(x * torch.nan, y), nan_policy="omit")
    with pytest.raises(ValueError, match=r"not finite|is finite"):
        run(tmp_path / "none", [recorder])


@pytest.mark.parametrize("curvature", [EKFAC(damping=0.1), KFAC(damping=0.1)])
def test_what_is_kept_of_the_first_pass_changes_nothing(curvature, tmp_path):
    run(tmp_path, [CurvatureRecorder(curvature, components=LINEAR, batch_size=5)])
    plain = find_records(next(tmp_path.rglob("curvature")))[0]
    expected = Store.open(plain.path).read_curvature("curvature").state()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for budgets in ({"memory_budget": 10**8}, {"disk_budget": 10**6, "scratch": scratch}):
        recorder = CurvatureRecorder(curvature, components=LINEAR, batch_size=5, **budgets)
        run(tmp_path / str(len(budgets)), [recorder])
        found = Store.open(recorder.records[-1].path).read_curvature("curvature").state()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nan_policy": "skip"}, r"`CurvatureRecorder\(nan_policy='skip'\)`: expected 'raise'"),
        ({"memory_budget": "1GB"}, r"`CurvatureRecorder\(memory_budget='1GB'\)`: expected a number of bytes"),
        ({"disk_budget": -1}, r"`CurvatureRecorder\(disk_budget=-1\)`: expected a number of bytes"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        CurvatureRecorder(**options)


def test_a_folder_that_is_none_is_refused_before_training(tmp_path):
    recorder = CurvatureRecorder(components=LINEAR, disk_budget=10, scratch=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a folder for temporary files that exists"):
        run(tmp_path, [recorder])
    assert not list(tmp_path.rglob("*.ckpt"))
