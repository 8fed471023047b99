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

    def handles(self, module: nn.Module, parameters: Sequence[str]) -> bool:
        """nn.Embedding with its own forward; a maximal norm rescales rows in the forward pass, so not here."""
        plain = isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq
        return plain and type(module).forward is nn.Embedding.forward and super().handles(module, parameters)

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
        indices = call.input.reshape(len(ids), -1)
        gradients = widened(call.gradients[0]).reshape(*indices.shape, weight.shape[1])
        padding = module.padding_idx
        if isinstance(padding, int):
            gradients = torch.where((indices == padding).unsqueeze(-1), torch.zeros_like(gradients), gradients)
        return IndexedRecord(ids, indices, gradients, weight.shape[0])

    def split(self, module: nn.Module, parameters: Sequence[str], gradients: Tensor) -> dict[str, Tensor]:
        """The weight."""
        return {"weight": gradients}
