from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_influence.callbacks.curvature_recorder import CurvatureRecorder
from lightning_influence.capture import ClassificationLoss, LanguageModelLoss, RegressionLoss, find_components
from lightning_influence.curvature import EKFAC, KFAC, Exact, Identity
from lightning_influence.errors import NotFittedError, StoreError
from lightning_influence.estimators.gradient_dot import GradientDot
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.estimators.merged import merged
from lightning_influence.estimators.multi_stage import MultiStageInfluence
from lightning_influence.store import Store
from tests import oracles
from tests.callbacks import toys
from tests.curvature.models import Mixed, Tokens, loss_of, mlp, normal, points, ready, texts, token_rows, truth

PRETRAINING, FINETUNING, QUERIES = texts(9), token_rows(8), token_rows(3, seed=5)


class Classifier(nn.Module):
    """The body of `Tokens` under another name, with a head for seven classes of sequences and a norm before it."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "up": nn.Linear(4, width)})
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.backbone["embedding"](tokens)
        hidden = self.backbone["up"](embedded + 0.5 * embedded.cumsum(1)).tanh()
        return self.classifier(self.norm(hidden.mean(1)))


def pair(width: int = 3) -> tuple[nn.Module, nn.Module]:
    """A language model and a classifier that was fine-tuned from it, not far away."""
    model, tuned = ready(Tokens()), ready(Classifier(width))
    with torch.no_grad():
        if width == 3:
            for name in ("embedding", "up"):
                tuned.backbone[name].load_state_dict(model.get_submodule(name).state_dict())
                tuned.backbone[name].weight += 0.05 * torch.arange(4)
    return model, tuned


def curvatures(kind: Any = EKFAC, **settings: Any) -> tuple[Any, Any]:
    """Of two dampings, so that one cannot stand for the other."""
    return tuple(kind(fisher="empirical", damping=damping, **settings) for damping in (0.05, 0.2))


def estimator(kind: Any = EKFAC, **options: Any) -> MultiStageInfluence:
    return MultiStageInfluence(*pair(), *curvatures(kind), **options).fit(PRETRAINING, FINETUNING)


def dense() -> Tensor:
    """[MS] eq. 12 with both matrices in full, a block for each shared layer."""
    model, tuned = pair()
    total = torch.zeros(3, 9, dtype=torch.float64)
    for name in ("embedding", "up"):
        rows = gradients(model, name, PRETRAINING)
        first = oracles.damped_inverse(oracles.fisher(rows), 0.05)
        second = oracles.damped_inverse(oracles.fisher(gradients(tuned, f"backbone.{name}", FINETUNING)), 0.2)
        total += gradients(tuned, f"backbone.{name}", QUERIES) @ second @ first @ rows.T
    return total


def gradients(model: nn.Module, name: str, data: list[Any]) -> Tensor:
    """Of one layer, one example at a time, the bias as the last column [n, P]."""
    own = dict(model.get_submodule(name).named_parameters())
    found = oracles.example_gradients(own, lambda k: loss_of(model, data[k], k), len(data))
    return torch.cat([g if g.dim() == 3 else g[..., None] for g in found.values()], dim=2).flatten(1)


def test_it_is_the_product_of_the_two_inverses() -> None:
    found = estimator(Exact)
    assert [(a.name, b.name) for a, b in found.shared] == [("embedding", "backbone.embedding"), ("up", "backbone.up")]
    torch.testing.assert_close(found.score(QUERIES, PRETRAINING).values, dense())


@pytest.mark.parametrize("kind", [EKFAC, KFAC])
def test_with_kronecker_factors_in_closed_form(kind: Any) -> None:
    model, tuned = pair()
    oracle = oracles.ekfac if kind is EKFAC else lambda factors, gradients: oracles.kfac(factors)
    one, other = truth(model, "up", PRETRAINING), truth(tuned, "backbone.up", FINETUNING)
    inverses = [
        oracles.damped_inverse(oracle(t.factors, t.gradients), damping) for t, damping in ((one, 0.05), (other, 0.2))
    ]
    asked = truth(tuned, "backbone.up", QUERIES).gradients.flatten(1)
    expected = asked @ inverses[1] @ inverses[0] @ one.gradients.flatten(1).T
    found = estimator(kind, components=["up"]).score(QUERIES, PRETRAINING)
    torch.testing.assert_close(found.values, expected)
    torch.testing.assert_close(estimator(kind).score(QUERIES, PRETRAINING, per_component=True).total(["up"]), expected)


def test_leaving_an_example_out_of_the_pretraining() -> None:
    """Two linear regressions, the second held near the first by |w - w_pt|² α/2: what a query loses, to first order.

    α/n times the score, with the Gauss-Newton matrices of squared error and α as damping of the second.
    """
    n, decay, alpha = 200, 1e-3, 0.5
    x, y = normal(n, 3), normal(n, 1, seed=1)
    other, wanted = normal(60, 3, seed=2), normal(60, 1, seed=3) + 1

    def pretrained(kept: Tensor) -> Tensor:
        return torch.linalg.solve(x[kept].T @ x[kept] / n + decay * torch.eye(3), x[kept].T @ y[kept] / n)[:, 0]

    def finetuned(start: Tensor) -> Tensor:
        matrix = other.T @ other / 60 + alpha * torch.eye(3)
        return torch.linalg.solve(matrix, other.T @ wanted[:, 0] / 60 + alpha * start)

    query = (normal(3, seed=8), torch.tensor([2.0]).double())
    loss = lambda w: 0.5 * (w @ query[0] - query[1][0]) ** 2  # noqa: E731
    start = pretrained(torch.arange(n))
    whole = finetuned(start)
    kept = [torch.arange(n) != k for k in range(n)]
    changes = torch.stack([loss(finetuned(pretrained(rows))) - loss(whole) for rows in kept])
    models, fitted = [mlp(nn.Linear(3, 1, bias=False)) for _ in range(2)], []
    sides = ((start, x, y, decay), (whole, other, wanted, alpha))
    for model, (weights, inputs, targets, damping) in zip(models, sides, strict=True):
        with torch.no_grad():
            model[0].weight.copy_(weights)
        # Many draws of each label bring the sampled Fisher close to its expectation E[x xᵀ].
        drawn = [(inputs[k % len(inputs)], targets[k % len(inputs)]) for k in range(18_000)]
        fitted.append(Exact(damping=damping).fit(model, drawn, RegressionLoss(), batch_size=3000))
    found = MultiStageInfluence(*models, *fitted, RegressionLoss(), RegressionLoss(), components=["0"])
    scores = alpha / n * found.score([query], list(zip(x, y, strict=True))).values[0]
    assert torch.corrcoef(torch.stack([changes, scores]))[0, 1] > 0.999
    torch.testing.assert_close(scores, changes, rtol=0.1, atol=float(changes.abs().max()) * 0.05)


def test_damping_is_not_changed_by_use() -> None:
    found = estimator()
    first = found.score(QUERIES, PRETRAINING).values
    assert torch.equal(found.fit(texts(2), token_rows(2)).score(QUERIES, PRETRAINING).values, first)


def test_one_stage_twice_is_two_solves() -> None:
    """With one model and one curvature for both stages: g^T (G + damping)^-2 g; without curvature the dot product."""
    model, data = ready(Mixed()), token_rows(9)
    everything = [c.name for c in find_components(model)]
    one, other = (EKFAC(fisher="empirical").fit(model, data) for _ in range(2))
    found = MultiStageInfluence(model, model, one, other, components=everything).score(QUERIES, data)
    half = InfluenceFunction(model, one)
    rows = half._query_gradients(half._loader(QUERIES), "data", 0)
    with half.capture:
        twice = half._columns(half.transform(rows), next(half._records(half._loader(data), "")), False)
    torch.testing.assert_close(found.values, twice)
    plain = MultiStageInfluence(model, model, Identity(), Identity(), components=everything).score(QUERIES, data)
    torch.testing.assert_close(plain.values, GradientDot(model).score(QUERIES, data).values)


def test_a_curvature_of_further_components_is_used_for_the_shared_ones() -> None:
    model, tuned = pair()
    one, other = curvatures()
    wide = MultiStageInfluence(model, tuned, one.fit(model, PRETRAINING), other.fit(tuned, FINETUNING))
    torch.testing.assert_close(wide.score(QUERIES, PRETRAINING).values, estimator().score(QUERIES, PRETRAINING).values)


def test_scores_say_what_they_are() -> None:
    found = estimator(loss=LanguageModelLoss("mean")).score(QUERIES, PRETRAINING)
    assert found.damping == "pre-training: 0.05, fine-tuning: 0.2"
    assert found.formula == "g_q(ft)^T (G_ft + damping)^-1 (G_pt + damping)^-1 g_i(pt), G_ft and G_pt: EKFAC and EKFAC"
    assert found.reduction == f"query: {ClassificationLoss().reduction}, training example: mean"
    assert MultiStageInfluence(*pair(), KFAC(), EKFAC()).damping == "0.1 x mean eigenvalue"


def test_unit_gradients_are_those_of_the_shared_components() -> None:
    found = estimator(Exact, normalise=True).score(QUERIES, PRETRAINING).values
    model, tuned = pair()
    left, right = (
        torch.cat([gradients(owner, f"{prefix}{name}", data) for name in ("embedding", "up")], dim=1).norm(dim=1)
        for owner, prefix, data in ((tuned, "backbone.", QUERIES), (model, "", PRETRAINING))
    )
    torch.testing.assert_close(found, dense() / left[:, None] / right)


def test_proximity() -> None:
    found = estimator().proximity()
    assert list(found) == ["embedding", "up"]
    model, _ = pair()
    moved = 0.05 * torch.arange(4).double().expand(7, 4)
    norm = float(model.embedding.weight.detach().norm())
    assert found["embedding"].absolute == pytest.approx(float(moved.norm()))
    assert found["embedding"].relative == pytest.approx(float(moved.norm()) / norm)
    nothing = MultiStageInfluence(mlp(), mlp(), Identity(), Identity()).proximity()
    assert all(distance == (0, 0) for distance in nothing.values())


def test_components_by_another_name() -> None:
    model, tuned = pair()
    match = {"up": "backbone.up"}
    found = MultiStageInfluence(model, tuned, *curvatures(), match=match).fit(PRETRAINING, FINETUNING)
    assert [c.name for c in found.components] == ["up"]
    by_function = MultiStageInfluence(model, tuned, match=match.get)
    assert by_function.shared == found.shared
    expected = estimator().score(QUERIES, PRETRAINING, per_component=True).total(["up"])
    torch.testing.assert_close(found.score(QUERIES, PRETRAINING).values, expected)


def test_without_anything_shared() -> None:
    text = r"`MultiStageInfluence\(Tokens, Sequential\)`: no component of the first has a counterpart in the second"
    with pytest.raises(ValueError, match=text):
        MultiStageInfluence(ready(Tokens()), mlp())
    with pytest.raises(ValueError, match=r"\['head'\] of components= lack a counterpart in the second"):
        MultiStageInfluence(*pair(), components=["up", "head"])


def test_of_another_width_only_the_rest_is_shared() -> None:
    assert [c.name for c in MultiStageInfluence(*pair(width=2)).components] == ["embedding"]


def test_wrong_curvatures() -> None:
    one = EKFAC()
    with pytest.raises(ValueError, match="expected two objects, one for each model"):
        MultiStageInfluence(*pair(), one, one)
    with pytest.raises(
        NotFittedError, match=r"EKFAC of the pre-trained model and KFAC of the fine-tuned model. Call fit\("
    ):
        MultiStageInfluence(*pair(), EKFAC(), KFAC()).score(QUERIES, PRETRAINING)
    model, tuned = pair()
    part = EKFAC().fit(model, PRETRAINING, components=["up"])
    with pytest.raises(ValueError, match=r"the fitted EKFAC of the pre-trained model lacks \['embedding'\]"):
        MultiStageInfluence(model, tuned, part, components=["up", "embedding"])


def test_queries_are_checked_with_the_finetuned_model() -> None:
    found = estimator()
    found.check(QUERIES)
    with pytest.raises(ValueError, match=r"1 of 3 queries have no supervised target \(ids \[1\]\)"):
        found.score([QUERIES[0], (QUERIES[1][0], torch.tensor(-100)), QUERIES[2]], PRETRAINING)


def test_from_two_stores(tmp_path: Any) -> None:
    model, tuned = pair()
    one, other = curvatures()
    stores = []
    for place, owner, curvature, data in (("a", model, one, PRETRAINING), ("b", tuned, other, FINETUNING)):
        store = Store.create(tmp_path / place, owner, find_components(owner))
        store.write_curvature("curvature", curvature.fit(owner, data))
        stores.append(store)
    expected = MultiStageInfluence(model, tuned, one, other).score(QUERIES, PRETRAINING).values
    for places in (stores, [tmp_path / "a", str(tmp_path / "b")]):
        found = MultiStageInfluence.from_stores(model, tuned, *places, batch_size=4)
        torch.testing.assert_close(found.score(QUERIES, PRETRAINING).values, expected)
    with pytest.raises(StoreError):
        MultiStageInfluence.from_stores(model, tuned, *reversed(stores))


def test_adapters_are_merged_first() -> None:
    base = mlp(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    torch.manual_seed(0)
    tuned = peft.get_peft_model(mlp(*base), peft.LoraConfig(r=2, target_modules=["0", "2"])).double().eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    base = mlp(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"2 layers carry LoRA adapters .* merged\(model\) gives a copy"):
        MultiStageInfluence(base, tuned)
    data = points(9)
    found = MultiStageInfluence(base, merged(tuned), EKFAC(), EKFAC()).fit(data, data)
    assert [c.name for c in found.components] == ["0", "2", "4"]
    distances = found.proximity()
    assert distances["4"].absolute == 0
    assert distances["0"].relative > 0
    assert found.score(points(2, seed=4), data).values.isfinite().all()


class Stage(toys.Toy):
    """A body, here with a head of its own and trained on labels of its own."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.net = nn.Linear(6, classes)
        self.accuracy = MulticlassAccuracy(classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.body(x))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_from_two_recorded_runs(tmp_path: Any) -> None:
    """Pre-training with five classes, fine-tuning of its body with three."""
    rows = toys.data(24).tensors[0]
    train = TensorDataset(rows, rows[:, :4].argmax(1)), toys.data(16, seed=3)
    models, recorders = [Stage(5), Stage(3)], [CurvatureRecorder(EKFAC(damping=0.1), components="body") for _ in "ab"]
    for k, (model, recorder) in enumerate(zip(models, recorders, strict=True)):
        if k:
            model.body.load_state_dict(models[0].body.state_dict())
        toys.trainer(tmp_path / str(k), [recorder]).fit(model, DataLoader(train[k], batch_size=4))
    first, second = (recorder.records[-1].path for recorder in recorders)
    influence = MultiStageInfluence.from_stores(*models, first, second)
    scores = influence.score(toys.data(3, seed=8), train[0])
    assert scores.values.shape == (3, 24)
    assert influence.proximity()["body.0"].absolute > 0
    fitted = [EKFAC(damping=0.1).fit(m, d, components="body") for m, d in zip(models, train, strict=True)]
    torch.testing.assert_close(
        scores.values, MultiStageInfluence(*models, *fitted).score(toys.data(3, seed=8), train[0]).values
    )
    with pytest.raises(StoreError, match="other weights"):
        MultiStageInfluence.from_stores(*models, second, first)


