"""Steps of K clients whose first layer's weights are touched once a segment of steps.

Within one, with rows X, start W and output errors E so far, the first layer's outputs at the rows x of a step are
x W' - rate (x X') E, which needs only the inner products x X'; at the end W gains - rate E' X at once. One step a
segment is plain descent. The idea is that of blocked updates in dense linear algebra.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from simulations.engines.fused_errors import Errors
from simulations.engines.fused_network import Network, Target
from simulations.engines.fused_plan import Group, Segment
from simulations.engines.fused_weights import Weights, shared_forward

# Halves of a triangle of inner products are worth a product of their own above this many rows.
_TRIANGLE = 48


class SegmentedRun:
    """Trains the clients of a network segment by segment; each client's weights are held."""

    def __init__(self, network: Network) -> None:
        self.network, self.workspace = network, network.workspace
        self.weights = Weights.held(network.stack.layers[0], network.count, network.workspace)
        self.weights.copy(network.start[0])

    def train(self, inputs: Tensor, plan: Sequence[Segment], errors: Errors, outputs: Tensor) -> None:
        """Take every step on rows of `inputs`; leave the outputs in `outputs` (R, c), step by step."""
        done = 0
        with self.network.threads.for_flops(self.network.step_flops(0)):
            for segment in plan:
                done = _SegmentRun(self, segment, inputs).train(errors, outputs, done)
        self.weights.moved(self.network.start[0], self.weights)
        self.network.change()

    def rows(self, values: Tensor) -> None:
        """Fill `values` (K, d) with what each client adds to the start."""
        for weights in (self.weights, *self.network.rest):
            weights.put(values)

    def total(self, factors: Tensor) -> Tensor:
        """Return the sum (d,) of the rows, each times its factor (K,)."""
        out = torch.empty(self.network.size)
        for weights in (self.weights, *self.network.rest):
            weights.add_up(factors, out)
        return out


class _SegmentRun:
    """One segment's steps."""

    def __init__(self, run: SegmentedRun, segment: Segment, inputs: Tensor) -> None:
        self._run, self._segment, self._network = run, segment, run.network
        self._descent, self._size = run.network.descent, run.network.batch_size
        self._first = run.network.stack.layers[0]
        steps, clients = len(segment.active), segment.active[0]
        self._rows = run.workspace.take("rows", len(segment.rows), self._first.inputs)
        with run.network.threads.for_bytes(4 * self._rows.numel()):
            torch.index_select(inputs, 0, segment.rows, out=self._rows)
        if len(segment.pads):
            # So that what stands for no example adds nothing to any product, whatever the weights.
            self._rows.index_fill_(0, segment.pads, 0.0)
        self._errors = run.workspace.take("errors", clients, steps * self._size, self._first.outputs)
        self._before = self._by_step(self._products(), "first")
        drifting = steps > 1 and run.network.drifts
        self._drift = self._by_step(self._each(run.network.drifts[0], "drifts"), "drift") if drifting else None
        needed = steps > 1 or self._descent.max_norm is not None
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
            return self._each(self._run.weights, "products")
        # Everybody starts from the same weights.
        out = self._run.workspace.take("products", len(self._rows), self._first.outputs)
        return shared_forward(self._network.start[0], self._rows, out)

    def _each(self, weights: Weights, name: str) -> Tensor:
        out = self._run.workspace.take(name, len(self._rows), self._first.outputs)
        if len(weights.weight) == 1 and len(self._run.weights.weight) > 1:
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
        full = self._descent.max_norm is not None
        for _, part, rows in self._groups:
            _lower(out[part], rows, (0, rows.shape[1]), 0 if full else self._size)
        if self._first.bias is not None:
            out.add_(1.0)
        return out

    def train(self, errors: Errors, outputs: Tensor, done: int) -> int:
        """Take the segment's steps; return how many rows of `outputs` are filled."""
        place, size, clips = 0, self._size, self._descent.max_norm is not None
        for step, count in enumerate(self._segment.active):
            rows, here = count * size, slice(step * size, (step + 1) * size)
            before = self._before[place : place + rows].view(count, size, -1)
            self._correct(before, step, place)
            target = Target(errors, outputs, slice(done + place, done + place + rows))
            inner = self._inner[:count, here, here] if clips else None
            self._network.step(before, target, inner, self._errors[:count, here])
            place += rows
        self._finish()
        return done + place

    def _correct(self, before: Tensor, step: int, place: int) -> None:
        """Bring the first layer's outputs up to date with the segment's earlier steps."""
        if step == 0:
            return
        descent, count, size = self._descent, before.shape[0], self._size
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

    def _finish(self) -> None:
        """Give the first layer's weights the whole segment at once."""
        descent, size = self._descent, self._size
        for group, clients, rows in self._groups:
            weights = self._run.weights.part(clients)
            errors = self._errors[clients, : group.steps * size]
            if descent.keep != 1:
                errors[:, : (group.steps - 1) * size].mul_(descent.keep)
            weights.descend(errors, rows, descent.rate, descent.kept(group.steps))
            if self._network.drifts:
                drift = self._network.drifts[0]
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
