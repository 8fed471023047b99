from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from lightning_influence.capture import ExampleLoader, GradientCapture, find_components
from lightning_influence.curvature import EKFAC, KFAC
from lightning_influence.errors import StoreError
from tests.curvature.models import Mixed, mlp, normal, points, ready, token_rows


def test_every_component_has_a_damping_of_its_own() -> None:
    """A share of its own mean eigenvalue: scaling the gradients of one layer does not touch the other."""
    model = mlp()
    curvature = EKFAC(damping_share=0.5).fit(model, points())
    for component in curvature.components:
        block = curvature.blocks[component.name]
        gradients = normal(2, *component.shape)
        expected = block.solve(gradients, 0.5 * float(block.eigenvalues().mean()))
        torch.testing.assert_close(curvature.solve(component, gradients), expected)


def test_absolute_damping_is_the_same_for_all() -> None:
    curvature = KFAC(damping=0.25).fit(mlp(), points())
    for component in curvature.components:
        gradients = normal(2, *component.shape)
        expected = curvature.blocks[component.name].solve(gradients, 0.25)
        assert torch.equal(curvature.solve(component, gradients), expected)


def test_a_component_without_any_gradient_is_left_alone() -> None:
    """Its loss never depends on it, so there is no curvature to divide by."""
    data = [(x * torch.tensor([1.0, 1.0, 0.0]).double(), y) for x, y in points()]
    model = mlp()
    with torch.no_grad():
        model[2].weight.zero_()  # nothing flows back to the first layer
    curvature = EKFAC(fisher="empirical").fit(model, data)
    component = curvature.components[0]
    gradients = normal(2, *component.shape)
    torch.testing.assert_close(curvature.solve(component, gradients), gradients)


def test_sums_are_named_by_component() -> None:
    curvature = EKFAC()
    assert curvature.partial() == {}
    curvature.fit(ready(Mixed()), token_rows())
    assert curvature.partial() == {}
    assert {key.split("/")[0] for key in curvature.state()} == {c.name for c in find_components(ready(Mixed()))}


def test_a_state_must_cover_all_components() -> None:
    curvature = EKFAC().fit(mlp(), points())
    state = curvature.state()
    part = {key: value for key, value in state.items() if not key.startswith("2/")}
    for components, tensors in ((curvature.components, part), (curvature.components[:1], state)):
        with pytest.raises(StoreError, match=r"EKFAC.load_state: only one of components and factors has \['2'\]"):
            EKFAC().load_state(components, tensors)


def test_the_batch_with_gradients_that_are_no_numbers_is_told() -> None:
    """The loss of example 5 is finite, its gradient is not: that of sqrt at 0. Who has the data is told more."""

    class Root(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).abs().sqrt()

    data = points(9)
    data[5] = (torch.zeros(3).double(), data[5][1])
    curvature = EKFAC(fisher="empirical")
    with GradientCapture(ready(Root())) as capture:
        curvature.start(capture.components)
        for ids, batch in ExampleLoader(data, 3):
            curvature.observe(capture, ids, batch)
    with pytest.raises(ValueError, match=r"not finite from the batch with ids \[3, 4, 5\] on, though every loss was"):
        curvature.finish_pass()
    with pytest.raises(ValueError, match=r"the gradient of 1 of 3 examples by 'layer' is not finite.*\(ids \[5\]\)"):
        curvature.fit(ready(Root()), data, batch_size=3)


def test_values_too_large_to_be_squared_are_told_in_words() -> None:
    data = points(4)
    data[2] = (torch.tensor([1e200, 0.0, 0.0]).double(), data[2][1])
    with pytest.raises(ValueError, match=r"not finite, or too large to be squared \(ids \[2\]\)"):
        EKFAC(fisher="empirical").fit(mlp(), data)


def test_sums_that_are_too_large_only_together() -> None:
    data = [(torch.full((3,), 5e153, dtype=torch.float64), y) for _, y in points(40)]
    with pytest.raises(ValueError, match=r"EKFAC.finish_pass\(\)`: the sums of \['0'\] are not finite from the batch"):
        EKFAC(fisher="empirical").fit(mlp(), data)


def share_the_work(rank: int, path: str) -> None:
    """One of two processes: its half of the data, its share of the decompositions."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=2)
    eigh, done = torch.linalg.eigh, []
    torch.linalg.eigh = lambda matrix: (done.append(len(matrix)), eigh(matrix))[1]
    curvature = EKFAC(max_width=3)
    with GradientCapture(ready(Mixed())) as capture:
        curvature.start(capture.components)
        for _ in range(2):
            for ids, batch in ExampleLoader(token_rows(16), 4, indices=range(rank, 16, 2)):
                curvature.observe(capture, ids, batch)
            for tensors in (curvature.partial, lambda: curvature.decompose(rank, 2)):
                for tensor in tensors().values():
                    dist.all_reduce(tensor)
            curvature.finish_pass()
    save_file({**curvature.state(), "done": torch.tensor(done)}, f"{path}/{rank}")
    dist.destroy_process_group()


def test_two_processes_share_the_decompositions(tmp_path: Path) -> None:
    """Each factor is decomposed by one of the two, and both have what one process has."""
    mp.start_processes(share_the_work, (str(tmp_path),), nprocs=2, start_method="fork")
    states = [load_file(tmp_path / str(rank)) for rank in range(2)]
    done = [state.pop("done").tolist() for state in states]
    alone = EKFAC(max_width=3).fit(ready(Mixed()), token_rows(16))
    factors = [len(value) for key, value in alone.state().items() if "basis" in key]
    assert sorted(done[0] + done[1]) == sorted(factors)
    assert all(done)
    for state in states:
        found = EKFAC(max_width=3)
        found.load_state(alone.components, state)
        assert all(torch.equal(value, states[0][key]) for key, value in state.items())
        for component in alone.components:
            gradients = normal(2, *component.shape)
            torch.testing.assert_close(found.solve(component, gradients), alone.solve(component, gradients))