def margin(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])[:, 0]


def test_a_measurement_of_the_queries_changes_no_curvature() -> None:
    """Its curvature is that of the loss the fine-tuned model was trained on, also under sampled labels."""
    plain, asked = (MultiStageInfluence(*pair(), **options) for options in ({}, {"query_loss": margin}))
    for influence in (plain, asked):
        influence.fit(PRETRAINING, FINETUNING)
    given = MultiStageInfluence(*pair(), query_loss=margin, finetuning_loss=ClassificationLoss())
    for influence in (asked, given.fit(PRETRAINING, FINETUNING)):
        for name, tensor in influence.finetuned_curvature.state().items():
            assert torch.equal(tensor, plain.finetuned_curvature.state()[name])
    fitted = (plain.curvature, plain.finetuned_curvature)
    found = asked.score(QUERIES, PRETRAINING)
    expected = MultiStageInfluence(*pair(), *fitted, query_loss=margin).score(QUERIES, PRETRAINING)
    torch.testing.assert_close(found.values, expected.values)
    assert found.reduction == "query: defined by a function, training example: sum"
    assert not torch.allclose(found.values, plain.score(QUERIES, PRETRAINING).values)


def test_examples_without_a_finite_loss_are_left_out_on_request_alone() -> None:
    model, tuned = (mlp(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)) for _ in "ab")
    rows = [(x * torch.nan, y) if k == 2 else (x, y) for k, (x, y) in enumerate(points(12))]
    influence = MultiStageInfluence(model, tuned)
    with pytest.raises(ValueError, match=r"not finite \(ids \[2\]\)"):
        influence.fit(rows, points(12))
    with pytest.warns(UserWarning, match=r"1 of 12 examples are left out .*\(ids \[2\]\)"):
        influence.fit(rows, points(12), nan_policy="omit")
    assert influence.curvature.omitted == (2,)
    assert influence.finetuned_curvature.omitted == ()


