"""Look-up tables: nn.Embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_influence.capture.layers.base import LayerCall, LayerRule, widened
from lightning_influence.capture.record import IndexedRecord


class EmbeddingRule(LayerRule):
    """Row v of an example's gradient is the sum of the output gradients at the positions that hold token v."""

    module_types = (nn.Embedding,)
    kind = "embedding"

    def handles(self, module: nn.Module) -> bool:
        """nn.Embedding, but not scaled by the frequency of a token: that is another gradient."""
        return super().handles(module) and not module.scale_grad_by_freq

    def is_shared(self, inputs: Tensor, n: int) -> bool:
        """Position embeddings looked up once for all examples: indices [t], output [t, d]."""
        return inputs.dim() == 1 and len(inputs) != n

    def shape(self, module: nn.Module, parameters: Sequence[str]) -> tuple[int, ...]:
        """(V, d)."""
        return tuple(module.get_parameter("weight").shape)

    def record(
        self,
        module: nn.Module,
        parameters: Sequence[str],
        call: LayerCall,
        ids: Tensor,
        mask: Tensor | None,
    ) -> IndexedRecord:
        """Indices [n, t] and output gradients [n, t, d]; the padding row gets none."""
        weight = module.get_parameter("weight")
        gradients = widened(call.gradients[0])
        indices = call.input.expand(gradients.shape[:-1]).reshape(len(ids), -1)
        gradients = gradients.reshape(*indices.shape, weight.shape[1])
        padding = module.padding_idx
        if isinstance(padding, int):
            gradients = torch.where((indices == padding).unsqueeze(-1), torch.zeros_like(gradients), gradients)
        return IndexedRecord(ids, indices, gradients, weight.shape[0])

    def split(self, module: nn.Module, parameters: Sequence[str], gradients: Tensor) -> dict[str, Tensor]:
        """The weight."""
        return {"weight": gradients}
