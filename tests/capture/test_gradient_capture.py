from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_influence.capture import GradientCapture, parameter_gradients
from lightning_influence.errors import UnsupportedLayerError
from tests.capture import models
from tests.capture.models import Mlp, causal_losses, class_losses, points, take, text
from tests.cases import Prefixed
from tests.oracles import example_gradients

Losses = Callable[[nn.Module, Any], Tensor]


def gradients(
    model: nn.Module, batch: Any, losses: Losses, components: Any = None, n: int | None = None
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with GradientCapture(model, components) as capture:
        for component, record in zip(capture.components, capture.record(batch, losses, n=n), strict=True):
            found |= parameter_gradients(model, component, record.example_gradients())
    return found


def truth(
    model: nn.Module, batch: Any, losses: Losses, alone: Callable[[Any, int], Any], n: int, names: Any = None
) -> dict[str, Tensor]:
    model = copy.deepcopy(model).eval()
    parameters = {
        name: p for name, p in model.named_parameters() if (p.requires_grad if names is None else name in names)
    }
    return example_gradients(parameters, lambda k: losses(model, alone(batch, k)).sum(), n)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def one_text(batch: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    return take(batch, [k])


def one_point(batch: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    return batch[0][k : k + 1], batch[1][k : k + 1]


def masked_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return models.token_losses(logits, batch["labels"])


LANGUAGE_MODELS = {
    "gpt2": (models.gpt2, causal_losses),
    "gpt2-eager": (lambda: models.gpt2(attn_implementation="eager"), causal_losses),
    "gpt2-untied": (lambda: models.gpt2(tie_word_embeddings=False), causal_losses),
    "llama": (models.llama, causal_losses),
    "llama-eager": (lambda: models.llama(attn_implementation="eager"), causal_losses),
    "llama-untied": (lambda: models.llama(tie_word_embeddings=False), causal_losses),
    "bert": (models.bert, masked_losses),
    "bert-untied": (lambda: models.bert(tie_word_embeddings=False), masked_losses),
}


@pytest.mark.parametrize("n", [1, 3, 7])  # 7 = t
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models(name: str, n: int) -> None:
    build, losses = LANGUAGE_MODELS[name]
    model, batch = build(), text(n)
    assert_same(gradients(model, batch, losses), truth(model, batch, losses, one_text, n), 1e-9)


class Reused(nn.Module):
    """One layer called twice, a table looked up twice, a norm used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.layer = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.table(inputs).mean(1))
        return self.layer(self.norm(self.layer(hidden).tanh()) + self.table(inputs[:, 0]))


class Tied(nn.Module):
    """An embedding tied to the transposed kind of head, a norm's bias to a linear layer's, two whole layers."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.table, self.head = nn.Embedding(4, 4), Conv1D(4, 4)
        self.head.weight = self.table.weight
        self.norm, self.first, self.second = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm.bias = self.head.bias
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.second(self.first(self.table(inputs)).tanh())
        return self.head(self.norm(hidden)).sum(1)


class NanoGpt(nn.Module):
    """Positions looked up once, with indices [t]."""

    def __init__(self, brackets: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(5, 3), nn.Embedding(8, 3), nn.Linear(3, 4)
        self.brackets = brackets

    def forward(self, inputs: Tensor) -> Tensor:
        places = self.positions(torch.arange(inputs.shape[1]))
        hidden = self.tokens(inputs) + (places[None] if self.brackets else places)
        return self.head(hidden.tanh()).mean(1)


def tokens(n: int, t: int = 6, vocabulary: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(vocabulary, (n, t), generator=generator), torch.randint(4, (n,), generator=generator)


class Residual(nn.Module):
    """In-place operations where they do no harm: on outputs and on views of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm, self.three = nn.Linear(3, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.one(inputs), inplace=True)
        out = self.two(hidden)
        out[:, 1] *= 2
        out.add_(hidden)
        return self.three(F.relu(self.norm(out), inplace=True))


@pytest.mark.parametrize("n", [1, 4, 6])
@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (lambda: Mlp(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)), points),
        (Residual, points),
        (lambda: Mlp(*[layer := nn.Linear(3, 3), nn.Tanh(), layer, nn.Tanh(), nn.Linear(3, 4)]), points),
        (Reused, tokens),
        (Tied, tokens),
        (lambda: nn.Linear(3, 4), points),
    ],
    ids=["relu in place", "in place", "used twice", "all used twice", "tied", "a layer alone"],
)
def test_traps_for_hooks(build: Callable[[], nn.Module], batch: Callable[[int], Any], n: int) -> None:
    model = models.ready(build())
    assert_same(gradients(model, batch(n), class_losses), truth(model, batch(n), class_losses, one_point, n))


def test_positions_without_a_dimension_for_examples() -> None:
    model = models.ready(NanoGpt())
    with GradientCapture(model) as capture:
        for n in (4, 1, 6):  # 6 = t, when it is already known that those are positions
            found: dict[str, Tensor] = {}
            for component, record in zip(capture.components, capture.record(tokens(n), class_losses), strict=True):
                found |= parameter_gradients(model, component, record.example_gradients())
            assert_same(found, truth(model, tokens(n), class_losses, one_point, n))


def test_positions_that_cannot_be_told_from_examples_are_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"positions: examples mix: row k of its gradient does not follow"):
        gradients(models.ready(NanoGpt()), tokens(6), class_losses)


def test_positions_that_the_model_reshapes_are_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"positions: its input has no dimension for the examples"):
        gradients(models.ready(NanoGpt(brackets=True)), tokens(4), class_losses)


# Layouts and uses that have no per-example gradient


class Laid(nn.Module):
    """Works on tokens [n, t, 3] in a layout of its own."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.inner, self.after, self.head = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        n, t, d = inputs.shape
        if self.layout == "flat":
            hidden = self.after(self.inner(inputs.reshape(n * t, d)).tanh()).reshape(n, t, d)
        else:
            hidden = self.after(self.inner(inputs.transpose(0, 1)).tanh()).transpose(0, 1)
        return self.head(hidden.mean(1))


def sequences(n: int, t: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    inputs = torch.randn(n, t, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(4, (n,), generator=generator)


@pytest.mark.parametrize("layout", ["flat", "time first"])
def test_other_layouts_are_refused_all_at_once(layout: str) -> None:
    with pytest.raises(UnsupportedLayerError) as error:
        gradients(models.ready(Laid(layout)), sequences(4), class_losses)
    text = str(error.value)
    assert text.startswith("2 of 3 modules have no per-example gradient here (52.9 % of the parameters looked at)")
    assert "after: an output has shape" in text
    assert "inner: an output has shape" in text
    assert "expected the 4 examples of the batch in dimension 0" in text
    assert "components=lambda name, module: name not in ['after', 'inner']" in text


def test_time_first_with_as_many_examples_as_steps_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="inner: examples mix"):
        gradients(models.ready(Laid("time first")), sequences(6), class_losses)


def test_the_rest_of_a_model_with_such_a_layer_can_be_recorded() -> None:
    model = models.ready(Laid("flat"))
    found = gradients(model, sequences(4), class_losses, lambda name, module: name not in ["after", "inner"])
    names = {"head.weight", "head.bias"}
    assert_same(found, truth(model, sequences(4), class_losses, one_point, 4, names))


class Changed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 4)
        self.inner.requires_grad_(False)  # otherwise autograd itself complains

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs + 0.0
        hidden = self.inner(inputs)
        inputs.add_(1.0)
        return self.head(hidden + inputs)


def test_an_input_that_is_modified_later_is_refused() -> None:
    model = models.ready(Changed())
    with pytest.raises(UnsupportedLayerError, match=r"inner: its input was modified in place after the layer ran"):
        gradients(model, points(4), class_losses, ["inner", "head"])
    assert set(gradients(model, points(4), class_losses)) == {"head.weight", "head.bias"}


class Partly(nn.Module):
    """One layer is never called, one is called without gradients, one only lends its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.lent, self.blind = (nn.Linear(3, 3) for _ in range(4))
        self.head = nn.Linear(3, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            extra = self.blind(inputs)
        return self.head(F.linear(self.used(inputs) + extra, self.lent.weight))


def test_components_that_never_ran_are_named() -> None:
    with pytest.raises(UnsupportedLayerError) as error:
        gradients(models.ready(Partly()), points(4), class_losses)
    text = str(error.value)
    assert text.startswith("3 of 5 modules have no per-example gradient here (56.2 % of the parameters looked at)")
    for name in ("idle", "lent", "blind"):
        assert f"{name}: it never ran in the forward pass" in text
    assert set(gradients(models.ready(Partly()), points(4), class_losses, ["used", "head"])) == {
        "used.weight",
        "used.bias",
        "head.weight",
        "head.bias",
    }


def test_a_module_that_returns_no_tensor_is_refused() -> None:
    class Odd(nn.Linear):
        def forward(self, inputs: Tensor) -> Any:
            return type("Result", (), {"value": super().forward(inputs)})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.head = Odd(3, 3), nn.Linear(3, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.odd(inputs).value)

    with pytest.raises(UnsupportedLayerError, match="odd: it returned no floating-point tensor"):
        gradients(models.ready(Model()), points(4), class_losses)


def coupled(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A contrastive loss: every example is compared with all others."""
    features = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(features @ features.mT, torch.arange(len(features)), reduction="none")


def test_a_loss_that_compares_examples_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"layers\.0: examples mix.* a loss that compares examples"):
        gradients(Mlp(), points(4), coupled)


def test_batch_statistics_are_refused() -> None:
    model = models.ready(Mlp(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)))
    with pytest.raises(UnsupportedLayerError, match=r"layers\.0: examples mix: .*batch statistics"):
        gradients(model, points(5), class_losses)


# Losses


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            lambda m, b: class_losses(m, b).mean(),
            r"a batch of 4 examples has shape \(\); expected one loss per example, \[4\]",
        ),
        (lambda m, b: class_losses(m, b)[:2], r"has shape \(2,\); expected one loss"),
        (lambda m, b: None, r"has shape NoneType; expected one loss"),
        (lambda m, b: class_losses(m, b).detach(), r"the losses do not depend on any component: is the loss detached"),
        (
            lambda m, b: class_losses(m, b) / torch.tensor([1.0, 0, 1, 0]),
            r"2 of 4 examples is not finite \(ids \[11, 13\]\)",
        ),
        (lambda m, b: class_losses(m, b) * float("nan"), r"4 of 4 examples is not finite \(ids \[10, 11, 12, 13\]\)"),
    ],
    ids=["mean", "too few", "none", "detached", "infinite", "nan"],
)
def test_losses_must_be_one_finite_number_per_example(losses: Losses, message: str) -> None:
    with GradientCapture(Mlp()) as capture, pytest.raises(ValueError, match=message):
        next(capture.record(points(4), losses, torch.arange(10, 14)))


