from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import (
    CG,
    EKFAC,
    KFAC,
    Diagonal,
    Exact,
    GroupInfluence,
    Identity,
    InfluenceFunction,
    InteractionGreedy,
    Interactions,
    LoGra,
    ProjectedGram,
    RegressionLoss,
    Store,
)
from lightning_influence.capture import find_components
from lightning_influence.errors import NotFittedError
from tests import oracles
from tests.curvature import oracles_second_order as dense
from tests.curvature.models import Tokens, loss_of, mlp, normal, points, ready, texts, truth

TRAIN, TARGETS = points(15), points(4, seed=3)
GROUPS: list[Any] = [[0], [3, 1], [7, 2, 5, 0, 11], []]
CHANGES = ("removal", "addition")
DAMPING = 0.4


def softmax_regression() -> nn.Module:
    return mlp(nn.Linear(3, 3))


def gradients(model: nn.Module, data: list[Any], seed: int | None = None) -> Tensor:
    """[n, P], the bias as a column of the weight; labels drawn when there is a seed."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return torch.cat([truth(model, name, data, seed).gradients.flatten(1) for name in names], dim=1)


def second_order(model: nn.Module, data: list[Any], kind: str) -> Tensor:
    """Dense mean Gauss-Newton matrix or Hessian in the same order of parameters."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    if kind == "hessian":
        matrix = dense.hessian(parameters, [lambda k=k: loss_of(model, data[k], k) for k in range(len(data))])  # type: ignore[misc]
    else:
        outputs = [lambda x=x: model(x[None])[0] for x, _ in data]  # type: ignore[misc]
        matrix = dense.gauss_newton(parameters, outputs, dense.softmax_curve)
    start, order = 0, []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            (o, i), size = module.weight.shape, module.weight.numel()
            places = torch.arange(start, start + size).reshape(o, i)
            start += size
            if module.bias is not None:
                places = torch.cat([places, torch.arange(start, start + o)[:, None]], dim=1)
                start += o
            order += places.flatten().tolist()
    return matrix[order][:, order].detach()


def target_matrix(model: nn.Module, kind: str) -> Tensor:
    if kind in ("empirical", "sampled"):
        return oracles.fisher(gradients(model, TARGETS, 0 if kind == "sampled" else None))
    return second_order(model, TARGETS, kind)


def expected(model: nn.Module, target: Tensor, hessian: Tensor, own: Tensor, change: str, method: str) -> Tensor:
    pieces = (gradients(model, TRAIN), hessian, own, gradients(model, TARGETS).mean(0), target)
    return torch.tensor(
        [oracles.group_estimate(*pieces, group, method, change, 1 / 15) for group in GROUPS], dtype=torch.float64
    )


def assert_close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("build", [softmax_regression, mlp])
@pytest.mark.parametrize("kind", ["empirical", "sampled", "gauss-newton", "hessian"])
def test_every_target_curvature_equals_the_dense_formulas(build: Any, kind: Any) -> None:
    """H and H_S from sampled labels of the same seed, so that even large groups can be removed."""
    model = build()
    curvature = Exact(damping=DAMPING, seed=3)
    influence = GroupInfluence(model, curvature, kind, progress=False).fit(TRAIN, TARGETS)
    rows = gradients(model, TRAIN, 3)
    own = torch.stack([torch.outer(row, row) for row in rows])
    hessian = own.mean(0) + DAMPING * torch.eye(len(own[0]), dtype=torch.float64)
    target = target_matrix(model, kind)
    for change in CHANGES:
        for method, values in influence.table(GROUPS, change=change).items():
            assert_close(values, expected(model, target, hessian, own, change, method))


@pytest.mark.parametrize("kind", ["sampled", "empirical", "gauss-newton"])
def test_every_curvature_of_the_group_equals_the_dense_formulas(kind: Any) -> None:
    """H by conjugate gradients on exact products."""
    model = mlp()
    curvature = CG(damping=DAMPING, tolerance=1e-12)
    influence = GroupInfluence(model, curvature, group_curvature=kind, draws=2, progress=False).fit(TRAIN, TARGETS)
    hessian = second_order(model, TRAIN, "gauss-newton")
    hessian = hessian + DAMPING * torch.eye(len(hessian), dtype=torch.float64)
    if kind == "gauss-newton":
        own = torch.stack([second_order(model, [row], "gauss-newton") for row in TRAIN])
    else:
        draws = [gradients(model, TRAIN, seed) for seed in ((0, 1) if kind == "sampled" else (None,))]
        own = torch.stack([rows.T @ rows / len(draws) for rows in torch.stack(draws, dim=1)])
    target = target_matrix(model, "empirical")
    for change in CHANGES:
        for method, values in influence.table(GROUPS, change=change).items():
            assert_close(values, expected(model, target, hessian, own, change, method))


