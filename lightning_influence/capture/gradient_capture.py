"""Per-example gradients out of a running model, without touching it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.capture.batches import batch_size, explain_dtypes, map_tensors
from lightning_influence.capture.calls import CallLog, rounding
from lightning_influence.capture.component import (
    Component,
    Coverage,
    check_components,
    coverage_of,
    find_components,
    packing,
)
from lightning_influence.capture.contexts import eager, evaluating, full_precision
from lightning_influence.capture.layers import LayerRule, rule_for
from lightning_influence.capture.layers.base import widened
from lightning_influence.capture.losses.batch import is_shared
from lightning_influence.capture.owners import Select
from lightning_influence.capture.record import DenseRecord, LayerRecord, merged
from lightning_influence.capture.unfit import FAILURES, of_device, raise_unfit
from lightning_influence.errors import UnsupportedLayerError

Losses = Callable[[nn.Module, Any], Tensor]


class GradientCapture:
    """Hooks a model's components and yields their per-example gradients, batch by batch.

    The model is neither wrapped nor changed: forward hooks note each component's inputs and the place of its
    outputs in the graph, gradients are asked for there and nowhere else, so that no weight gradient is
    computed and no ``.grad`` is touched. Inside the context the model is in evaluation mode (per-example
    gradients are not defined under batch statistics and not reproducible under dropout); modes are restored
    module by module on exit. So BatchNorm is what it is at inference, a fixed map by its running statistics, whose
    weight and bias have gradients like any others; what an example does to these statistics is not part of its
    influence. One without running statistics is refused: nothing of it belongs to one example.

    The first batch is passed backward once more with weighted losses, to make sure that every row of every
    component's gradient belongs to one example.

    Args:
        model: Any module.
        components: What `find_components` takes, or components that it returned. With None, which means
            everything trainable, parameters that cannot be covered are named in a warning.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with GradientCapture(model) as capture:
        ...     [record] = capture.record(torch.ones(3, 2), lambda model, x: model(x).sum(1))
        >>> record.example_gradients().shape  # 2 weights and a bias
        torch.Size([3, 1, 3])
    """

    def __init__(self, model: nn.Module, components: Select | Iterable[Component] = None) -> None:
        self.model = model
        self.components = _resolved(model, components)
        if components is None and self.coverage.missing:
            warnings.warn(f"GradientCapture: {self.coverage}. Their influence is not recorded.", stacklevel=2)
        used = dict.fromkeys(use.module for c in self.components for use in c.uses)
        self._modules = {name: model.get_submodule(name) for name in used}
        self._rules = {name: rule_for(module) for name, module in self._modules.items()}
        self._packings = {c.name: packing(model, c.uses) for c in self.components}
        self._shared: set[str] = set()
        self._checked = False
        self._log: CallLog | None = None
        self._exit: ExitStack | None = None

    @property
    def coverage(self) -> Coverage:
        """How much of the trainable parameters the components cover."""
        return coverage_of(self.model, self.components)

    def __enter__(self) -> GradientCapture:
        """Attach the hooks and switch to evaluation mode."""
        if self._exit is not None:
            raise RuntimeError("GradientCapture: the capture is active already; leave it before entering it again.")
        self._exit = ExitStack()
        self._exit.enter_context(evaluating(self.model))
        for name, module in self._modules.items():
            enter, leave = _hooks(self, name)
            # A formula holds for the layer itself, so its hook is the first; a call that is repeated comes with the
            # hooks of others, so it is noted before and after them.
            repeats = self._rules[name].repeats_call
            if repeats:
                before = module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
                self._exit.callback(before.remove)
            after = module.register_forward_hook(leave, prepend=not repeats, with_kwargs=True)
            self._exit.callback(after.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks and restore the modes, whatever happened."""
        assert self._exit is not None
        stack, self._exit = self._exit, None
        stack.close()

    def record(
        self,
        batch: Any,
        losses: Losses,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        n: int | None = None,
        what: str = "examples",
    ) -> Iterator[LayerRecord]:
        """Run one forward and backward pass and yield one record per component, in component order.

        Args:
            batch: Handed to ``losses``.
            losses: ``(model, batch) -> [n]``, the loss of each example on its own. It runs under the caller's
                autocast, nothing else here does. Of a `BatchLoss` it is not checked whether examples mix: `probe_loss`.
            ids: Ids of the examples, int64 [n]; None numbers them.
            mask: Positions that belong to an example, bool [n, t].
            n: Number of examples; None takes the first dimension of the batch.
            what: What to call the examples in an error.

        Raises:
            ValueError: If the losses are not one finite number per example, or ``losses`` fails (ids are named).
            UnsupportedLayerError: If components did not run, or saw something other than examples; all are named.
        """
        n = batch_size(batch) if n is None else n
        ids = torch.arange(n) if ids is None else ids.cpu()
        if tuple(ids.shape) != (n,):
            raise ValueError(f"GradientCapture.record(ids): got shape {tuple(ids.shape)} for {n} examples.")
        log = self._observed(batch, losses, ids, what)
        for component in self.components:
            with torch.inference_mode(False), torch.no_grad(), full_precision():
                record = self._assembled(component, log, ids, mask)
            yield record

    def _observed(self, batch: Any, losses: Losses, ids: Tensor, what: str) -> CallLog:
        """One forward and one backward pass with everything noted."""
        if self._exit is None:
            raise RuntimeError(
                "GradientCapture.record: the capture is not active; use it as `with GradientCapture(...) as capture:`."
            )
        with torch.inference_mode(False), torch.enable_grad(), eager():
            # What was made in inference mode cannot enter a graph.
            batch = map_tensors(batch, lambda t: t.clone() if t.is_inference() else t)
            self._log = log = CallLog(len(ids), self._shared)
            try:
                values = self._values(batch, losses, ids, what)
                with full_precision():
                    self._backward(values, log)
            finally:
                self._log = None
            if not self._checked and log.spread:
                self._check_spread(log, values, batch, losses)
        self._checked = self._checked or len(ids) > 1
        return log

    def _values(self, batch: Any, losses: Losses, ids: Tensor, what: str) -> Tensor:
        """The losses, checked."""
        assert self._log is not None
        n = len(ids)
        run = partial(self._run, losses)
        try:
            values = run(batch)
        except FAILURES as error:
            spread, self._log = self._log.spread, None
            if not self._checked and spread and _runs(run, batch):  # then the rows that outputs got are to blame
                raise UnsupportedLayerError(self._refusal(dict.fromkeys(spread, _SHARED))) from error
            raise_unfit(error, run, batch, ids, what)
        if not isinstance(values, Tensor) or tuple(values.shape) != (n,):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"the loss of a batch of {n} examples has shape {shape}; expected one loss per example, [{n}]. Return "
                "losses with reduction='none', or define example_losses(batch) on the module."
            )
        bad = ids[~torch.isfinite(values.detach()).cpu()]
        if len(bad):
            raise ValueError(
                f"the loss of {len(bad)} of {n} {what} is not finite (ids {bad[:8].tolist()}); expected finite "
                "losses. Repair the model, or leave these examples out: omit_nonfinite(model, data)."
            )
        ran = {call.module for call in self._log}
        silent = {c.uses[0].module: _SILENT for c in self.components if not ran & {use.module for use in c.uses}}
        if silent:
            raise UnsupportedLayerError(self._refusal(silent))
        return values

    def _run(self, losses: Losses, batch: Any) -> Any:
        """What ``losses`` returns, whatever that is."""
        try:
            return losses(self.model, batch)
        except RuntimeError as error:
            if not of_device(error):
                explain_dtypes(batch, self.model, error)
            raise

    def _backward(self, values: Tensor, log: CallLog) -> None:
        """Gradients at every noted place."""
        edges, n = log.edges, log.n
        if not edges or not values.requires_grad:
            raise ValueError(
                "the losses do not depend on any component: is the loss detached, or every input constant?"
            )
        weights = 0.5 ** (torch.arange(n) % 3)  # powers of two, so that rounding does not enter
        weighted: Iterable[Tensor | None] = ()
        if not self._checked and n > 1 and not is_shared(values):
            total = (values * weights.to(values)).sum()
            weighted = torch.autograd.grad(total, edges, retain_graph=True, allow_unused=True)
        log.receive(torch.autograd.grad(values.sum(), edges, allow_unused=True))
        problems = {call.module: problem for call in reversed(log.calls) if (problem := call.problem(n)) is not None}
        if not problems and weighted:
            problems = dict.fromkeys(_mixing(log, weighted, weights), _MIXED)
        if problems:
            raise UnsupportedLayerError(self._refusal(problems))

    def _check_spread(self, log: CallLog, values: Tensor, batch: Any, losses: Losses) -> None:
        """The losses must be what they are when examples share the outputs that they share."""
        with torch.no_grad():
            plain = losses(self.model, batch)
        room = max(1e-4, rounding(self.model.parameters())) * values.abs().max()
        if plain.shape != values.shape or bool((plain - values).abs().max() > room):
            raise UnsupportedLayerError(self._refusal(dict.fromkeys(log.spread, _SHARED)))

    def _assembled(self, component: Component, log: CallLog, ids: Tensor, mask: Tensor | None) -> LayerRecord:
        records = []
        for use in component.uses:
            module, rule = self._modules[use.module], self._rules[use.module]
            for call in log.of(use.module):
                try:
                    record = rule.record(module, use.parameters, call.layer_call(log.n, log.memo), ids, mask)
                except UnsupportedLayerError as error:
                    raise UnsupportedLayerError(self._refusal({use.module: str(error)})) from error
                records.append(_packed(record, rule, self._packings[component.name], module, use.parameters))
        if not records:
            raise UnsupportedLayerError(self._refusal({component.uses[0].module: _IDLE}))
        return merged(records)

    def _refusal(self, problems: Mapping[str, str]) -> str:
        """The text of an error about some modules."""
        left = sum(c.numel for c in self.components if {use.module for use in c.uses} & set(problems))
        share = 100 * left / sum(c.numel for c in self.components)
        lines = [f"{name or type(self.model).__name__}: {problem}" for name, problem in sorted(problems.items())]
        return (
            f"{len(problems)} of {len(self._modules)} modules have no per-example gradient here ({share:.3g} % of the "
            f"parameters looked at). {'. '.join(lines)}. Leave them out with components=, for example components="
            f"lambda name, module: name not in {sorted(problems)}."
        )