def test_ids_must_fit_the_batch() -> None:
    with (
        GradientCapture(Mlp()) as capture,
        pytest.raises(ValueError, match=r"record\(ids\): got shape \(3,\) for 4 examples"),
    ):
        next(capture.record(points(4), class_losses, torch.arange(3)))


def test_records_carry_the_ids_and_the_mask() -> None:
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    with GradientCapture(models.ready(Laid("flat")), "head") as capture:
        [record] = capture.record(sequences(2), class_losses, torch.tensor([7, 3]), mask)
    assert record.ids.tolist() == [7, 3]
    assert record.mask is None  # the head sees one position

    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum((1, 2))

    with GradientCapture(nn.Linear(3, 4)) as capture:
        [record] = capture.record(sequences(2)[0].float(), losses, mask=mask)
    assert torch.equal(record.mask, mask)


# What surrounds a recording


def test_modes_and_hooks_are_restored_when_something_fails() -> None:
    model = Mlp(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model.layers[2].eval()  # frozen in evaluation mode
    seen = []

    def failing(model: nn.Module, batch: Any) -> Tensor:
        seen.extend(module.training for module in model.modules())
        raise KeyError("labels")

    with pytest.raises(KeyError), GradientCapture(model) as capture:
        next(capture.record(points(4), failing))
    assert not any(seen)
    assert [module.training for module in model.modules()] == [True, True, True, True, False]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_of_the_model_changes() -> None:
    model = models.ready(models.gpt2()).train()
    model.lm_head.requires_grad_(False)
    for k, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, k) if k % 2 else None
    values, trainable = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    state = torch.random.get_rng_state()
    gradients(model, text(), causal_losses)
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    assert [p.requires_grad for p in model.parameters()] == trainable
    for k, parameter in enumerate(model.parameters()):
        assert parameter.grad is None if k % 2 == 0 else torch.equal(parameter.grad, torch.full_like(parameter, k))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_weight_gradients_are_not_computed() -> None:
    batch = torch.randn(4, 6, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2))

    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum((1, 2))

    with GradientCapture(model) as capture:
        list(capture.record(batch, losses))  # the first batch is passed backward twice
        with FlopCounterMode(display=False) as counter:
            list(capture.record(batch, losses))
    forward = 2 * 4 * 6 * (8 * 16 + 16 * 32 + 32 * 2)
    by_the_inputs = 2 * 4 * 6 * (32 * 2 + 32 * 16)  # the gradient by the batch itself is not needed either
    assert counter.get_total_flops() == forward + by_the_inputs