@pytest.mark.parametrize("curvature", [EKFAC(damping=0.5), KFAC(damping=0.5), Diagonal(damping=0.5), Identity()])
@pytest.mark.parametrize("target", [EKFAC(), KFAC(seed=2), Identity()])
def test_factored_curvatures_on_either_side(curvature: Any, target: Any) -> None:
    """H⁻¹ and H_f as dense matrices, from unit vectors."""
    model = mlp()
    influence = GroupInfluence(model, type(curvature)(**curvature.settings()), type(target)(**target.settings()))
    influence.fit(TRAIN, TARGETS)
    components = influence.components
    sizes = [c.numel for c in components]

    def matrix(function: Any) -> Tensor:
        parts = torch.split(torch.eye(sum(sizes)).double(), sizes, dim=1)
        given = {c.name: p.reshape(-1, *c.shape) for c, p in zip(components, parts, strict=True)}
        return torch.cat([function(given)[c.name].flatten(1) for c in components], dim=1)

    hessian = torch.linalg.inv(matrix(influence.curvature.precondition))
    fitted: Any = influence.target_curvature
    own = torch.stack([torch.outer(row, row) for row in gradients(model, TRAIN, 0)])
    if isinstance(target, EKFAC):
        blocks = [truth(model, name, TARGETS, 0) for name in ("0", "2")]
        oracle = torch.block_diag(*(oracles.ekfac(block.factors, block.gradients) for block in blocks))
        torch.testing.assert_close(matrix(fitted.multiply), oracle)
    for change in CHANGES:
        for method, values in influence.table(GROUPS, change=change).items():
            assert_close(values, expected(model, matrix(fitted.multiply), hessian, own, change, method))


@pytest.mark.parametrize("kind", ["empirical", "sampled", "gauss-newton"])
def test_in_the_projected_space(kind: Any) -> None:
    """LoGra: everything with P g in place of g, and P H_f Pᵀ."""
    model = mlp()
    curvature = ProjectedGram((2, 3), damping=DAMPING, projection_seed=4)
    influence = GroupInfluence(model, curvature, kind, progress=False).fit(TRAIN, TARGETS)
    logra = LoGra((2, 3), seed=4).start(influence.components)
    p = torch.block_diag(
        *(torch.kron(*(logra.matrix(c, side).double() for side in ("outputs", "inputs"))) for c in influence.components)
    )
    rows, own = gradients(model, TRAIN) @ p.T, gradients(model, TRAIN, 0) @ p.T
    blocks = [own[:, part].T @ own[:, part] / 15 for part in logra.slices.values()]
    hessian = torch.block_diag(*blocks) + DAMPING * torch.eye(len(p), dtype=torch.float64)
    member = torch.stack([torch.outer(row, row) for row in own])
    pieces = (rows, hessian, member, p @ gradients(model, TARGETS).mean(0), p @ target_matrix(model, kind) @ p.T)
    for change in CHANGES:
        for method, values in influence.table(GROUPS, change=change).items():
            truths = [oracles.group_estimate(*pieces, group, method, change, 1 / 15) for group in GROUPS]
            assert_close(values, torch.tensor(truths, dtype=torch.float64))


@pytest.mark.parametrize("curvature", [EKFAC(damping=0.5), ProjectedGram((2, 2), damping=0.5)])
def test_first_order_and_interactions_are_those_of_the_scores(curvature: Any) -> None:
    model = mlp()
    influence = GroupInfluence(model, curvature, progress=False).fit(TRAIN, TARGETS)
    scores = InfluenceFunction(model, curvature, progress=False).score(TARGETS, TRAIN)
    plain = Interactions.from_scores(scores)
    for method, interactions in (("F", False), ("F+I", True)):
        for change in CHANGES:
            found = influence.estimates(GROUPS, method, change)  # type: ignore[arg-type]
            assert_close(found, plain.estimates(GROUPS, change, interactions))  # type: ignore[arg-type]
    torch.testing.assert_close(influence.interactions().pairwise(range(15)), plain.pairwise(range(15)))