_SILENT = (
    "it never ran in the forward pass, or only under torch.no_grad() or in a reentrant checkpoint; if another module "
    "uses its parameters, nothing was seen of it"
)
_IDLE = "the losses do not depend on what it returns, which is not laid out by examples either"
_SHARED = (
    "all examples share its output, and the model does something else when each gets a row of its own; "
    "give position embeddings indices [n, t]"
)
_MIXED = (
    "examples mix: row k of its gradient does not follow the loss of example k alone (batch statistics, a loss that "
    "compares examples, or another layout in which a dimension happens to be as long as the batch)"
)


def _resolved(model: nn.Module, components: Select | Iterable[Component]) -> list[Component]:
    if components is None or isinstance(components, str) or callable(components):
        return find_components(model, components)
    given = list(components)
    found = [c for c in given if isinstance(c, Component)]
    names = [c for c in given if isinstance(c, str)]
    if len(names) == len(given):
        return find_components(model, names)
    if len(found) != len(given):
        raise ValueError(f"GradientCapture(components={given!r}): expected components or names, not both.")
    check_components(model, found)
    return found


def _runs(run: Callable[[Any], Any], batch: Any) -> bool:
    try:
        with torch.no_grad():
            run(batch)
    except FAILURES:
        return False
    return True


def _hooks(capture: GradientCapture, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    # Plain functions, which copy.deepcopy of the model copies by reference; a bound method would be copied together
    # with the capture and a second model.
    def listening(module: nn.Module) -> CallLog | None:
        return capture._log if capture._modules[name] is module else None

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if (log := listening(module)) is not None:
            log.enter(name, args, kwargs)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if (log := listening(module)) is None:
            return None
        return log.leave(name, module, capture._rules[name], args, kwargs, output)

    return enter, leave


def _mixing(log: CallLog, weighted: Iterable[Tensor | None], weights: Tensor) -> Iterator[str]:
    """Modules whose output gradients do not scale, row by row, with the weights of the losses."""
    rest = iter(weighted)
    for call in log:
        for output, gradient in zip(call.outputs, call.gradients, strict=True):
            scaled = next(rest)
            if gradient is None or scaled is None:
                continue
            before, after = _row_norms(gradient, output.dim), _row_norms(scaled, output.dim)
            if (after - before * weights.to(before)).abs().max() > 1e-2 * before.max():
                yield call.module


def _row_norms(gradient: Tensor, dim: int) -> Tensor:
    rows = widened(gradient.movedim(dim, 0).flatten(1))
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _packed(
    record: LayerRecord, own: LayerRule, wanted: LayerRule, module: nn.Module, parameters: tuple[str, ...]
) -> LayerRecord:
    """Bring a record to the form of its component, where modules that share parameters do not agree on one."""
    if not wanted.repeats_call or own.repeats_call:
        return record
    parts = own.split(module, parameters, record.example_gradients())
    return DenseRecord(record.ids, torch.cat([parts[p].flatten(1) for p in parameters], dim=1))
