"""Layers with inputs for them, as tables that the contract tests of `capture` run through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LayerCase:
    """A layer, arguments for a batch of n examples, and how to take one example out of what goes in and out.

    Attributes:
        name: For the test's id.
        build: Makes the layer, which is then the only child of a model.
        inputs: n -> arguments of a batch.
        kind: Family that its components must have.
        argument_dims: Dimension of the examples in each leaf of the arguments (None: shared by all).
        output_dims: The same in each leaf of the output.
        tolerance: Agreement with an autograd loop in float64; less for layers that compute in float32 inside.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    kind: str
    argument_dims: tuple[int | None, ...] = (0, 0, 0, 0)
    output_dims: tuple[int, ...] = (0, 0, 0)
    tolerance: float = 1e-10

    def model(self) -> Around:
        torch.manual_seed(0)
        model = Around(self.build())
        with torch.no_grad():
            for parameter in model.parameters():  # no zeros and ones, behind which errors hide
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model.double().eval()

    def batch(self, n: int) -> tuple[Any, ...]:
        torch.manual_seed(n)
        return self.inputs(n)

    def alone(self, batch: tuple[Any, ...], k: int) -> tuple[Any, ...]:
        leaves, spec = pytree.tree_flatten(batch)
        dims = self.argument_dims
        return pytree.tree_unflatten(
            [x if d is None else x.narrow(d, k, 1) for x, d in zip(leaves, dims, strict=False)], spec
        )

    def losses(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """Every output of an example counts, each differently."""
        outputs = [y for y in pytree.tree_leaves(model(*batch)) if isinstance(y, Tensor)]
        rows = torch.cat([y.movedim(d, 0).flatten(1) for y, d in zip(outputs, self.output_dims, strict=False)], dim=1)
        return (rows.sin() * torch.linspace(0.5, 1.5, rows.shape[1], dtype=rows.dtype)).sum(1)

    def __str__(self) -> str:
        return self.name


class Around(nn.Module):
    """A model with one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        return self.layer(*args)


def normal(*shape: int) -> Callable[[int], tuple[Tensor]]:
    return lambda n: (torch.randn(n, *shape, dtype=torch.float64),)


def tokens(*shape: int, vocabulary: int = 5) -> Callable[[int], tuple[Tensor]]:
    return lambda n: (torch.randint(vocabulary, (n, *shape)),)


def only(layer: nn.Module, *trainable: str) -> nn.Module:
    """The layer with everything else frozen."""
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in trainable)
    return layer


class Beside(nn.Module):
    """A layer on an input that all examples share, beside numbers of their own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, shared: Tensor, own: Tensor) -> Tensor:
        output = self.layer(shared)
        return output * own.reshape(-1, *[1] * (output.dim() - 1))


