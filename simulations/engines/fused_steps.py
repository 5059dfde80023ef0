"""The steps of K clients through a dense stack: forward and backward by hand, no gradient of a weight ever stored.

The first layer's weights, most of a dense model, are touched once a segment of steps. Within one, with rows X, start
W and output errors E so far, its outputs at the rows x of a step are x W' - rate (x X') E, which needs only the inner
products x X'; at the end W gains - rate E' X at once. One step a segment is plain descent. The idea is that of
blocked updates in dense linear algebra, and of the dual form of linear models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from simulations.engines.fused_errors import Errors
from simulations.engines.fused_plan import Group, Segment
from simulations.engines.fused_stack import Stack
from simulations.engines.fused_weights import Descent, Weights, Workspace, shared_forward

# Halves of a triangle of inner products are worth a product of their own above this many rows.
_TRIANGLE = 48


class Active:
    """What the `count` clients still training need at each step: views, made once for as long as they are as many."""

    def __init__(self, run: Run, count: int) -> None:
        clients, size = slice(count), run.batch_size
        self.rest = [weights.part(clients) for weights in run.weights[1:]]
        self.drifts = [drift.part(clients) if len(drift.weight) > 1 else drift for drift in run.drifts[1:]]
        widths = [layer.outputs for layer in run.stack.layers]
        take = run.workspace.take
        self.before = [take(f"before {place}", count, size, width) for place, width in enumerate(widths)]
        self.after = [
            take(f"after {place}", count, size, layer.outputs) if layer.activation else before
            for place, (layer, before) in enumerate(zip(run.stack.layers, self.before, strict=True))
        ]
        self.errors = [take(f"error {place}", count, size, width) for place, width in enumerate(widths)]


class Run:
    """Trains K clients from `start` (d,), segment by segment; `values` (K, d) end as what they add to it."""

    def __init__(
        self, stack: Stack, start: Tensor, values: Tensor, descent: Descent, workspace: Workspace, batch_size: int
    ) -> None:
        self.stack, self.descent, self.workspace, self.batch_size = stack, descent, workspace, batch_size
        self.start = [Weights.of(layer, start.unsqueeze(0)) for layer in stack.layers]
        self._moved = [Weights.of(layer, values) for layer in stack.layers]
        self.weights = [Weights.held(layer, len(values), workspace) for layer in stack.layers]
        drift = descent.drift
        self.drifts = [] if drift is None else [Weights.of(layer, torch.atleast_2d(drift)) for layer in stack.layers]

    def train(self, inputs: Tensor, plan: Sequence[Segment], errors: Errors, outputs: Tensor) -> None:
        """Take every step on rows of `inputs`; leave the outputs in `outputs` (R, c), step by step."""
        # With one segment the first layer's change is one product, written where it is sent from.
        whole = len(plan) == 1 and self.descent.plain
        if whole:
            self.weights[0] = self._moved[0]
        for weights, start in list(zip(self.weights, self.start, strict=True))[whole:]:
            weights.copy(start)
        done = 0
        for segment in plan:
            done = _SegmentRun(self, segment, inputs, whole=whole).train(errors, outputs, done)
        for weights, start, moved in list(zip(self.weights, self.start, self._moved, strict=True))[whole:]:
            weights.moved(start, moved)


class _SegmentRun:
    """One segment's steps."""

    def __init__(self, run: Run, segment: Segment, inputs: Tensor, *, whole: bool) -> None:
        self._run, self._segment, self._whole = run, segment, whole
        self._size, self._first = run.batch_size, run.stack.layers[0]
        steps, clients = len(segment.active), segment.active[0]
        self._rows = run.workspace.take("rows", len(segment.rows), self._first.inputs)
        torch.index_select(inputs, 0, segment.rows, out=self._rows)
        if len(segment.pads):
            # So that what stands for no example adds nothing to any product, whatever the weights.
            self._rows.index_fill_(0, segment.pads, 0.0)
        self._errors = run.workspace.take("errors", clients, steps * self._size, self._first.outputs)
        self._before = self._by_step(self._products(), "first")
        drifting = steps > 1 and run.drifts
        self._drift = self._by_step(self._each(run.drifts[0], "drifts"), "drift") if drifting else None
        needed = steps > 1 or run.descent.max_norm is not None
        self._inner = self._inner_products(clients, steps) if needed else self._rows.new_empty(0)

    @cached_property
    def _groups(self) -> list[tuple[Group, slice, Tensor]]:
        """Return each group, its clients, and their rows (K, r, in)."""
        found = []
        for group in self._segment.groups:
            count, length = group.last - group.first, group.steps * self._size
            rows = self._rows[group.start :][: count * length].view(count, length, -1)
            found.append((group, slice(group.first, group.last), rows))
        return found

    def _products(self) -> Tensor:
        """Return the first layer's outputs for all rows, with the weights as they are now."""
        if self._segment.first:
            return self._each(self._run.weights[0], "products")
        # Everybody starts from the same weights.
        out = self._run.workspace.take("products", len(self._rows), self._first.outputs)
        return shared_forward(self._run.start[0], self._rows, out)

    def _each(self, weights: Weights, name: str) -> Tensor:
        out = self._run.workspace.take(name, len(self._rows), self._first.outputs)
        if len(weights.weight) == 1 and len(self._run.weights[0].weight) > 1:
            return shared_forward(weights, self._rows, out)
        for group, clients, rows in self._groups:
            part = out[group.start :][: rows.shape[0] * rows.shape[1]].view(*rows.shape[:2], -1)
            weights.part(clients).forward(rows, part)
        return out

    def _by_step(self, rows: Tensor, name: str) -> Tensor:
        if self._segment.by_step is None:
            return rows
        out = self._run.workspace.take(f"{name} by step", len(rows), rows.shape[1])
        return torch.index_select(rows, 0, self._segment.by_step, out=out)

    def _inner_products(self, clients: int, steps: int) -> Tensor:
        """Return (K, r, r) inner products of each client's rows, one added for a bias; later with earlier rows only."""
        length = steps * self._size
        out = self._run.workspace.take("inner", clients, length, length)
        full = self._run.descent.max_norm is not None
        for _, part, rows in self._groups:
            _lower(out[part], rows, (0, rows.shape[1]), 0 if full else self._size)
        if self._first.bias is not None:
            out.add_(1.0)
        return out

    def train(self, errors: Errors, outputs: Tensor, done: int) -> int:
        """Take the segment's steps; return how many rows of `outputs` are filled."""
        place, active = 0, None
        for step, count in enumerate(self._segment.active):
            if active is None or len(active.errors[0]) != count:
                active = Active(self._run, count)
            rows = count * self._size
            before = self._before[place : place + rows].view(count, self._size, -1)
            self._correct(before, step, place)
            self._step(step, active, before, (errors, outputs, slice(done + place, done + place + rows)))
            place += rows
        self._finish()
        return done + place

    def _correct(self, before: Tensor, step: int, place: int) -> None:
        """Bring the first layer's outputs up to date with the segment's earlier steps."""
        if step == 0:
            return
        descent, count, size = self._run.descent, before.shape[0], self._size
        earlier = self._errors[:count, : step * size]
        if descent.keep != 1:
            earlier[:, : (step - 1) * size].mul_(descent.keep)
        if self._drift is not None:
            drift = self._drift[place : place + count * size].view_as(before)
            before.mul_(descent.kept(step)).add_(drift, alpha=descent.drifted(step))
            keep = 1.0
        else:
            keep = descent.kept(step)
        inner = self._inner[:count, step * size : (step + 1) * size, : step * size]
        before.baddbmm_(inner, earlier, beta=keep, alpha=-descent.rate)

    def _step(self, step: int, active: Active, before: Tensor, loss: tuple[Errors, Tensor, slice]) -> None:
        errors, outputs, rows = loss
        befores, afters = [before, *active.before[1:]], list(active.after)
        gradients = list(active.errors)
        first_error = self._errors[: len(before), step * self._size : (step + 1) * self._size]
        if first_error.is_contiguous():  # otherwise torch would not batch a product into it
            gradients[0] = first_error
        afters[-1] = outputs[rows].view_as(afters[-1])
        self._forward(active, befores, afters)
        errors.at(rows, afters[-1].flatten(0, 1), gradients[-1].flatten(0, 1))
        self._backward(active, befores, afters, gradients)
        if self._run.descent.max_norm is not None:
            self._clip(step, gradients, afters, self._run.descent.max_norm)
        if gradients[0] is not first_error:
            first_error.copy_(gradients[0])
        self._descend(active, gradients, afters)

    def _forward(self, active: Active, befores: list[Tensor], afters: list[Tensor]) -> None:
        """Fill the outputs of every layer before and after its activation; without one they are the same tensor."""
        layers, last = self._run.stack.layers, len(afters) - 1
        for place, layer in enumerate(layers):
            if place and place == last and layer.activation is None:
                befores[place] = afters[place]
            if place:
                active.rest[place - 1].forward(afters[place - 1], befores[place])
            if layer.activation is not None:
                layer.activation.forward(befores[place], afters[place])
            elif place < last:
                afters[place] = befores[place]
            elif place == 0:
                afters[place].copy_(befores[place])

    def _backward(self, active: Active, befores: list[Tensor], afters: list[Tensor], gradients: list[Tensor]) -> None:
        """Turn the gradient at the outputs into that before every layer's activation."""
        for place in range(len(gradients) - 1, -1, -1):
            activation = self._run.stack.layers[place].activation
            if activation is not None:
                activation.backward(gradients[place], befores[place], afters[place])
            if place:
                torch.bmm(gradients[place], active.rest[place - 1].weight, out=gradients[place - 1])

    def _descend(self, active: Active, gradients: list[Tensor], afters: list[Tensor]) -> None:
        descent = self._run.descent
        for place, weights in enumerate(active.rest):
            weights.descend(gradients[place + 1], afters[place], descent.rate, descent.keep)
            if active.drifts:
                weights.drift(active.drifts[place], descent.rate)

    def _clip(self, step: int, gradients: list[Tensor], afters: list[Tensor], maximum: float) -> None:
        """Scale each client's errors as the norm of its gradient asks, which inner products give without it."""
        count, size = len(gradients[0]), self._size
        here = slice(step * size, (step + 1) * size)
        squares = (torch.bmm(gradients[0], gradients[0].mT) * self._inner[:count, here, here]).sum(dim=(1, 2))
        for layer, error, inputs in zip(self._run.stack.layers[1:], gradients[1:], afters, strict=False):
            inner = torch.bmm(inputs, inputs.mT).add_(1.0 if layer.bias else 0.0)
            squares += (torch.bmm(error, error.mT) * inner).sum(dim=(1, 2))
        scales = (maximum / (squares.clamp_min_(0).sqrt_() + 1e-6)).clamp_max_(1.0).view(-1, 1, 1)
        for error in gradients:
            error.mul_(scales)

    def _finish(self) -> None:
        """Give the first layer's weights the whole segment at once."""
        descent, size = self._run.descent, self._size
        for group, clients, rows in self._groups:
            weights = self._run.weights[0].part(clients)
            errors = self._errors[clients, : group.steps * size]
            if descent.keep != 1:
                errors[:, : (group.steps - 1) * size].mul_(descent.keep)
            weights.descend(errors, rows, descent.rate, 0.0 if self._whole else descent.kept(group.steps))
            if self._run.drifts:
                drift = self._run.drifts[0]
                part = drift.part(clients) if len(drift.weight) > 1 else drift
                weights.drift(part, descent.drifted(group.steps))


def _lower(out: Tensor, rows: Tensor, span: tuple[int, int], size: int) -> None:
    """Fill the lower triangle of `out` (K, r, r) within `span`, in blocks of `size`; 0 fills all of it."""
    start, end = span
    middle = (start + end) // 2 // size * size if size else start
    later, earlier = slice(start, end), slice(start, end)
    if end - start > _TRIANGLE and middle > start:
        _lower(out, rows, (start, middle), size)
        _lower(out, rows, (middle, end), size)
        later, earlier = slice(middle, end), slice(start, middle)
    torch.bmm(rows[:, later], rows[:, earlier].transpose(1, 2), out=out[:, later, earlier])
