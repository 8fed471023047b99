"""LESS during a fit: against the checkpoints' own files, with the training left as it is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence.callbacks.less_recorder import LESSRecorder
from lightning_influence.callbacks.records import find_records
from lightning_influence.capture import find_components
from lightning_influence.estimators.adam_dot import AdamDot, load_moments
from lightning_influence.estimators.less import less_scores
from lightning_influence.estimators.scores import Scores
from lightning_influence.projections import FactoredProjection
from lightning_influence.store import Store
from tests.callbacks.test_language_model import Chat, Sentences
from tests.callbacks.toys import Interrupted, Manual, Toy, assert_same, data, every_step, loader, run, steps, trainer

QUERIES, POOL = data(3, seed=9), data(11, seed=4)
EXACT = FactoredProjection(1.0)


class Adam(Toy):
    """The parameters in another order, and a rate that falls with every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(list(self.parameters())[::-1], lr=0.02, betas=(0.8, 0.99))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def reference(checkpoint: str, queries: Any, train: Any, variant: str) -> Tensor:
    """From the file of a checkpoint alone, one example at a time."""
    content = torch.load(checkpoint, weights_only=True)
    model = Adam()
    model.load_state_dict(content["state_dict"])
    model.eval()
    parameters = list(model.parameters())
    state = content["optimizer_states"][0]["state"]
    moments = {id(p): state[k] for k, p in enumerate(parameters[::-1])}  # the order of the optimizer
    (b1, b2), eps, lists = (0.8, 0.99), 1e-8, {"left": [], "right": []}
    for side, rows in (("left", queries), ("right", train)):
        for x, y in rows:
            gradients = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), parameters)
            parts = []
            for p, g in zip(parameters, gradients, strict=True):
                m, v, t = moments[id(p)]["exp_avg"], moments[id(p)]["exp_avg_sq"], int(moments[id(p)]["step"]) + 1
                if side == "left":
                    parts.append(g.flatten())
                elif variant == "less":
                    m_hat, v_hat = (b1 * m + (1 - b1) * g) / (1 - b1**t), (b2 * v + (1 - b2) * g**2) / (1 - b2**t)
                    parts.append((m_hat / (v_hat.sqrt() + eps)).flatten())
                else:
                    parts.append(((0.9 * m + 0.1 * g) / (0.999 * v + 0.001 * g**2 + 1e-8).sqrt()).flatten())
            lists[side].append(F.normalize(torch.cat(parts), dim=0))
    return torch.stack(lists["left"]) @ torch.stack(lists["right"]).T


def recorder(**options: Any) -> LESSRecorder:
    return LESSRecorder(QUERIES, **{"train": POOL, "projection": EXACT, "when": "checkpoint", **options})


@pytest.mark.parametrize("variant", ["less", "less_repo"])
def test_every_checkpoint_and_their_sum(variant: Any, tmp_path: Any) -> None:
    less = recorder(variant=variant, batch_size=4)
    run(tmp_path, [less, every_step(tmp_path, 3)], Adam)
    assert steps(less) == [3, 6]
    rates, expected = [[0.02 * 0.5**k for k in range(3)], [0.02 * 0.5**k for k in range(3, 6)]], 0
    for record, seen in zip(less.records, rates, strict=True):
        found = Scores.load(Store.open(record.path))
        cosines = reference(record.checkpoint, QUERIES, POOL, variant)
        torch.testing.assert_close(found.values, cosines, rtol=1e-3, atol=1e-4)
        stored = Store.open(record.path).read_json("mean_learning_rate")
        assert stored == {"mean": pytest.approx(sum(seen) / 3), "steps": 3}
        expected = expected + sum(seen) / 3 * cosines
    total = less_scores(less.records)
    torch.testing.assert_close(total.values.float(), expected, rtol=1e-3, atol=1e-5)
    assert (total.query_ids, total.train_ids) == ((0, 1, 2), tuple(range(11)))


def trained(folder: Any, callbacks: list[Any]) -> dict[str, Any]:
    """Everything that a recorder must leave alone."""
    seed_everything(1, verbose=False)
    model = Adam()
    running = trainer(folder, callbacks)
    running.fit(model, loader(18, shuffle=True, drop_last=True), loader(8, seed=5))
    return {
        "weights": dict(model.state_dict()),
        "optimizer": running.optimizers[0].state_dict()["state"],
        "metrics": dict(running.logged_metrics),
        "seen": torch.cat(model.seen),
        "random": torch.rand(3),
    }


def test_training_is_bit_identical(tmp_path: Any) -> None:
    plain = trained(tmp_path, [every_step(tmp_path / "a", 4)])
    less = LESSRecorder(QUERIES)  # the training data, and the projection of LESS
    assert_same(trained(tmp_path, [less, every_step(tmp_path / "b", 4)]), plain)
    assert steps(less) == [4, 8]
    assert Scores.load(Store.open(less.records[0].path)).values.shape == (3, 18)