def beside(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (torch.randn(*shape, dtype=torch.float64), torch.randn(n, dtype=torch.float64))


def positions(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(5)[None], torch.randn(n, dtype=torch.float64)


LINEAR = [
    LayerCase("linear-2d", lambda: nn.Linear(3, 4), normal(3), "linear"),
    LayerCase("linear-3d", lambda: nn.Linear(3, 4), normal(5, 3), "linear"),
    LayerCase("linear-4d", lambda: nn.Linear(3, 4), normal(2, 3, 3), "linear"),
    LayerCase("linear-no-bias", lambda: nn.Linear(3, 4, bias=False), normal(5, 3), "linear"),
    LayerCase("linear-bias-only", lambda: only(nn.Linear(3, 4), "bias"), normal(5, 3), "linear"),
    LayerCase("linear-weight-only", lambda: only(nn.Linear(3, 4), "weight"), normal(5, 3), "linear"),
    LayerCase("linear-shared-input", lambda: Beside(nn.Linear(3, 4)), beside(1, 5, 3), "linear", (None, 0)),
    LayerCase("linear-shared-input-2d", lambda: Beside(nn.Linear(3, 4)), beside(1, 3), "linear", (None, 0)),
    LayerCase("conv1d-of-transformers", lambda: Conv1D(4, 3), normal(5, 3), "linear"),
    LayerCase("conv1d-of-transformers-2d", lambda: Conv1D(4, 3), normal(3), "linear"),
    LayerCase("conv1d-of-transformers-bias-only", lambda: only(Conv1D(4, 3), "bias"), normal(5, 3), "linear"),
]

EMBEDDING = [
    LayerCase("embedding", lambda: nn.Embedding(5, 3), tokens(8), "embedding"),
    LayerCase("embedding-1d", lambda: nn.Embedding(5, 3), tokens(), "embedding"),
    LayerCase("embedding-3d", lambda: nn.Embedding(5, 3), tokens(2, 4), "embedding"),
    LayerCase("embedding-padding", lambda: nn.Embedding(5, 3, padding_idx=1), tokens(8), "embedding"),
    LayerCase("embedding-padding-from-the-end", lambda: nn.Embedding(5, 3, padding_idx=-1), tokens(8), "embedding"),
    LayerCase("embedding-positions", lambda: Beside(nn.Embedding(5, 3)), positions, "embedding", (None, 0)),
]

NORM = [
    LayerCase("layer-norm-shared-input", lambda: Beside(nn.LayerNorm(3)), beside(1, 5, 3), "norm", (None, 0)),
    LayerCase("layer-norm", lambda: nn.LayerNorm(3), normal(5, 3), "norm"),
    LayerCase("layer-norm-2d", lambda: nn.LayerNorm(3), normal(3), "norm"),
    LayerCase("layer-norm-no-bias", lambda: nn.LayerNorm(3, bias=False), normal(5, 3), "norm"),
    LayerCase("layer-norm-bias-only", lambda: only(nn.LayerNorm(3), "bias"), normal(5, 3), "norm"),
    LayerCase("layer-norm-of-two-dimensions", lambda: nn.LayerNorm((2, 3)), normal(5, 2, 3), "norm"),
    LayerCase("rms-norm", lambda: nn.RMSNorm(3), normal(5, 3), "norm"),
    LayerCase("rms-norm-eps", lambda: nn.RMSNorm(3, eps=0.1), normal(5, 3), "norm"),
    LayerCase("rms-norm-of-two-dimensions", lambda: nn.RMSNorm((2, 3)), normal(5, 2, 3), "norm"),
    LayerCase("llama-rms-norm", lambda: LlamaRMSNorm(3), normal(5, 3), "norm"),
    LayerCase("gemma-rms-norm", lambda: GemmaRMSNorm(3), normal(5, 3), "norm", tolerance=1e-6),
]

CONV = [
    LayerCase("conv1d-shared-input", lambda: Beside(nn.Conv1d(2, 4, 3)), beside(1, 2, 9), "conv", (None, 0)),
    LayerCase("conv1d", lambda: nn.Conv1d(2, 4, 3), normal(2, 9), "conv"),
    LayerCase("conv2d", lambda: nn.Conv2d(2, 3, (2, 3)), normal(2, 5, 6), "conv"),
    LayerCase("conv3d", lambda: nn.Conv3d(2, 3, 2), normal(2, 3, 4, 3), "conv"),
    LayerCase("conv2d-no-bias", lambda: nn.Conv2d(2, 3, 3, bias=False), normal(2, 5, 5), "conv"),
    LayerCase("conv2d-bias-only", lambda: only(nn.Conv2d(2, 3, 3), "bias"), normal(2, 5, 5), "conv"),
    LayerCase("conv2d-1x1", lambda: nn.Conv2d(2, 3, 1), normal(2, 4, 4), "conv"),
    LayerCase("conv2d-one-position", lambda: nn.Conv2d(2, 3, 4), normal(2, 4, 4), "conv"),
    LayerCase("conv2d-stride", lambda: nn.Conv2d(2, 3, 3, stride=(2, 3)), normal(2, 8, 9), "conv"),
    LayerCase("conv2d-dilation", lambda: nn.Conv2d(2, 3, 3, dilation=(2, 1)), normal(2, 7, 5), "conv"),
    LayerCase("conv2d-all", lambda: nn.Conv2d(2, 4, 3, 2, (2, 1), 2, 2), normal(2, 8, 9), "conv"),
    LayerCase("conv2d-groups", lambda: nn.Conv2d(4, 6, 3, groups=2), normal(4, 5, 5), "conv"),
    LayerCase("conv2d-groups-bias-only", lambda: only(nn.Conv2d(4, 6, 3, groups=2), "bias"), normal(4, 5, 5), "conv"),
    LayerCase(
        "conv2d-groups-weight-only", lambda: only(nn.Conv2d(4, 6, 3, groups=2), "weight"), normal(4, 5, 5), "conv"
    ),
    LayerCase("conv2d-depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), normal(4, 5, 5), "conv"),
    LayerCase("conv1d-depthwise-causal", lambda: nn.Conv1d(4, 4, 3, padding=2, groups=4), normal(4, 6), "conv"),
    LayerCase("conv2d-valid", lambda: nn.Conv2d(2, 3, 3, padding="valid"), normal(2, 5, 5), "conv"),
    LayerCase("conv2d-same", lambda: nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(2, 1)), normal(2, 5, 5), "conv"),
    LayerCase("conv1d-same-even", lambda: nn.Conv1d(2, 3, 4, padding="same"), normal(2, 7), "conv"),
    *(
        LayerCase(
            f"conv{d}d-{mode}",
            lambda d=d, mode=mode: CONVS[d](2, 3, 3, padding=1, padding_mode=mode),
            normal(2, *[4] * d),
            "conv",
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
        for d in (1, 2, 3)
    ),
    LayerCase(
        "conv2d-same-circular",
        lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"),
        normal(2, 5, 5),
        "conv",
    ),
    LayerCase(
        "conv2d-circular-uneven",
        lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular"),
        normal(2, 5, 5),
        "conv",
    ),
]
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def batch_norm() -> nn.Module:
    layer = nn.BatchNorm1d(3)
    layer(torch.randn(20, 3) * 2 + 1)  # running statistics that are not 0 and 1
    return layer


class Prefixed(nn.Module):
    """Raw parameters beside children, as the class token and the positions of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 3))
        self.positions = nn.Parameter(torch.zeros(1, 6, 3))
        self.inner = nn.Linear(3, 3)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1))])

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.cat([self.token.expand(len(inputs), -1, -1), inputs], dim=1) + self.positions
        return self.inner(hidden.tanh() * self.scales[0]) * self.scales[1]


class Scale(nn.Module):
    """A function of one raw parameter that vmap cannot batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, inputs: Tensor) -> Tensor:
        sign = 1.0 if float(inputs.square().sum()) > 0 else -2.0
        return inputs * self.weight * sign


def weight_norm_by_hook() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(3, 4))


def attention_mask(n: int) -> Tensor:
    return torch.randn(4, 4, dtype=torch.float64)


def with_mask(mask: Callable[[int], dict[str, Tensor]], batch_first: bool) -> Callable[[int], tuple[Any, ...]]:
    def inputs(n: int) -> tuple[Any, ...]:
        x = torch.randn(n, 4, 6, dtype=torch.float64)
        x = x if batch_first else x.transpose(0, 1)
        return (x, x * 0.5, x + 1.0, mask(n))

    return inputs


class Attention(nn.Module):
    """Hands masks over by name."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, **settings)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Tensor]) -> Any:
        n = query.shape[0 if self.attention.batch_first else 1]
        if "attn_mask" in masks and masks["attn_mask"].dim() == 4:  # [n, heads, t, s], one for each example
            masks = {**masks, "attn_mask": masks["attn_mask"].reshape(n * 2, 4, 4)}
        return self.attention(query, key, value, **masks)


def padded(n: int) -> dict[str, Tensor]:
    return {"key_padding_mask": torch.arange(4)[None] >= (torch.arange(n) % 3 + 2)[:, None]}


FALLBACK = [
    LayerCase("prelu-shared-input", lambda: Beside(nn.PReLU()), beside(1, 4, 3), "other", (None, 0)),
    LayerCase("batch-norm", batch_norm, normal(3), "other"),
    LayerCase("group-norm", lambda: nn.GroupNorm(2, 4), normal(4, 3), "other"),
    LayerCase("instance-norm", lambda: nn.InstanceNorm1d(4, affine=True), normal(4, 5), "other"),
    LayerCase("prelu", lambda: nn.PReLU(4), normal(4, 3), "other"),
    LayerCase("conv-transpose", lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), normal(2, 4, 4), "other"),
    LayerCase("bilinear", lambda: nn.Bilinear(3, 2, 4), lambda n: (*normal(3)(n), *normal(2)(n)), "other"),
    LayerCase("embedding-bag", lambda: nn.EmbeddingBag(5, 3), tokens(4), "other"),
    LayerCase("embedding-by-frequency", lambda: nn.Embedding(5, 3, scale_grad_by_freq=True), tokens(8), "other"),
    LayerCase("lstm", lambda: nn.LSTM(3, 4, 2, batch_first=True), normal(5, 3), "other", output_dims=(0, 1, 1)),
    LayerCase(
        "lstm-time-first", lambda: nn.LSTM(3, 4), lambda n: (torch.randn(5, n, 3).double(),), "other", (1,), (1, 1, 1)
    ),
    LayerCase(
        "gru-with-state",
        lambda: nn.GRU(3, 4, batch_first=True, bidirectional=True),
        lambda n: (*normal(5, 3)(n), torch.randn(2, n, 4).double()),
        "other",
        (0, 1),
        (0, 1),
    ),
    LayerCase("gru-cell", lambda: nn.GRUCell(3, 4), lambda n: (*normal(3)(n), *normal(4)(n)), "other"),
    LayerCase(
        "attention", lambda: nn.MultiheadAttention(6, 2, batch_first=True), lambda n: 3 * normal(4, 6)(n), "other"
    ),
    LayerCase(
        "attention-time-first",
        lambda: nn.MultiheadAttention(6, 2),
        lambda n: 3 * (torch.randn(4, n, 6).double(),),
        "other",
        (1, 1, 1),
        (1, 0),
    ),
    LayerCase(
        "attention-other-widths",
        lambda: nn.MultiheadAttention(6, 2, kdim=3, vdim=2, batch_first=True),
        lambda n: (*normal(4, 6)(n), *normal(5, 3)(n), *normal(5, 2)(n)),
        "other",
    ),
    LayerCase("attention-padding", lambda: Attention(batch_first=True), with_mask(padded, True), "other"),
    LayerCase("attention-padding-time-first", Attention, with_mask(padded, False), "other", (1, 1, 1, 0), (1, 0)),
    LayerCase(
        "attention-one-mask",
        lambda: Attention(batch_first=True),
        with_mask(lambda n: {"attn_mask": torch.randn(4, 4).double()}, True),
        "other",
        (0, 0, 0, None),
    ),
    LayerCase(
        "attention-mask-each",
        lambda: Attention(batch_first=True),
        with_mask(lambda n: {"attn_mask": torch.randn(n, 2, 4, 4).double()}, True),
        "other",
    ),
    LayerCase(
        "encoder-layer", lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.1, batch_first=True), normal(4, 6), "other"
    ),
    LayerCase("weight-norm", lambda: parametrizations.weight_norm(nn.Linear(3, 4)), normal(5, 3), "other"),
    LayerCase("weight-norm-square", lambda: parametrizations.weight_norm(nn.Linear(4, 4)), normal(4), "other"),
    LayerCase("weight-norm-by-hook", weight_norm_by_hook, normal(5, 3), "other"),
    LayerCase("spectral-norm", lambda: parametrizations.spectral_norm(nn.Linear(3, 4)), normal(5, 3), "other"),
    LayerCase("raw-parameters", Prefixed, normal(5, 3), "other"),
    LayerCase("without-batching-rule", Scale, normal(3), "other"),
]

CASES = [*LINEAR, *EMBEDDING, *NORM, *CONV, *FALLBACK]
