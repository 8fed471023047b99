"""The cross-entropy of many tokens against torch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.capture.losses import token_cross_entropy as module
from lightning_influence.capture.losses.token_cross_entropy import token_cross_entropy


@pytest.mark.parametrize("piece", [1, 50, 1 << 17])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_equals_torch(dtype: torch.dtype, tolerance: float, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    torch.manual_seed(0)
    logits = (4 * torch.randn(13, 30)).to(dtype).requires_grad_()
    labels = torch.randint(0, 30, (13,))
    labels[[2, 7]] = -100
    weights = torch.randn(13, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    found = token_cross_entropy(logits, labels)
    wide = logits.to(found.dtype)
    expected = F.cross_entropy(wide, labels, ignore_index=-100, reduction="none")
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    [ours] = torch.autograd.grad(found, logits, weights, retain_graph=True)
    [again] = torch.autograd.grad(found, logits, weights)
    [truth] = torch.autograd.grad(expected, logits, weights)
    assert ours.dtype == dtype
    assert torch.equal(ours, again)
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = token_cross_entropy(logits, torch.tensor([1]))
    assert loss.item() == pytest.approx(2e4)
    [gradient] = torch.autograd.grad(loss.sum(), logits)
    assert gradient.tolist() == [[1.0, -1.0, 0.0]]


def test_no_token_at_all() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    assert token_cross_entropy(logits, torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("piece", [1, 50, 1 << 17])
def test_second_derivatives_equal_those_of_torch(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By logits and by the weights of the losses, with a token left out and a weight of 0."""
    monkeypatch.setattr(module, "PIECE", piece)
    torch.manual_seed(0)
    labels = torch.randint(0, 9, (6,))
    labels[2] = -100
    vector = torch.randn(6, 9, dtype=torch.float64)

    def second(function: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        logits = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        weights = torch.tensor([1.0, -2.0, 3.0, 0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
        [slope] = torch.autograd.grad(function(logits, labels), logits, weights, create_graph=True)
        return [slope.detach(), *torch.autograd.grad(slope, [logits, weights], vector)]

    plain = partial(F.cross_entropy, ignore_index=-100, reduction="none")
    for ours, truth in zip(second(token_cross_entropy), second(plain), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_second_derivatives_of_narrow_logits_are_summed_in_float32() -> None:
    logits = torch.randn(4, 7, dtype=torch.bfloat16, requires_grad=True)
    vector = torch.randn(4, 7, dtype=torch.bfloat16)
    weights = torch.ones(4, requires_grad=True)
    found = token_cross_entropy(logits, torch.arange(4))
    [slope] = torch.autograd.grad(found, logits, weights, create_graph=True)
    [ours] = torch.autograd.grad(slope, logits, vector)
    p, v = logits.detach().float().softmax(1), vector.float()
    truth = p * (v - (p * v).sum(1, keepdim=True))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), truth, rtol=1e-2, atol=1e-3)


def test_a_third_derivative_is_refused() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    weights = torch.ones(3, requires_grad=True)
    [slope] = torch.autograd.grad(token_cross_entropy(logits, torch.arange(3)), logits, weights, create_graph=True)
    [second] = torch.autograd.grad(slope, logits, torch.ones_like(slope).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()