def test_other_data_later_from_what_was_stored(tmp_path: Any) -> None:
    less = recorder()
    run(tmp_path, [less, every_step(tmp_path, 4)], Adam, max_epochs=1)
    [record] = less.records
    model = Adam.load_from_checkpoint(record.checkpoint).eval()
    found = AdamDot(model, load_moments(Store.open(record.path)), EXACT).score(data(2, seed=3), data(5, seed=8))
    expected = reference(record.checkpoint, data(2, seed=3), data(5, seed=8), "less")
    torch.testing.assert_close(found.values, expected, rtol=1e-3, atol=1e-4)


class Calm(Adam):
    """Without dropout, whose random state no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3].p = 0.0


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("stop", [Interrupted(5), Interrupted(4, "on_train_epoch_end")])
def test_a_resumed_run_is_an_uninterrupted_one(stop: Interrupted, tmp_path: Any) -> None:
    """Killed between two recordings, and between a checkpoint and its recording: rates are counted once."""
    whole, resumed = recorder(), recorder()
    run(tmp_path / "a", [whole, every_step(tmp_path / "a", 2)], Calm)
    with pytest.raises(SystemExit):
        run(tmp_path / "b", [recorder(), every_step(tmp_path / "b", 2), stop], Calm)
    last = str(tmp_path / "b" / "step=4.ckpt")
    run(tmp_path / "b", [resumed, every_step(tmp_path / "b", 2)], Calm, ckpt_path=last)
    assert steps(resumed) == steps(whole) == [2, 4, 6, 8]
    for one, other in zip(whole.records, resumed.records, strict=True):
        left, right = Store.open(one.path), Store.open(other.path)
        assert left.read_json("mean_learning_rate")["steps"] == 2
        assert left.read_json("mean_learning_rate") == right.read_json("mean_learning_rate")
        torch.testing.assert_close(Scores.load(left).values, Scores.load(right).values)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_two_ranks_record_every_example_once(tmp_path: Any) -> None:
    seed_everything(0, verbose=False)
    less = recorder(dirpath=str(tmp_path / "less"), batch_size=2)
    settings = {"devices": 2, "strategy": "ddp_fork", "max_epochs": 1, "limit_val_batches": 0}
    trainer(tmp_path, [less, every_step(tmp_path, 2)], **settings).fit(Adam(), loader(16))
    [record] = find_records(tmp_path / "less" / "less")
    found = Scores.load(Store.open(record.path))
    assert found.train_ids == tuple(range(11))
    torch.testing.assert_close(found.values, reference(record.checkpoint, QUERIES, POOL, "less"), rtol=1e-3, atol=1e-4)
    assert Store.open(record.path).read_json("mean_learning_rate")["mean"] == pytest.approx(0.015)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_lora_in_mixed_precision(tmp_path: Any) -> None:
    less = LESSRecorder(Sentences(3, 2), components="lora", when="checkpoint", projection=EXACT, batch_size=4)
    seed_everything(0, verbose=False)
    settings = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "max_epochs": 1}
    running = trainer(tmp_path, [less, every_step(tmp_path, 2)], **settings)
    running.fit(Chat().train(), DataLoader(Sentences(16, 1), batch_size=2, shuffle=True))
    assert steps(less) == [2, 4]
    scores = less_scores(less.records)
    assert scores.values.shape == (3, 16)
    assert scores.reduction == "mean"
    assert bool((scores.values != 0).any())
    store = Store.open(less.records[-1].path)
    assert store.settings["trained_reduction"] == "mean over tokens"
    assert load_moments(store).states.keys() == {c.name for c in find_components(running.lightning_module, "lora")}


class Squares(Toy):
    """Regression with five outputs: training_step has the mean over them."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_another_scale_of_the_loss_is_told(tmp_path: Any) -> None:
    rows = [(torch.randn(4), torch.randn(5)) for _ in range(6)]
    running = trainer(
        tmp_path, [LESSRecorder(rows, when="fit_end", projection=EXACT)], max_epochs=1, limit_val_batches=0
    )
    with pytest.warns(UserWarning, match="a step of Adam depends on the size of gradients"):
        running.fit(Squares(), DataLoader(rows, batch_size=3))


def test_optimizers_without_moments_are_refused_at_the_start(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"no Adam moments \(net.0: SGD keeps no moments of Adam; net.1: SGD"):
        run(tmp_path, [recorder()], Toy)


class ManualAdam(Manual):
    """Steps past Lightning, which sees none of them."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_steps_that_were_not_seen(tmp_path: Any) -> None:
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")  # noqa: E731
    less = recorder(when="fit_end", loss=loss)
    run(tmp_path, [less], ManualAdam, max_epochs=1, enable_checkpointing=False)
    with pytest.raises(ValueError, match="no step was seen before it"):
        less_scores(less.records)
    assert less_scores(less.records, [0.01]).values.shape == (3, 11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": {"a": 1}}, "`LESSRecorder(queries=dict)`"),
        ({"queries": QUERIES, "train": iter([])}, "`LESSRecorder(train=list_iterator)`"),
        ({"queries": QUERIES, "variant": "adam"}, "`LESSRecorder(variant='adam')`: expected 'less', with bias"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LESSRecorder(**arguments)
