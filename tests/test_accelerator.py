"""On an accelerator everything gives what it gives on the CPU, and training with the callbacks stays bit-identical.

Runs where there is a GPU: pytest tests/test_accelerator.py. LI_TEST_DEVICE names another device (mps, xpu, or cpu to
try the tests themselves).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_influence import (
    CG,
    CKA,
    EKFAC,
    KFAC,
    TRAK,
    Arnoldi,
    BlockGreedy,
    ComponentDots,
    Curvature,
    CurvatureRecorder,
    DataSelector,
    Diagonal,
    Exact,
    FactoredProjection,
    GradientDot,
    GradientDotRecorder,
    GroupInfluence,
    Identity,
    InfluenceFunction,
    InteractionGreedy,
    LengthScore,
    LESSRecorder,
    LiSSA,
    LoGra,
    LossScore,
    MultiStageInfluence,
    NewtonGreedy,
    NewtonPool,
    ProjectedDot,
    ProjectedGram,
    RepresentationSimilarity,
    Scores,
    StochasticGreedy,
    Store,
    TracIn,
    TrakProjection,
    certify,
    less_scores,
    refine,
    select_training_data,
)
from lightning_influence.selection import selection_device

DEVICE = torch.device(os.environ.get("LI_TEST_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU; LI_TEST_DEVICE names another"
    ),
    pytest.mark.filterwarnings("ignore:.*too few positions for factors of full rank"),
]
CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-6, "atol": 1e-9}


def classifier(device: torch.device, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Convolution, embedding-free norms and linear layers."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.LayerNorm(12), nn.Linear(12, 3)]
    return nn.Sequential(*layers).to(device, dtype).eval()


def images(n: int, seed: int, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(x, torch.randint(0, 3, (n,), generator=generator))


POOL, TARGETS = images(24, 1), images(5, 2)


class Sentences(Dataset[dict[str, Tensor]]):
    """Rows of one length; the first half of each is not supervised."""

    def __init__(self, n: int, seed: int) -> None:
        self.tokens = torch.randint(0, 50, (n, 10), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        labels = self.tokens[k].clone()
        labels[:5] = -100
        return {"input_ids": self.tokens[k], "labels": labels}


def language_model(device: torch.device, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).to(device, dtype).eval()


def on_both(make: Callable[[torch.device], Any], **tolerance: float) -> None:
    """The same numbers from both devices."""
    expected, found = make(CPU), make(DEVICE)
    torch.testing.assert_close(found, expected, check_device=False, **{**CLOSE, **tolerance})


def total(scores: Scores) -> Tensor:
    return scores.total().cpu()


CURVATURES: list[Curvature] = [
    Identity(),
    EKFAC(damping=0.1),
    EKFAC(),
    EKFAC(fisher="empirical", max_width=8),
    EKFAC(covariance_share=0.5),
    KFAC(),
    Diagonal(),
    ProjectedGram((3, 3)),
    Exact(),
    CG(damping=0.1, tolerance=1e-10),
    CG(damping=10.0, product="hessian", tolerance=1e-10),
    CG(damping=0.1, preconditioner=EKFAC(), tolerance=1e-10),
    Arnoldi(damping=0.1, rank=6, steps=20, tolerance=0.9),
    LiSSA(damping=0.5, depth=200, tolerance=0.9),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("curvature", CURVATURES, ids=repr)
def test_influence_with_every_curvature(curvature, tmp_path):
    def scores(device: torch.device) -> Tensor:
        fresh = type(curvature)(**curvature.settings())
        influence = InfluenceFunction(classifier(device), fresh, progress=False).fit(images(150, 3))  # of full rank
        return total(influence.score(TARGETS, POOL))

    on_both(scores, rtol=1e-4, atol=1e-7)


def test_fitted_factors_follow_the_model():
    curvature = EKFAC().fit(classifier(CPU), POOL, progress=False)
    expected = total(InfluenceFunction(classifier(CPU), curvature, progress=False).score(TARGETS, POOL))
    found = total(InfluenceFunction(classifier(DEVICE), curvature, progress=False).score(TARGETS, POOL))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_what_an_influence_function_answers_besides():
    def answers(device: torch.device) -> list[Tensor]:
        influence = InfluenceFunction(classifier(device), EKFAC(), normalise=True, progress=False).fit(POOL)
        scores, own = influence.score_with_self(TARGETS, POOL)
        low = influence.score(TARGETS, POOL, aggregate="mean", rank=0.99)
        best = influence.top(TARGETS, POOL, 3)
        parts = influence.score(TARGETS, POOL, per_component=True).values
        return [total(scores), total(own), total(low), best.values.cpu(), parts.cpu()]

    on_both(answers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_language_models(dtype):
    def scores(device: torch.device) -> Tensor:
        model = language_model(device, dtype)
        influence = InfluenceFunction(model, EKFAC(fisher="empirical"), progress=False).fit(Sentences(12, 0))
        return total(influence.score(Sentences(3, 1), Sentences(12, 0))).double()

    if dtype == torch.bfloat16:  # products differ in their last bits
        left, right = scores(CPU).flatten(), scores(DEVICE).flatten()
        assert torch.corrcoef(torch.stack([left, right]))[0, 1] > 0.99
    else:
        on_both(scores, rtol=1e-2, atol=1e-3)  # its norms are in float32 whatever the model is in


def test_tokens_self_influence_and_memory_for_the_second_pass(tmp_path):
    def answers(device: torch.device) -> list[Tensor]:
        curvature = EKFAC(fisher="empirical").fit(
            language_model(device), Sentences(12, 0), memory_budget=2**16, disk_budget=2**24, progress=False
        )
        influence = InfluenceFunction(language_model(device), curvature, progress=False)
        found = influence.token_scores(Sentences(2, 1), Sentences(12, 0))
        return [influence.self_influence(Sentences(12, 0)).values.cpu(), *found.values]

    on_both(answers, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_gradient_products_and_projections(tmp_path):
    def products(device: torch.device) -> list[Tensor]:
        model = classifier(device)
        dots = GradientDot(model, progress=False)
        pairs = dots.pairs(TARGETS, POOL, [[0, 1, 5]] * 5)
        found = [total(dots.score(TARGETS, POOL)), pairs.dots.cpu()]
        drawn = [ProjectedDot(model, kind, progress=False) for kind in (LoGra((4, 4)), FactoredProjection(64))]
        found += [total(projected.score(TARGETS, POOL)) for projected in drawn]
        path = tmp_path / f"{device.type}.npy"
        written = ProjectedDot(model, LoGra((4, 4)), progress=False).write(POOL, path)
        found.append(torch.tensor(written.values[:]).double())
        return found

    on_both(products, atol=2e-3)


@pytest.mark.filterwarnings("ignore")
def test_baselines():
    def scores(device: torch.device) -> list[Tensor]:
        model, sentences = classifier(device), language_model(device)
        trak = TRAK(model, FactoredProjection(32), damping_share=0.1, progress=False).fit(POOL)
        shown = RepresentationSimilarity(sentences, pooling="weighted", progress=False)
        return [
            total(trak.score(TARGETS)),
            total(CKA(model, progress=False).score(TARGETS, POOL)),
            total(shown.score(Sentences(3, 1), Sentences(6, 0))),
            total(LossScore(model, progress=False).score(None, POOL)),
            total(LengthScore(sentences, progress=False).score(None, Sentences(6, 0))),
        ]

    on_both(scores, rtol=1e-5, atol=1e-8)


def test_dense_projections_of_records_on_the_device():
    dots = ProjectedDot(classifier(DEVICE), TrakProjection(512, kind="normal", backend="basic"), progress=False)
    exact = total(GradientDot(classifier(DEVICE), progress=False).score(TARGETS, POOL))
    found = total(dots.score(TARGETS, POOL))
    assert torch.corrcoef(torch.stack([exact.flatten(), found.flatten().double()]))[0, 1] > 0.9


@pytest.mark.parametrize("curvature", [Exact(), EKFAC(), Identity(), ProjectedGram((4, 4))], ids=repr)
@pytest.mark.parametrize("target", ["empirical", "sampled", "gauss-newton"])
def test_groups(curvature, target):
    def estimates(device: torch.device) -> list[Tensor]:
        fresh = type(curvature)(**curvature.settings())
        influence = GroupInfluence(classifier(device), fresh, target, progress=False).fit(POOL, TARGETS)
        groups = [range(6), range(6, 10), [3, 20]]
        methods = ("F", "F+I", "F+B", "F+I+B", "N", "N+I")
        return [torch.as_tensor(influence.estimates(groups, method=name, change="addition")).cpu() for name in methods]

    on_both(estimates, rtol=1e-4, atol=1e-8)


def test_two_stages():
    def scores(device: torch.device) -> Tensor:
        first, second = classifier(device), classifier(device)
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.mul_(1.01)
        found = MultiStageInfluence(first, second, EKFAC(), EKFAC(), progress=False).fit(POOL, images(8, 3))
        return total(found.score(TARGETS, POOL))

    on_both(scores)


def features(n: int = 300, d: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(n, d, generator=generator) + 1
    values = rows @ torch.randn(d, generator=generator)
    half = torch.randn(d, d, generator=generator)
    return values, rows, half @ half.T / d


@pytest.mark.parametrize(
    "rule", [InteractionGreedy(), InteractionGreedy("plain"), InteractionGreedy("pruned"), StochasticGreedy(0.1, 0)]
)
def test_greedy_picks(rule):
    values, rows, metric = features()
    expected = rule.select(values, rows, metric, budget=40)
    found = rule.select(values.to(DEVICE), rows.to(DEVICE), metric.to(DEVICE), budget=40)
    assert found.ids == expected.ids
    torch.testing.assert_close(found.gains.cpu(), expected.gains, **CLOSE)


def test_other_rules_and_the_certificate():
    values, rows, metric = features()
    given = values.to(DEVICE), rows.to(DEVICE), metric.to(DEVICE)
    for rule in (BlockGreedy(8), NewtonGreedy(0.3)):
        assert rule.select(*given, budget=20).ids == rule.select(values, rows, metric, budget=20).ids
    first = BlockGreedy(8).select(*given, budget=20)
    better = refine(first, *given)
    assert better.ids == refine(BlockGreedy(8).select(values, rows, metric, budget=20), values, rows, metric).ids
    gaps = [certify(better, *given).optimality_gap, certify(better, values, rows, metric).optimality_gap]
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-3, abs=1e-6)


def test_selection_from_a_model(monkeypatch):
    monkeypatch.setattr(selection_device, "LEAST", 1)  # the rules themselves look at the pool on the device
    for rule in ("newton", InteractionGreedy(), NewtonGreedy(0.3)):
        options: dict[str, Any] = {"budget": 8, "rule": rule, "progress": False}
        expected, found = (select_training_data(classifier(d), POOL, TARGETS, **options) for d in (CPU, DEVICE))
        selector = DataSelector(POOL, TARGETS, budget=8, rule=rule)
        assert selector.select(classifier(DEVICE), progress=False).ids == found.ids == expected.ids


@pytest.mark.parametrize("landmarks", [0, 10])
def test_newton_pools(landmarks):
    picks, agreements = [], []
    for device in (CPU, DEVICE):
        influence = InfluenceFunction(classifier(device), EKFAC(), normalise=True, progress=False).fit(POOL)
        for pool in (
            NewtonPool.scored(influence, TARGETS, POOL, landmarks=landmarks),
            NewtonPool.whitened(influence, TARGETS, POOL),
        ):
            picks.append(pool.select(6).ids)
            agreements.append(pool.agreement().cpu())
    assert picks[:2] == picks[2:]
    torch.testing.assert_close(agreements[:2], agreements[2:], rtol=1e-4, atol=1e-7)


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def fitted(folder: Any, callbacks: list[Callback], data: Any = None, **options: Any) -> tuple[Net, Tensor]:
    """The model after two epochs, and what the device's generator gives next."""
    seed_everything(0, verbose=False)
    saver = ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trainer = Trainer(
        accelerator={"cuda": "gpu"}.get(DEVICE.type, DEVICE.type),
        devices=1,
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        callbacks=[*callbacks, saver],
        **options,
    )
    model = Net()
    batches = DataLoader(images(24, 1, torch.float32), batch_size=4, shuffle=True) if data is None else data
    trainer.fit(model, batches)
    return model, torch.rand(4, device=DEVICE)


