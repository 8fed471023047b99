"""The laws of the family, for every member."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence.capture import ExampleLoader, GradientCapture, RegressionLoss, find_components
from lightning_influence.curvature import CG, CURVATURES, EKFAC, Curvature, IterativeCurvature, LiSSA
from lightning_influence.curvature.base import loss_for, symmetric
from lightning_influence.errors import NotFittedError
from lightning_influence.store import Store
from tests.curvature.models import Mixed, labels, mlp, normal, points, ready, token_rows

DATA = token_rows(11)
MEMBERS = sorted(CURVATURES)
# Arnoldi's solutions stay in a subspace, whatever the damping.
DAMPED = [name for name in MEMBERS if "damping" in CURVATURES[name]().settings() and name != "Arnoldi"]
FITTED = [name for name in MEMBERS if CURVATURES[name].num_passes]
SMALL: dict[str, dict[str, Any]] = {"Arnoldi": {"rank": 4, "steps": 30}}


def fitted(name: str, data: Any = DATA, batch_size: int | None = 4, **options: Any) -> Curvature:
    return CURVATURES[name](**SMALL.get(name, {}), **options).fit(ready(Mixed()), data, batch_size=batch_size)


def vectors(q: int = 3, seed: int = 5) -> dict[str, Tensor]:
    return {c.name: normal(q, *c.shape, seed=seed + k) for k, c in enumerate(find_components(ready(Mixed())))}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten(1) for name in sorted(gradients)], dim=1)


def solved(curvature: Curvature, gradients: dict[str, Tensor] | None = None) -> Tensor:
    """All blocks apart, then all together."""
    gradients = vectors() if gradients is None else gradients
    apart = {c.name: curvature.solve(c, gradients[c.name]) for c in curvature.components or find_components(Mixed())}
    return torch.cat([flat(apart), flat(curvature.precondition(gradients))])


def assert_same(one: Curvature, other: Curvature) -> None:
    torch.testing.assert_close(solved(one), solved(other), rtol=1e-8, atol=1e-10)


def test_the_list_holds_every_member() -> None:
    found: set[type[Curvature]] = set()
    classes = [Curvature]
    while classes:
        classes = [child for parent in classes for child in parent.__subclasses__()]
        found |= {c for c in classes if not c.__abstractmethods__ and c.__module__.startswith("lightning_influence.")}
    # What cannot be stored has its laws in test_iterative.py.
    assert {c for c in found if c.__name__ != "KroneckerCurvature"} == {*CURVATURES.values(), CG, LiSSA}
    assert all(CURVATURES[name].__name__ == name for name in CURVATURES)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("batch_size", [1, 3, 11])
def test_batch_size_does_not_matter(name: str, batch_size: int) -> None:
    assert_same(fitted(name), fitted(name, batch_size=batch_size))


@pytest.mark.parametrize("name", MEMBERS)
def test_order_does_not_matter(name: str) -> None:
    order = torch.randperm(len(DATA), generator=torch.Generator().manual_seed(3)).tolist()
    assert_same(fitted(name), fitted(name, ExampleLoader(DATA, indices=order)))


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("shards", [[range(4), range(4, 11)], [range(1), range(1, 2), range(2, 11)]])
def test_shards_do_not_matter(name: str, shards: list[range]) -> None:
    model = ready(Mixed())
    parts = [CURVATURES[name](**SMALL.get(name, {})) for _ in shards]
    with GradientCapture(model) as capture:
        for part in parts:
            part.start(capture.components)
        for _ in range(parts[0].num_passes):
            for part, rows in zip(parts, shards, strict=True):
                for ids, batch in ExampleLoader(DATA, 4, indices=rows):
                    part.observe(capture, ids, batch)
            parts[0].merge(parts[1:])
            for part in parts[1:]:  # what an all-reduce does
                for key, total in parts[0].partial().items():
                    part.partial()[key].copy_(total)
            for part in parts:
                part.finish_pass()
    for part in parts:
        if isinstance(part, IterativeCurvature):
            assert not part.fitted
            part.bind(model, ExampleLoader(DATA, 4))
        assert part.fitted
        assert_same(fitted(name), part)


@pytest.mark.parametrize("name", MEMBERS)
def test_solving_is_linear_symmetric_and_positive(name: str) -> None:
    curvature, one, other = fitted(name), vectors(seed=1), vectors(seed=40)
    mixed = {key: 2.0 * one[key] - 0.5 * other[key] for key in one}
    torch.testing.assert_close(solved(curvature, mixed), 2 * solved(curvature, one) - 0.5 * solved(curvature, other))
    left, right = torch.cat([flat(one)] * 2), torch.cat([flat(other)] * 2)
    for rows in (slice(0, 3), slice(3, 6)):
        crossed = left[rows] @ solved(curvature, other)[rows].T
        torch.testing.assert_close(crossed, solved(curvature, one)[rows] @ right[rows].T)
        assert ((left * solved(curvature, one)).sum(1) > 0).all()


@pytest.mark.parametrize("name", MEMBERS)
def test_gradients_are_solved_one_by_one_and_left_alone(name: str) -> None:
    curvature, gradients = fitted(name), vectors()
    copies = {key: value.clone() for key, value in gradients.items()}
    whole = solved(curvature, gradients)
    assert all(torch.equal(gradients[key], copies[key]) for key in copies)
    single = [solved(curvature, {key: value[k : k + 1] for key, value in gradients.items()}) for k in range(3)]
    torch.testing.assert_close(whole, torch.cat([row[:1] for row in single] + [row[1:] for row in single]))
    for component in curvature.components:
        assert curvature.solve(component, gradients[component.name]).shape == (3, *component.shape)


@pytest.mark.parametrize("name", [name for name in MEMBERS if name != "Arnoldi"])  # which has products alone
@pytest.mark.parametrize("batch_size", [3, 11])
def test_whitening_is_a_root_of_solving(name: str, batch_size: int) -> None:
    curvature, model = fitted(name), ready(Mixed())
    loss = loss_for(model, ExampleLoader(DATA), None)
    together, apart, gradients = [], [], []
    with GradientCapture(model) as capture:
        for ids, batch in ExampleLoader(DATA, batch_size):
            records = list(capture.record(batch, loss.losses, ids, loss.position_mask(batch), len(ids)))
            pairs = list(zip(capture.components, records, strict=True))
            together.append(curvature.whitened(pairs))
            apart.append([curvature.whiten(*pair) for pair in pairs])
            gradients.append([record.example_gradients() for record in records])
        components = capture.components
    whole = {c.name: torch.cat(rows) for c, rows in zip(components, zip(*gradients, strict=True), strict=True)}
    for component, rows in zip(components, zip(*apart, strict=True), strict=True):
        found, mine = torch.cat(rows), whole[component.name]
        assert found.shape == (len(DATA), curvature.whitened_size(component))
        torch.testing.assert_close(found @ found.T, curvature.solve(component, mine).flatten(1) @ mine.flatten(1).T)
    found = torch.cat(together)
    torch.testing.assert_close(found @ found.T, flat(curvature.precondition(whole)) @ flat(whole).T)


@pytest.mark.parametrize("curvature", [CG(), LiSSA(), CURVATURES["Arnoldi"]()], ids=repr)
def test_what_has_products_alone_cannot_whiten(curvature: Curvature) -> None:
    [component, *_] = find_components(ready(Mixed()))
    with pytest.raises(
        ValueError, match=r"whiten`: a curvature that is known by its products alone has no square root"
    ):
        curvature.whitened_size(component)


@pytest.mark.parametrize("name", DAMPED)
def test_large_damping_only_scales(name: str) -> None:
    gradients = vectors()
    expected = torch.cat([flat(gradients)] * 2)
    torch.testing.assert_close(1e12 * solved(fitted(name, damping=1e12), gradients), expected)
    torch.testing.assert_close(
        solved(fitted(name, damping=1e-3)), solved(fitted(name, damping_share=5.0, damping=1e-3))
    )


@pytest.mark.parametrize("name", MEMBERS)
def test_settings_and_state_are_everything(name: str) -> None:
    curvature = fitted(name)
    twin = type(curvature)(**curvature.settings())
    assert repr(twin) == repr(curvature)
    twin.load_state(curvature.components, curvature.state())
    assert twin.fitted
    assert twin.components == curvature.components
    assert torch.equal(solved(twin), solved(curvature))


@pytest.mark.parametrize("name", FITTED)
def test_an_example_with_a_gradient_that_is_no_number_is_named(name: str) -> None:
    """Its loss is finite: tanh sees to that."""
    data = points(11)
    data[6] = (torch.tensor([0.0, float("inf"), 0.0]).double(), data[6][1])
    curvature = CURVATURES[name](**SMALL.get(name, {}))
    with pytest.raises(ValueError, match=r"the gradient of 1 of 4 examples by '0' is not finite.* \(ids \[6\]\)"):
        curvature.fit(mlp(), data, batch_size=4)
    assert not curvature.fitted


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize(("own", "given"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_gradients_may_be_of_another_precision(name: str, own: torch.dtype, given: torch.dtype) -> None:
    """What comes back is of theirs."""
    curvature = CURVATURES[name](**SMALL.get(name, {})).fit(ready(Mixed()).to(own), DATA)
    same, other = ({key: value.to(dtype) for key, value in vectors().items()} for dtype in (own, given))
    for call in (lambda g: solved(curvature, g), lambda g: flat(curvature.multiply(g))):
        assert call(other).dtype == given
        torch.testing.assert_close(call(other).to(own), call(same), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("shard_bytes", [1 << 29, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_store_gives_back_the_same_bits(name: str, shard_bytes: int, dtype: torch.dtype, tmp_path: Any) -> None:
    model = ready(Mixed()).to(dtype)
    curvature = CURVATURES[name]().fit(model, DATA)
    store = Store.create(tmp_path, model, find_components(model))
    store.write_curvature("c", curvature, max_shard_bytes=shard_bytes)
    found = Store.open(tmp_path).read_curvature("c")
    assert type(found) is type(curvature)
    assert found.components == curvature.components
    gradients = {key: value.to(dtype) for key, value in vectors().items()}
    assert torch.equal(solved(found, gradients), solved(curvature, gradients))


@pytest.mark.parametrize("name", FITTED)
def test_nothing_is_known_before_the_data(name: str) -> None:
    curvature = CURVATURES[name]()
    components = find_components(ready(Mixed()))
    uses = [
        lambda: curvature.solve(components[0], vectors()[components[0].name]),
        lambda: curvature.precondition(vectors()),
        lambda: curvature.state(),
    ]
    for start in (lambda: None, lambda: curvature.start(components)):
        start()
        for use in uses:
            with pytest.raises(NotFittedError, match=rf"{name} has not seen its data yet: call fit\(model, data\)"):
                use()
    assert not curvature.fitted


@pytest.mark.parametrize("name", FITTED)
def test_a_pass_needs_data(name: str) -> None:
    curvature = CURVATURES[name]()
    curvature.start(find_components(ready(Mixed())))
    with pytest.raises(ValueError, match=rf"`{name}.finish_pass\(\)`: .*expected at least one example"):
        curvature.finish_pass()
    done = fitted(name)
    with pytest.raises(ValueError, match="expected at least one example"):
        done.finish_pass()


@pytest.mark.parametrize("name", FITTED)
def test_parts_that_do_not_fit_are_not_merged(name: str) -> None:
    model, parts = ready(Mixed()), [CURVATURES[name]() for _ in range(2)]
    with GradientCapture(model) as capture:
        for part in parts:
            part.start(capture.components)
        ids, batch = next(iter(ExampleLoader(DATA, 4)))
        parts[0].observe(capture, ids, batch)
    if name != "Exact":  # whose sums are there from the start
        for one, other in (parts, parts[::-1]):
            with pytest.raises(ValueError, match=rf"`{name}.merge`: only one of two parts has .*at least one example"):
                one.merge([other])
    parts[1].merge([])


@pytest.mark.parametrize("name", FITTED)
def test_fitting_again_forgets(name: str) -> None:
    curvature = fitted(name, token_rows(5, seed=9))
    assert_same(curvature.fit(ready(Mixed()), DATA, batch_size=4), fitted(name))


@pytest.mark.parametrize("name", FITTED)
def test_sampled_labels_depend_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    one = fitted(name)
    torch.manual_seed(2)
    assert_same(one, fitted(name, seed=0, fisher="sampled"))
    for other in (fitted(name, seed=1), fitted(name, fisher="empirical")):
        assert not torch.allclose(solved(one), solved(other), rtol=1e-2)


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0}, r"damping=0\)`: expected a number > 0, or None"),
        ({"damping": float("nan")}, r"damping=nan\)`: expected a number > 0"),
        ({"damping": "0.1"}, r"damping='0.1'\)`: expected a number > 0"),
        ({"damping_share": -0.1}, r"damping_share=-0.1\)`: expected a finite number > 0, for example 0.1"),
        ({"damping_share": float("inf")}, r"damping_share=inf\)`: expected a finite number > 0"),
        ({"fisher": "true"}, r"fisher='true'\)`: expected 'sampled' .* or 'empirical'"),
        ({"seed": "1"}, r"seed='1'\)`: expected an int"),
        ({"seed": True}, r"seed=True\)`: expected an int"),
    ],
)
def test_arguments(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}\({message}"):
        CURVATURES[name](**options)


@pytest.mark.parametrize("name", MEMBERS)
def test_fitting_leaves_the_model_as_it_was(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    model[3].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    CURVATURES[name]().fit(model, [(x.float(), y) for x, y in points()])
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model] == [True, True, True, False]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", FITTED)
def test_an_example_without_a_finite_loss_is_named(name: str) -> None:
    data = points(9)
    data[7] = (data[7][0] * torch.nan, data[7][1])
    model = mlp()
    curvature = CURVATURES[name]()
    with pytest.raises(ValueError, match=r"the loss of 1 of 4 training examples is not finite \(ids \[7\]\)"):
        curvature.fit(model, data, batch_size=4)
    assert not curvature.fitted
    curvature.fit(model, points(9))
    assert curvature.fitted


@pytest.mark.parametrize("name", FITTED)
def test_an_empty_dataset_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the data is empty; expected at least one example"):
        CURVATURES[name]().fit(mlp(), [])


def test_a_batch_that_fits_two_losses_takes_that_of_the_first() -> None:
    """A last batch with the single target 1.0 alone could be a class."""
    data = [*zip(normal(4, 3), normal(4), strict=True), (normal(1, 3)[0], torch.tensor(1.0).double())]
    model = mlp(nn.Linear(3, 1))
    curvature = EKFAC(fisher="empirical").fit(model, data, batch_size=4)
    expected = EKFAC(fisher="empirical").fit(model, data, RegressionLoss())
    component = curvature.components[0]
    gradients = normal(2, *component.shape)
    torch.testing.assert_close(curvature.solve(component, gradients), expected.solve(component, gradients))
    loader = ExampleLoader(data, 4)
    assert isinstance(loss_for(model, loader, None), RegressionLoss)
    given = RegressionLoss()
    assert loss_for(model, loader, given) is given


def test_batch_size_of_a_loader_can_be_changed() -> None:
    sizes: list[int] = []

    def collate(rows: list[Any]) -> Any:
        sizes.append(len(rows))
        return torch.utils.data.default_collate(rows)

    EKFAC().fit(mlp(), ExampleLoader(points(6), 2, collate), batch_size=3)
    assert set(sizes) == {3}


def test_some_components_alone() -> None:
    model = ready(Mixed())
    curvature = EKFAC().fit(model, DATA, components=["up", "norm"])
    whole = EKFAC().fit(model, DATA)
    assert [c.name for c in curvature.components] == ["norm", "up"]
    for component in curvature.components:
        gradients = vectors()[component.name]
        torch.testing.assert_close(curvature.solve(component, gradients), whole.solve(component, gradients))


def test_labels_of_a_classifier_are_not_looked_at_when_sampled() -> None:
    data = token_rows(11)
    others = list(zip((tokens for tokens, _ in data), labels(11, 7, seed=3), strict=True))
    assert_same(fitted("EKFAC", data), fitted("EKFAC", others))


def test_repr_builds_a_twin() -> None:
    text = "EKFAC(damping=None, damping_share=0.1, fisher='sampled', seed=0, covariance_share=1.0, "
    text += "covariance_of='examples', max_width=None)"
    assert repr(EKFAC()) == text
    assert re.fullmatch(r"Identity\(\)", repr(CURVATURES["Identity"]()))


def test_symmetric() -> None:
    matrix = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    assert symmetric(matrix).tolist() == [[1.0, 3.0], [3.0, 3.0]]
    assert symmetric(matrix).dtype == torch.float64


@pytest.mark.parametrize("name", MEMBERS)
def test_multiplying_undoes_solving(name: str) -> None:
    """``G x + damping x = v`` for x that solves it; within Arnoldi's and LoGra's subspaces, v's part there."""
    curvature = fitted(name, damping=0.3) if "damping" in CURVATURES[name]().settings() else fitted(name)
    gradients = vectors()
    x = curvature.precondition(gradients)
    again = curvature.multiply(x)
    if name == "Identity":
        assert all(torch.equal(again[key], value) for key, value in gradients.items())
        return
    back = {key: again[key] + 0.3 * x[key] for key in x}
    if name in ("Arnoldi", "ProjectedGram"):
        back, gradients = curvature.precondition(back), x
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in x.items()}
    torch.testing.assert_close(flat(back), flat(gradients))