def test_a_copy_made_while_attached_is_independent() -> None:
    model = Mlp()
    expected = gradients(model, points(4), class_losses)
    with GradientCapture(model) as capture:
        twin = copy.deepcopy(model)
        twin(points(4)[0]).sum().backward()

        def losses(model: nn.Module, batch: Any) -> Tensor:
            return class_losses(model, batch) + 0 * twin(batch[0]).sum(1)

        first, second = capture.record(points(4), losses)
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(first.example_gradients()[:, :, :-1], expected["layers.0.weight"])
    torch.testing.assert_close(second.example_gradients()[:, :, -1], expected["layers.2.bias"])


def test_hooks_of_others_see_what_they_always_see_and_count() -> None:
    """They change what a layer gets and returns; a formula holds in between, a repeated call around them."""

    def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 2

    def shifted(module: nn.Module, args: Any) -> Any:
        return (args[0] + 1,)

    model = models.ready(Mlp(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4)))
    for layer in model.layers:
        layer.register_forward_hook(doubled)
        layer.register_forward_pre_hook(shifted)
    assert_same(gradients(model, points(4), class_losses), truth(model, points(4), class_losses, one_point, 4))
    norm = models.llama(num_hidden_layers=1)
    norm.model.norm.register_forward_hook(doubled)
    assert_same(gradients(norm, text(), causal_losses), truth(norm, text(), causal_losses, one_text, 3), 1e-9)