NETS = ["net.1", "net.5"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_with_recorders_is_bit_identical(tmp_path, precision):
    goals, pool = images(5, 2, torch.float32), images(24, 1, torch.float32)
    common: dict[str, Any] = {"components": NETS, "when": "both"}
    less = LESSRecorder(goals, train=pool, projection=FactoredProjection(64), **common)
    recorders = [
        CurvatureRecorder(EKFAC(), train=pool, **common),
        GradientDotRecorder(goals, train=pool, **common),
        GradientDotRecorder(goals, [[0, 3]] * 5, train=pool, name="pairs", **common),
        less,
    ]
    model, after = fitted(tmp_path / "with", recorders, precision=precision)
    plain, expected = fitted(tmp_path / "without", [], precision=precision)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(after, expected)
    assert all(len(recorder.records) == 4 for recorder in recorders)
    assert less_scores(less.records).values.isfinite().all()
    assert TracIn.from_records(recorders[1].records).scores().values.isfinite().all()
    assert ComponentDots.load(Store.open(recorders[2].records[-1].path)).dots.isfinite().all()
    influence = InfluenceFunction.from_store(model.cpu().eval(), recorders[0].records[-1].path, progress=False)
    fresh = EKFAC().fit(model, pool, components=NETS, progress=False)
    expected_scores = total(InfluenceFunction(model, fresh, components=NETS, progress=False).score(goals, pool))
    if precision == "32-true":
        torch.testing.assert_close(total(influence.score(goals, pool)), expected_scores, rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_selector_between_two_fits_and_during_one(tmp_path):
    goals, pool = images(5, 2, torch.float32), images(24, 1, torch.float32)
    selector = DataSelector(DataLoader(pool, batch_size=4), goals, budget=8, components=NETS)
    recorder = CurvatureRecorder(EKFAC(), components=NETS, when="fit_end")
    model, _ = fitted(tmp_path, [recorder], selector)
    first = selector.select(model.to(DEVICE), store=recorder.records[-1].path, progress=False)
    second = selector.select(model.cpu(), store=recorder.records[-1].path, progress=False)
    assert first.ids == second.ids
    fitted(tmp_path, [], selector)
    during = DataSelector(DataLoader(pool, batch_size=4), goals, budget=8, components=NETS, reselect_every_n_epochs=1)
    fitted(tmp_path, [], during, reload_dataloaders_every_n_epochs=1)
