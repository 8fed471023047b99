"""Dense random projection, component by component, through the projectors of the package traker."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.capture.component import Component
from lightning_influence.capture.contexts import full_precision
from lightning_influence.capture.record import LayerRecord
from lightning_influence.projections.base import Projection, pieces

INSTALL = "pip install traker"
INSTALL_CUDA = 'pip install "traker[fast]" (compiles a CUDA extension)'
COLUMNS = 100  # of the random matrix at a time, as in traker
CUDA_MULTIPLE = 512  # the CUDA projector computes so many dimensions at a time
CUDA_BATCH = 32

Backend = Literal["auto", "basic", "cuda"]
Kind = Literal["normal", "rademacher"]


class TrakProjection(Projection):
    """``p_c = R_c vec(g_c) / sqrt(k_c)``, R_c [k_c, |c|] with independent entries of variance 1 ([SP] section 3.3).

    The projection baseline of [SP]: BasicProjector of traker on the CPU, its CudaProjector on a GPU where the
    extension fast_jl is installed. Neither scales its result, hence the division. Gradients are materialised, and
    the random matrix is drawn anew for every batch where it does not fit into memory: expect it to cost far more
    than the forward and backward pass. Products are accumulated in float32, for float64 models too.

    Peak memory: ``memory_budget`` for random matrices (half of it for those that are kept, half for the one in use)
    and as much again for the gradients of a batch, at least one example's. The numbers drawn depend on the budget,
    which decides how many columns are drawn at a time, and on the backend.

    Args:
        dimensions: As in `Projection`.
        kind: Entries from N(0, 1) or signs.
        backend: ``"basic"``, ``"cuda"``, or ``"auto"``: cuda for records on a GPU if its extension is installed.
        seed: As in `Projection`.
        memory_budget: Bytes, see above.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If traker, or for ``backend="cuda"`` its extension, is not installed.
    """

    def __init__(
        self,
        dimensions: int | float,
        *,
        kind: Kind = "normal",
        backend: Backend = "auto",
        seed: int = 0,
        memory_budget: int = 2 * 1024**3,
    ) -> None:
        super().__init__(dimensions, seed=seed, memory_budget=memory_budget)
        if kind not in ("normal", "rademacher"):
            raise ValueError(f"`TrakProjection(kind={kind!r})`: expected 'normal' or 'rademacher'.")
        if backend not in ("auto", "basic", "cuda"):
            raise ValueError(f"`TrakProjection(backend={backend!r})`: expected 'auto', 'basic' or 'cuda'.")
        _require("trak", "TrakProjection", INSTALL)
        if backend == "cuda":
            _require("fast_jl", "TrakProjection(backend='cuda')", INSTALL_CUDA)
        self.kind = kind
        self.backend = backend
        self._projectors: dict[tuple[str, torch.device], Any] = {}

    def settings(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {**super().settings(), "kind": self.kind, "backend": self.backend}

    def _allocate(self, components: Sequence[Component]) -> dict[str, int]:
        large = max(components, key=lambda c: c.numel, default=None)
        if large is not None and 8 * large.numel > self.memory_budget:
            raise ValueError(
                f"`TrakProjection(memory_budget={self.memory_budget})`: one column of the random matrix of "
                f"{large.name!r} takes {4 * large.numel:,} bytes, and half of the budget is for the matrix in use. "
                f"Expected at least {8 * large.numel:,}; FactoredProjection needs no such matrix."
            )
        return super()._allocate(components)

    def _forget(self) -> None:
        super()._forget()
        self._projectors = {}

    @full_precision()
    def project(self, component: Component, record: LayerRecord) -> Tensor:
        """[n, k_c], float32."""
        size = self.size_of(component)
        projector = self._projector(component, record.device)
        parts: list[Tensor] = []
        for part in pieces(record, 4 * component.numel, self.memory_budget):
            gradients = part.example_gradients().flatten(1).float().contiguous()
            parts.append(projector.project(gradients, model_id=0)[:, :size])
        self._release(component, projector)
        return torch.cat(parts).mul_(size**-0.5)

    def _projector(self, component: Component, device: torch.device) -> Any:
        """The projector of a component, its matrix drawn."""
        key = (component.name, device)
        if key not in self._projectors:
            self._projectors[key] = self._build(component, device)
        projector = self._projectors[key]
        if not getattr(projector, "proj_matrix_available", True) and projector.num_blocks == 1:
            projector.generate_sketch_matrix(projector.generator_states[0])
        return projector

    def _build(self, component: Component, device: torch.device) -> Any:
        module = importlib.import_module("trak.projectors")
        size, numel = self.sizes[component.name], component.numel
        shared = {
            "grad_dim": numel,
            "seed": self._seed_of(component) % 2**31,  # the CUDA kernels take 32 bits
            "proj_type": module.ProjectionType(self.kind),
            "device": device,
        }
        if self._on_cuda(device):
            whole = -(-size // CUDA_MULTIPLE) * CUDA_MULTIPLE
            return module.CudaProjector(proj_dim=whole, max_batch_size=CUDA_BATCH, **shared)
        columns = min(COLUMNS, self.memory_budget // 2 // (4 * numel))
        return module.BasicProjector(proj_dim=size, block_size=columns, dtype=torch.float32, **shared)

    def _on_cuda(self, device: torch.device) -> bool:
        if self.backend == "basic" or (self.backend == "auto" and device.type != "cuda"):
            return False
        if device.type != "cuda":
            raise ValueError(
                f"`TrakProjection(backend='cuda')`: the gradients are on {device.type!r}. Move the model to a GPU, or "
                "take backend='basic'."
            )
        if self.backend == "auto" and importlib.util.find_spec("fast_jl") is None:
            warnings.warn(
                f"TrakProjection uses the slow BasicProjector on {device}: fast_jl is not installed. {INSTALL_CUDA}",
                stacklevel=4,
            )
            return False
        return True

    def _release(self, component: Component, projector: Any) -> None:
        """Keep a matrix that will be used again as it is, as far as half of the budget goes."""
        matrix = getattr(projector, "proj_matrix", None)
        if matrix is None:
            return
        key = (component.name, matrix.device)
        half = self._kept_bytes + matrix.nbytes <= self.memory_budget // 2
        if projector.num_blocks > 1 or (key not in self._kept and not half):
            projector.free_memory()
        elif key not in self._kept:
            self._keep(key, matrix.nbytes, lambda: matrix)


def _require(module: str, who: str, install: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"`{who}` needs the package {module}, which is not installed: {install}")
