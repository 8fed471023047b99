"""Per-example gradients out of a running model, without touching it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_influence.capture.batches import batch_size
from lightning_influence.capture.component import Component, Select, find_components
from lightning_influence.capture.layers import LayerCall, rule_for
from lightning_influence.capture.record import LayerRecord, merged
from lightning_influence.errors import UnsupportedLayerError


@dataclass(frozen=True)
class Coverage:
    """Which of a model's trainable parameters the components cover.

    Attributes:
        covered: Number of trainable parameters that belong to a component.
        total: Number of trainable parameters.
        missing: Qualified names of trainable parameters that belong to none.
    """

    covered: int
    total: int
    missing: tuple[str, ...]

    def __str__(self) -> str:
        """One line for a log."""
        share = 100 * (1 - self.covered / max(1, self.total))
        left = f"; left out ({share:.2g} %): {', '.join(self.missing[:8])}" if self.missing else ""
        more = f" and {len(self.missing) - 8} more" if len(self.missing) > 8 else ""
        return f"{self.covered:,} of {self.total:,} trainable parameters covered{left}{more}"


@dataclass
class _Call:
    """A module call during the forward pass of a recording."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: tuple[int, ...]
    edges: list[GradientEdge] = field(default_factory=list)
    outputs: list[tuple[torch.Size, torch.dtype, torch.device]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class GradientCapture:
    """Hooks a model's components and yields their per-example gradients, batch by batch.

    The model is neither wrapped nor changed: forward hooks note each component's inputs and the place of its
    outputs in the graph, gradients are asked for there and nowhere else, so that no weight gradient is
    computed and no ``.grad`` is touched. Inside the context the model is in evaluation mode (per-example
    gradients are not defined under batch statistics and not reproducible under dropout); modes are restored
    module by module on exit.

    Args:
        model: Any module.
        components: What `find_components` takes, or a list of components it returned.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with GradientCapture(model) as capture:
        ...     [record] = capture.record(torch.ones(3, 2), lambda model, x: model(x).sum(1))
        >>> record.example_gradients().shape  # 2 weights and a bias
        torch.Size([3, 1, 3])
    """

    def __init__(self, model: nn.Module, components: Select | list[Component] = None) -> None:
        self.model = model
        if isinstance(components, list) and components and isinstance(components[0], Component):
            self.components = [c for c in components if isinstance(c, Component)]
        else:
            self.components = find_components(model, components)  # type: ignore[arg-type]
        self._parameters = {use.module: use.parameters for c in self.components for use in c.uses}
        self._handles: list[RemovableHandle] = []
        self._calls: dict[str, list[_Call]] = {}
        self._n: int | None = None
        self._exit = ExitStack()

    @property
    def coverage(self) -> Coverage:
        """How much of the trainable parameters the components cover."""
        covered = {
            id(self.model.get_submodule(use.module).get_parameter(p))
            for c in self.components
            for use in c.uses
            for p in use.parameters
        }
        trainable = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        missing = tuple(n for n, p in trainable if id(p) not in covered)
        total = sum(p.numel() for _, p in trainable)
        return Coverage(total - sum(p.numel() for n, p in trainable if n in missing), total, missing)

    def __enter__(self) -> GradientCapture:
        """Attach the hooks and switch to evaluation mode."""
        self._exit.enter_context(_evaluating(self.model))
        for name in self._parameters:
            module = self.model.get_submodule(name)
            hook = _forward_hook(self, name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks and restore the modes, whatever happened."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()
        self._exit.close()

    def record(
        self,
        batch: Any,
        losses: Callable[[nn.Module, Any], Tensor],
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        n: int | None = None,
    ) -> Iterator[LayerRecord]:
        """Run one forward and backward pass and yield one record per component, in component order.

        Args:
            batch: Handed to ``losses``.
            losses: ``(model, batch) -> [n]``, the loss of each example on its own.
            ids: Ids of the examples, int64 [n]; None numbers them.
            mask: Positions that belong to an example, bool [n, t].
            n: Number of examples; None takes the first dimension of the batch.

        Raises:
            ValueError: If the losses are not one finite number per example.
            UnsupportedLayerError: If a component did not run, or saw something other than examples first.
        """
        n = batch_size(batch) if n is None else n
        ids = torch.arange(n) if ids is None else ids.cpu()
        with torch.inference_mode(False), torch.enable_grad(), _eager():
            values = self._forward(batch, losses, n, ids)
            gradients = self._backward(values)
        calls, self._calls = self._calls, {}
        with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
            for component in self.components:
                yield self._assemble(component, calls, gradients, ids, mask)

    def _forward(self, batch: Any, losses: Callable[[nn.Module, Any], Tensor], n: int, ids: Tensor) -> Tensor:
        if not self._handles:
            raise RuntimeError(
                "GradientCapture.record: the capture is not active; use it as `with GradientCapture(...) as capture:`."
            )
        self._n, self._calls = n, {}
        try:
            values = losses(self.model, batch)
        finally:
            self._n = None
        if tuple(values.shape) != (n,):
            raise ValueError(
                f"the loss of a batch of {n} examples has shape {tuple(values.shape)}; expected one loss per example, "
                f"[{n}]. Return losses with reduction='none', or define example_losses(batch) on the module."
            )
        bad = ids[~torch.isfinite(values.detach()).cpu()]
        if len(bad):
            raise ValueError(
                f"the loss of {len(bad)} of {n} examples is not finite (ids {bad[:8].tolist()}); expected finite "
                "losses. Remove these examples or repair the model before recording."
            )
        silent = [c.name for c in self.components if not any(self._calls.get(use.module) for use in c.uses)]
        if silent:
            raise UnsupportedLayerError(
                f"{len(silent)} of {len(self.components)} components never ran in the forward pass, so they have no "
                f"gradient: {silent[:8]}. Leave them out with components=, or name the module that uses their weights."
            )
        return values

    def _backward(self, values: Tensor) -> dict[int, tuple[Tensor, ...]]:
        """Gradients at every noted place, by the identity of the call."""
        calls = [call for group in self._calls.values() for call in group]
        edges = [edge for call in calls for edge in call.edges]
        if not edges or not values.requires_grad:
            raise ValueError(
                "the losses do not depend on any component: is the loss detached, or every input constant?"
            )
        found = iter(torch.autograd.grad(values.sum(), edges, allow_unused=True))
        return {id(call): tuple(_or_zeros(next(found), *output) for output in call.outputs) for call in calls}

    def _assemble(
        self,
        component: Component,
        calls: dict[str, list[_Call]],
        gradients: dict[int, tuple[Tensor, ...]],
        ids: Tensor,
        mask: Tensor | None,
    ) -> LayerRecord:
        records = []
        for use in component.uses:
            module = self.model.get_submodule(use.module)
            rule = rule_for(module, use.parameters)
            for call in calls.get(use.module, ()):
                _check_untouched(use.module, call)
                seen = LayerCall(call.args, call.kwargs, gradients[id(call)], tuple(call.places))
                records.append(rule.record(module, use.parameters, seen, ids, mask))
        return merged(records)

    def _note(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook: keep inputs and the graph's edges of the outputs; hand back outputs that are in the graph."""
        if self._n is None or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return None  # outside a recording, or an activation checkpoint recomputing inside the backward pass
        rule, n = rule_for(module, self._parameters[name]), self._n
        tensors, spec = pytree.tree_flatten((args, kwargs))
        dim = rule.example_dimension(module)
        inputs = [_expanded(t.detach(), n, dim) if isinstance(t, Tensor) else t for t in tensors]
        args, kwargs = pytree.tree_unflatten(inputs, spec)
        call = _Call(args, kwargs, tuple(t._version for t in inputs if isinstance(t, Tensor)))
        outputs, spec = pytree.tree_flatten(output)
        for k, value in enumerate(outputs):
            if isinstance(value, Tensor) and value.is_floating_point() and (value.requires_grad or not call.edges):
                dim = rule.example_dimension(module, k)
                if not value.requires_grad:  # everything below is frozen: the graph starts here
                    value = value.detach().requires_grad_().clone()
                outputs[k] = value = _expanded(value, n, dim)
                if value.shape[dim : dim + 1] != (n,):
                    raise UnsupportedLayerError(_not_examples_first(name, dim, value, n))
                call.edges.append(get_gradient_edge(value))
                call.outputs.append((value.shape, value.dtype, value.device))
                call.places.append(k)
        self._calls.setdefault(name, []).append(call)
        return pytree.tree_unflatten(outputs, spec)


def _forward_hook(capture: GradientCapture, name: str) -> Callable[..., Any]:
    # A plain function, which copy.deepcopy of the model copies by reference; a bound method would be copied
    # together with the capture and a second model.
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return capture._note(name, module, args, kwargs, output)

    return hook


def _expanded(tensor: Tensor, n: int, dim: int) -> Tensor:
    """Give a tensor that is broadcast over the batch (position embeddings) one row per example."""
    if tensor.dim() <= dim or tensor.shape[dim] != 1:
        return tensor
    return tensor.expand(*tensor.shape[:dim], n, *tensor.shape[dim + 1 :])


def _not_examples_first(name: str, dim: int, value: Tensor, n: int) -> str:
    return (
        f"{name or 'the model'}: an output has shape {tuple(value.shape)}; expected the {n} examples of the batch in "
        f"dimension {dim} (no flattened or time-first layout). Leave the layer out with components=."
    )


def _or_zeros(gradient: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A loss that does not depend on an output leaves no gradient there."""
    return torch.zeros(shape, dtype=dtype, device=device) if gradient is None else gradient


def _check_untouched(name: str, call: _Call) -> None:
    tensors = [t for t in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
    if tuple(t._version for t in tensors) != call.versions:
        raise UnsupportedLayerError(
            f"{name}: its input was modified in place after the layer ran, so its gradient cannot be formed. "
            "Replace the in-place operation, or leave the layer out with components=."
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, restored module by module: .train() would also wake layers frozen in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled modules skip hooks that were attached after compilation, so they run uncompiled here."""
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is None:
        yield
    else:
        with stance("force_eager"):
            yield