@pytest.mark.parametrize(("first", "second"), [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)])
def test_models_of_two_precisions(first: torch.dtype, second: torch.dtype) -> None:
    """Each is solved in its own; scores are in that of the pre-trained one."""
    model, tuned = pair()
    expected = estimator().score(QUERIES, PRETRAINING).values
    found = MultiStageInfluence(model.to(first), tuned.to(second), *curvatures()).fit(PRETRAINING, FINETUNING)
    values = found.score(QUERIES, PRETRAINING).values
    assert values.dtype == first
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=0.1 * float(expected.abs().max()))


def test_what_is_kept_of_the_first_passes_needs_no_second(tmp_path: Any) -> None:
    expected = estimator().score(QUERIES, PRETRAINING).values
    found = MultiStageInfluence(*pair(), *curvatures())
    reads = []
    for curvature in (found.curvature, found.finetuned_curvature):
        curvature.observe = lambda *args, own=curvature.observe, **kw: (reads.append(1), own(*args, **kw))[1]
    found.fit(PRETRAINING, FINETUNING, disk_budget=10**6, scratch=tmp_path)
    assert len(reads) == 2
    torch.testing.assert_close(found.score(QUERIES, PRETRAINING).values, expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", ["pre-trained", "fine-tuned"])
def test_a_curvature_of_other_weights_warns(which: str) -> None:
    found = estimator()
    moved = found.model.up if which == "pre-trained" else found.finetuned.backbone["up"]
    with torch.no_grad():
        moved.bias += 0.1
    with pytest.warns(UserWarning, match=rf"EKFAC was fitted on other weights than the {which} model has now"):
        found.score(QUERIES, PRETRAINING)
