from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import nn

from lightning_influence.callbacks.attributes import attributes_kept


class Notes(nn.Module):
    """Keeps everything that people keep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.inner.count = 0
        self.outputs = {"train": [torch.ones(1)], "names": {"a"}}
        self.last = deque([1, 2], maxlen=2)
        self.step = 3
        self.untouched = [torch.ones(2)]

    def note(self) -> None:
        self.outputs["train"].append(torch.zeros(1))
        self.outputs["names"].add("b")
        self.outputs["new"] = 1
        self.last.append(3)
        self.step += 1
        self.inner.count += 1
        self.loss = torch.ones(1)
        self.untouched = None
        self.extra = nn.Linear(1, 1)


@pytest.mark.parametrize("fails", [False, True])
def test_attributes_are_put_back(fails):
    model = Notes()
    outputs, untouched, ones = model.outputs, model.untouched, model.outputs["train"][0]
    try:
        with attributes_kept(model):
            model.note()
            assert not fails or 1 / 0
    except ZeroDivisionError:
        assert fails
    assert model.outputs is outputs
    assert outputs.keys() == {"train", "names"}
    assert outputs["train"] == [ones]
    assert outputs["names"] == {"a"}
    assert model.last == deque([1, 2], maxlen=2)
    assert (model.step, model.inner.count) == (3, 0)
    assert model.untouched is untouched
    assert not hasattr(model, "loss")


def test_what_torch_keeps_is_left_alone():
    model = Notes()
    with attributes_kept(model):
        model.note()
        model.eval()
        model.register_buffer("mean", torch.ones(1))
        handle = model.register_forward_hook(lambda *_: None)
    assert not model.training
    assert dict(model.named_buffers()).keys() == {"mean"}
    assert len(model._forward_hooks) == 1
    assert isinstance(model.extra, nn.Linear)
    handle.remove()


def test_containers_in_each_other():
    model = Notes()
    model.outputs["itself"] = model.outputs
    model.many = [[] for _ in range(2000)]
    with attributes_kept(model):
        model.outputs["train"].clear()
        model.many[0].append(1)
        model.many.pop()
    assert len(model.outputs["train"]) == 1
    assert model.outputs["itself"] is model.outputs
    assert len(model.many) == 2000
    assert model.many[0] == [1]  # not searched