def test_recordings_can_be_interleaved_and_abandoned() -> None:
    one, two = Mlp(), Mlp()
    with GradientCapture(one) as left, GradientCapture(two) as right:
        for a, b in zip(left.record(points(4), class_losses), right.record(points(4), class_losses), strict=True):
            assert torch.equal(a.example_gradients(), b.example_gradients())
            assert torch.is_grad_enabled()
        next(left.record(points(4), class_losses))
        assert len(list(left.record(points(5), class_losses))) == 2
    assert torch.is_grad_enabled()


def test_a_capture_is_used_as_a_context_and_once_at_a_time() -> None:
    capture = GradientCapture(Mlp())
    with pytest.raises(RuntimeError, match="the capture is not active; use it as `with GradientCapture"):
        next(capture.record(points(4), class_losses))
    with capture, pytest.raises(RuntimeError, match="the capture is active already"):
        capture.__enter__()
    for _ in range(2):  # again is fine
        with capture:
            assert len(list(capture.record(points(4), class_losses))) == 2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_recording_without_gradients_around(context: Callable[[], Any]) -> None:
    model = Mlp()
    expected = gradients(model, points(4), class_losses)
    with context():
        batch = tuple(t.clone() for t in points(4))  # made in inference mode, too
        found = gradients(model, batch, class_losses)
        with torch.inference_mode(False):
            assert_same({name: value.clone() for name, value in found.items()}, expected)


def test_autocast_reaches_the_forward_pass_only() -> None:
    model = models.llama().float()
    exact = gradients(model, text(), causal_losses)
    with torch.autocast("cpu", torch.bfloat16), GradientCapture(model) as capture:
        records = list(capture.record(text(), causal_losses))
        rounded = {}
        for component, record in zip(capture.components, records, strict=True):
            values = record.example_gradients()
            assert values.dtype == record.squared_norms().dtype == record.dot_products(record).dtype == torch.float32
            torch.testing.assert_close(record.squared_norms(), values.flatten(1).square().sum(1), rtol=1e-4, atol=1e-6)
            rounded |= parameter_gradients(model, component, values)
    for name, value in exact.items():
        assert not torch.equal(rounded[name], value)
        assert (rounded[name] - value).norm() < 0.1 * value.norm()


def test_autocast_and_layers_that_are_called_again() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prefixed, self.attention = Prefixed(), nn.MultiheadAttention(3, 1, batch_first=True)
            self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.prefixed(inputs)
            return self.head(self.norm(self.attention(hidden, hidden, hidden)[0].mean(1)))

    model, batch = models.ready(Model()).float(), (sequences(4, 5)[0].float(), sequences(4, 5)[1])
    exact = gradients(model, batch, class_losses)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(model, batch, class_losses)
    for name, value in exact.items():
        assert rounded[name].dtype == torch.float32
        assert (rounded[name] - value).norm() < 0.1 * value.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_have_float32_gradients(dtype: torch.dtype) -> None:
    model = models.gpt2()
    exact = gradients(model, text(), causal_losses)
    found = gradients(model.to(dtype), text(), causal_losses)
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).norm() < (1e-4 if dtype == torch.float32 else 0.2) * value.norm()
