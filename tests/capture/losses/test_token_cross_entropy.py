"""The cross-entropy of many tokens against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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


def test_a_second_derivative_is_refused() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    [gradient] = torch.autograd.grad(token_cross_entropy(logits, torch.arange(3)).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()
