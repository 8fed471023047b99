from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from trak.projectors import BasicProjector, ProjectionType

from lightning_influence.projections import TrakProjection
from tests.projections.cases import SHAPES, component, flat, record


class FakeCuda:
    """What CudaProjector of traker takes and gives, on the CPU."""

    built: list[dict[str, Any]]

    def __init__(self, **arguments: Any) -> None:
        self.built.append(arguments)
        self.size = arguments["proj_dim"]

    def project(self, gradients: torch.Tensor, model_id: int) -> torch.Tensor:
        assert gradients.dtype == torch.float32
        assert gradients.is_contiguous()
        return gradients.sum(1, keepdim=True) * torch.arange(self.size)


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else original(name, *rest)
    )


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_equals_the_projector_of_traker_divided_by_the_root_of_its_size(kind: Any) -> None:
    shape = (30, 20)
    one, found = component("layer", shape), record(shape, "factored")
    projection = TrakProjection(250, kind=kind, seed=4).start([one])
    theirs = BasicProjector(
        grad_dim=600,
        proj_dim=250,
        seed=projection._seed_of(one) % 2**31,
        proj_type=ProjectionType(kind),
        device=torch.device("cpu"),
    )
    expected = theirs.project(flat(found).float(), model_id=0) / 250**0.5
    torch.testing.assert_close(projection.project(one, found), expected)


@pytest.mark.parametrize("case", SHAPES)
def test_matrices_that_do_not_fit_are_drawn_again(case: str) -> None:
    """A budget of two matrices keeps one, of two equal components, and both come out as they did."""
    shape, kind = SHAPES[case]
    pair = [component("first", shape), component("second", shape)]
    found = record(shape, kind)
    numbers = [projection.project(c, found) for projection in [TrakProjection(10).start(pair)] for c in pair]
    tight = TrakProjection(10, memory_budget=2 * 4 * 5 * pair[0].numel).start(pair)
    for _ in range(3):
        assert all(torch.equal(tight.project(c, found), x) for c, x in zip(pair, numbers, strict=True))
        held = [p.proj_matrix_available for p in tight._projectors.values()]
        assert held == [True, False]


def test_the_matrix_in_use_takes_half_of_the_budget() -> None:
    one, found = component("layer", (30, 20)), record((30, 20), "factored")
    projection = TrakProjection(50, memory_budget=2 * 4 * 600 * 7).start([one])
    result = projection.project(one, found)
    [projector] = projection._projectors.values()
    assert (projector.block_size, projector.num_blocks) == (7, 8)
    assert not projector.proj_matrix_available
    assert torch.equal(projection.project(one, found), result)
    with pytest.raises(ValueError, match=r"memory_budget=4000\)`: one column .*'layer' takes 2,400 bytes.*least 4,800"):
        TrakProjection(50, memory_budget=4000).start([one])


def test_gradients_are_materialised_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one, found = component("layer", (30, 20)), record((30, 20), "factored", n=5)
    expected = TrakProjection(1).start([one]).project(one, found)
    sizes = []
    original = type(found).example_gradients

    def counted(self: Any) -> torch.Tensor:
        sizes.append(len(self))
        return original(self)

    monkeypatch.setattr(type(found), "example_gradients", counted)
    tight = TrakProjection(1, memory_budget=4 * 600 * 2).start([one])
    torch.testing.assert_close(tight.project(one, found), expected)
    assert sizes == [2, 2, 1]


def test_traker_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "trak")
    with pytest.raises(
        ModuleNotFoundError, match=r"`TrakProjection` needs .* trak, .* not installed: pip install traker$"
    ):
        TrakProjection(8)


def test_the_cuda_extension_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "fast_jl")
    with pytest.raises(ModuleNotFoundError, match=r"backend='cuda'\)` needs the package fast_jl.*traker\[fast\]"):
        TrakProjection(8, backend="cuda")
    projection = TrakProjection(8)
    assert not projection._on_cuda(torch.device("cpu"))
    with pytest.warns(UserWarning, match=r"slow BasicProjector on cuda: fast_jl is not installed. pip install"):
        assert not projection._on_cuda(torch.device("cuda"))
    assert not TrakProjection(8, backend="basic")._on_cuda(torch.device("cuda"))


def test_cuda_projector(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes 512 dimensions at a time, of which the first k are kept; scaled by the k that are kept."""
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: original("trak" if name == "fast_jl" else name, *rest)
    )
    monkeypatch.setattr("trak.projectors.CudaProjector", FakeCuda)
    monkeypatch.setattr(FakeCuda, "built", [], raising=False)
    one, found = component("layer", (30, 20)), record((30, 20), "factored")
    projection = TrakProjection(9, backend="cuda", kind="rademacher").start([one])
    with pytest.raises(ValueError, match=r"backend='cuda'\)`: the gradients are on 'cpu'. Move the model to a GPU"):
        projection.project(one, found)
    monkeypatch.setattr(projection, "_on_cuda", lambda device: True)
    result = projection.project(one, found)
    torch.testing.assert_close(result, flat(found).float().sum(1, keepdim=True) * torch.arange(9) / 3)
    assert FakeCuda.built[0]["proj_dim"] == 512
    assert FakeCuda.built[0]["proj_type"].value == "rademacher"
    assert 0 <= FakeCuda.built[0]["seed"] < 2**31
    projection.project(one, found)
    assert len(FakeCuda.built) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_backend_follows_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: original("trak" if name == "fast_jl" else name, *rest)
    )
    assert TrakProjection(8)._on_cuda(torch.device(device)) == (device == "cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "gauss"}, r"kind='gauss'\)`: expected 'normal' or 'rademacher'"),
        ({"backend": "gpu"}, r"backend='gpu'\)`: expected 'auto', 'basic' or 'cuda'"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"`TrakProjection\({message}"):
        TrakProjection(8, **options)