def test_linear_regression_is_retrained_exactly() -> None:
    """From a model and data to the exact new minimum: one output, so its Gauss-Newton factor is x itself."""
    x, y, decay = normal(20, 3), normal(20, 1, seed=1), 0.05

    def fitted(counts: Tensor) -> Tensor:
        weighted = x.T * counts / 20
        return torch.linalg.solve(weighted @ x + decay * torch.eye(3, dtype=torch.float64), weighted @ y)[:, 0]

    theta = fitted(torch.ones(20).double())
    model = mlp(nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(theta[None])
    train = list(zip(x, y, strict=True))
    targets = list(zip(normal(6, 3, seed=2), normal(6, 1, seed=3), strict=True))
    influence = GroupInfluence(
        model, CG(damping=decay, tolerance=1e-13), "hessian", RegressionLoss(), group_curvature="gauss-newton"
    ).fit(train, targets)

    def target_loss(weights: Tensor) -> float:
        return sum(0.5 * float((row @ weights - value) ** 2) for row, value in targets) / 6

    for change, step in (("removal", -1), ("addition", 1)):
        for group in ([4], [1, 5, 7], list(range(0, 20, 2))):
            counts = torch.ones(20).double()
            counts[group] += step
            actual = target_loss(fitted(counts)) - target_loss(theta)
            assert influence.estimate(group, "N+I", change) == pytest.approx(actual, abs=1e-10)  # type: ignore[arg-type]


@pytest.mark.parametrize("examples", [1, 2, 5])
def test_memory_and_batches_do_not_matter(examples: int) -> None:
    """Groups are worked on as few at a time as memory asks for, and again in other calls."""
    model, groups = mlp(), [[0], [3, 1], [2], [3, 4, 1, 9, 8], [14, 0]]
    groups = [group[:examples] for group in groups]
    whole = GroupInfluence(model, EKFAC(damping=0.5), progress=False).fit(TRAIN, TARGETS)
    budget = examples * 3 * 28 * 8  # 28 parameters; the gradient, and one drawn row before and after H⁻¹
    small = GroupInfluence(
        model, EKFAC(damping=0.5), batch_size=2, memory_budget=max(budget, 4 * 28 * 8), progress=False
    ).fit(TRAIN, TARGETS)
    for method, values in small.table(groups).items():
        assert_close(values, whole.table(groups)[method])
        assert_close(small.estimates(groups[::-1], method), values.flip(0))
    torch.testing.assert_close(small.interactions().pairwise([4, 2]), whole.interactions([2, 9, 4]).pairwise([4, 2]))


def test_a_permuted_training_set() -> None:
    order = [4, 0, 14, 8, 2, 6, 1, 13, 5, 3, 7, 11, 9, 10, 12]
    settings: Any = {"group_curvature": "empirical", "progress": False}
    one = GroupInfluence(mlp(), Exact(damping=DAMPING, fisher="empirical"), **settings).fit(TRAIN, TARGETS)
    other = GroupInfluence(mlp(), Exact(damping=DAMPING, fisher="empirical"), **settings).fit(
        [TRAIN[k] for k in order], TARGETS[::-1]
    )
    moved = [[order.index(name) for name in group] for group in GROUPS]
    for method, values in one.table(GROUPS).items():
        assert_close(other.estimates(moved, method), values)


def test_a_pool_beside_the_training_data() -> None:
    """Groups of new examples at the weight of the training examples."""
    model, pool = mlp(), points(6, seed=8)
    influence = GroupInfluence(model, Exact(damping=DAMPING), progress=False).fit(TRAIN, TARGETS, pool)
    curvature = Exact(damping=DAMPING).fit(model, TRAIN)
    alone = GroupInfluence(model, curvature, progress=False).fit(pool, TARGETS, weight=1 / 15)
    assert_close(influence.estimates([[0, 5]], "N+I", "addition"), alone.estimates([[0, 5]], "N+I", "addition"))
    assert len(influence.interactions()) == 6
    with pytest.raises(ValueError, match=re.escape("expected a group of the 6 examples it was made of. Unknown: id 6")):
        influence.estimate([6])


def test_views_and_selection_come_from_the_interactions() -> None:
    for target in ("sampled", "gauss-newton"):
        influence = GroupInfluence(mlp(), EKFAC(damping=0.5), target, progress=False).fit(TRAIN, TARGETS)  # type: ignore[arg-type]
        interactions = influence.interactions()
        assert interactions.target_curvature == {"sampled": "sampled Fisher"}.get(target, target)
        labels = [int(y) for _, y in TRAIN]
        assert interactions.mean_interactions(labels).labels == (0, 1, 2)
        selection = interactions.select(InteractionGreedy(), 3)
        found = influence.estimate(selection.ids, "F+I", "addition")
        assert selection.objective == pytest.approx(found, abs=1e-12)
        assert interactions.damping == "0.5"


@pytest.mark.parametrize("build", [softmax_regression, mlp])
@pytest.mark.parametrize("method", ["F+B", "F+I+B"])
def test_pairs_of_the_second_order_are_those_of_the_estimate(build: Any, method: Any) -> None:
    """With the empirical Fisher of the added rows, against dense matrices, for some rows and for a rule's picks."""
    model = build()
    influence = GroupInfluence(model, Exact(damping=DAMPING, seed=3), group_curvature="empirical", progress=False)
    influence.fit(TRAIN, TARGETS)
    own = torch.stack([torch.outer(row, row) for row in gradients(model, TRAIN)])
    hessian = oracles.fisher(gradients(model, TRAIN, 3)) + DAMPING * torch.eye(len(own[0]), dtype=torch.float64)
    target = target_matrix(model, "empirical")
    pairs = influence.interactions(method=method)
    for change in CHANGES:
        found = pairs.estimates(GROUPS, change)  # type: ignore[arg-type]
        assert_close(found, expected(model, target, hessian, own, change, method))
        part = influence.interactions([9, 3, 1, 4], method).estimate([3, 1], change)  # type: ignore[arg-type]
        assert part == pytest.approx(float(found[1]))
    picked = pairs.select(InteractionGreedy(), 4)
    assert picked.objective == pytest.approx(influence.estimate(picked.ids, method, "addition"), abs=1e-12)


def test_language_models() -> None:
    """Sequences of unequal length with masked labels; sampled and empirical Fishers, factored gradients."""
    model, train, targets = ready(Tokens()), texts(10), texts(3, seed=5)
    influence = GroupInfluence(model, EKFAC(damping=1.0), components=["up", "head"], progress=False)
    table = influence.fit(train, targets).table([[0, 3], range(4)])
    assert all(values.isfinite().all() for values in table.values())
    scores = InfluenceFunction(model, influence.curvature).score(targets, train)
    assert_close(table["F+I"], Interactions.from_scores(scores).estimates([[0, 3], range(4)]))


def test_members_without_a_label_change_nothing() -> None:
    train = [(TRAIN[0][0], torch.tensor(-100)), *TRAIN[1:]]
    influence = GroupInfluence(mlp(), Exact(damping=DAMPING), progress=False).fit(train, TARGETS)
    for values in influence.table([[0], [0, 3], [3]]).values():
        assert float(values[0]) == 0
        assert float(values[1]) == pytest.approx(float(values[2]))


def test_from_a_store(tmp_path: Any) -> None:
    model = mlp()
    curvature = EKFAC(damping=0.5).fit(model, TRAIN)
    store = Store.create(tmp_path, model, find_components(model))
    store.write_curvature("curvature", curvature)
    found = GroupInfluence.from_store(model, tmp_path, target_curvature="sampled", progress=False).fit(TRAIN, TARGETS)
    known = GroupInfluence(model, curvature, "sampled", progress=False).fit(TRAIN, TARGETS)
    assert torch.equal(found.estimates(GROUPS), known.estimates(GROUPS))


# Bad input


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_curvature": "fisher"},
            "(target_curvature='fisher')`: expected one of 'empirical', 'sampled', 'gauss-",
        ),
        (
            {"target_curvature": ProjectedGram()},
            "expected 'empirical' or 'sampled', which are Fishers in the projected",
        ),
        ({"group_curvature": "hessian"}, "(group_curvature='hessian')`: expected 'sampled', 'empirical', 'gauss-"),
        ({"draws": 0}, "(draws=0)`: expected an int >= 1."),
        ({"memory_budget": "1GB"}, "`GroupInfluence(memory_budget='1GB')`: expected a number of bytes, an int >= 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with refused(message):
        GroupInfluence(mlp(), **options)


def test_questions_that_are_refused_before_any_pass() -> None:
    influence = GroupInfluence(mlp(), Exact(damping=DAMPING), progress=False)
    with pytest.raises(NotFittedError, match=re.escape("`GroupInfluence.estimates`: call fit(train, targets) first.")):
        influence.estimate([0])
    influence.fit(TRAIN, TARGETS)
    with refused("`GroupInfluence`: expected a group of the 15 examples it was made of. Unknown: ids 15, 'a'."):
        influence.estimates([[0], [15, "a"]])
    with refused("`GroupInfluence`: expected the ids of each group in a list, as [[3, 4]]. Got 3 for a group."):
        influence.estimates([3, 4])
    with refused("`GroupInfluence`: expected each example of a group once. Repeated: id 3."):
        influence.estimates([[3, 1, 3]])
    with refused("`GroupInfluence.estimates(method='X')`: expected one of 'F', 'F+I', 'F+B', 'F+I+B', 'N', 'N+I'."):
        influence.estimates([[0]], "X")  # type: ignore[arg-type]
    with refused("`GroupInfluence.fit(weight=-1)`: expected a number > 0"):
        influence.fit(TRAIN, TARGETS, weight=-1)


def test_too_little_damping_for_a_removal() -> None:
    """The message names the group and a damping that suffices."""
    settings: Any = {"group_curvature": "empirical", "progress": False}
    weak = GroupInfluence(mlp(), Exact(damping=0.01), **settings).fit(TRAIN, TARGETS)
    with refused("removing the group of ids 7, 2, 5, 0, 11 (5 in all) takes away more curvature") as caught:
        weak.estimates([GROUPS[2]])
    assert "to the damping (0.01), which is sufficient" in str(caught.value)
    extra = float(re.search(r"Add more than (\S+)", str(caught.value)).group(1))  # type: ignore[union-attr]
    enough = GroupInfluence(mlp(), Exact(damping=0.01 + 1.01 * extra), **settings).fit(TRAIN, TARGETS)
    assert enough.estimates([GROUPS[2]]).isfinite().all()


def test_too_little_memory() -> None:
    with refused(
        "`GroupInfluence(target_curvature='empirical')`: the gradients of 4 targets need 8.96e-07 GB; expected"
    ):
        GroupInfluence(mlp(), EKFAC(), memory_budget=800, progress=False).fit(TRAIN, TARGETS)
    influence = GroupInfluence(mlp(), EKFAC(), "gauss-newton", memory_budget=1500, progress=False).fit(TRAIN, TARGETS)
    assert influence.estimates([[0], [1], [2]], "F+I").isfinite().all()
    with refused("`GroupInfluence`: the gradients of 3 examples need 2.02e-06 GB; expected at most memory_budget=1500"):
        influence.estimates([[0, 1, 2]])


def test_data_that_is_refused() -> None:
    silent = [(x, torch.tensor(-100)) for x, _ in points(2)]
    with refused("2 of 2 queries have no supervised target (ids [0, 1])"):
        GroupInfluence(mlp(), progress=False).fit(TRAIN, silent)
    with refused("Tokens returns outputs of shape (1, 6, 7); expected [n] or [n, o] with o <= 128"):
        GroupInfluence(ready(Tokens()), group_curvature="gauss-newton", progress=False).fit(texts(4), texts(2))
    fitted = EKFAC().fit(mlp(), TARGETS, components=["0"])
    with refused("was fitted on other components. Expected those of the curvature, or an unfitted one."):
        GroupInfluence(mlp(), target_curvature=fitted, progress=False).fit(TRAIN, TARGETS)


def test_budgets_of_the_fit_are_passed_on() -> None:
    expected = GroupInfluence(mlp(), EKFAC(), progress=False).fit(TRAIN, TARGETS).estimates([[0, 1]], "F+I")
    found = GroupInfluence(mlp(), EKFAC(), progress=False).fit(TRAIN, TARGETS, memory_budget=10**7)
    torch.testing.assert_close(found.estimates([[0, 1]], "F+I"), expected)
    with refused("`fit(disk_budget='1GB')`: expected a number of bytes"):
        GroupInfluence(mlp(), EKFAC(), progress=False).fit(TRAIN, TARGETS, disk_budget="1GB")
