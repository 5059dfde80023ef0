"""Steps of K clients whose first layer's weights never exist: the dual form of its descent.

With a client's examples X, start W and the errors A added up at each example so far, the first layer's outputs at rows
x are x W' - rate (x X') A. So X W' is one product for all clients, each client needs its examples' inner products once
however often it visits them, and what the clients add up to is one product again, A' X with each client's A times its
factor. The idea is the dual form of linear models.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simulations.engines.fused_errors import Errors
from simulations.engines.fused_network import Network, Target
from simulations.engines.fused_products import added_up, inner_products, linear, padded
from simulations.engines.fused_uses import Uses
from simulations.engines.fused_weights import Weights
from simulations.packing import Visits

__all__ = ["DualRun"]


class DualRun:
    """Trains the clients of a network. `inputs`: rows of examples; `sizes`: how many each client holds, (K,)."""

    def __init__(self, network: Network, inputs: Tensor, seen: Visits, sizes: NDArray[np.int64]) -> None:
        self._network, self._descent, self._size = network, network.descent, network.batch_size
        self._first, self._start = network.stack.layers[0], network.start[0]
        self._active, self._uses = seen.active, Uses.of(seen, sizes)
        self._steps = (seen.counts > 0).sum(dim=1)
        self._length = -(-int(self._uses.counts.max()) // self._size) * self._size
        take, clients, out = network.workspace.take, network.count, self._first.outputs
        used = len(self._uses.rows)
        self._rows = take("rows", padded(used), self._first.inputs)
        with network.threads.for_bytes(4 * used * self._first.inputs):
            torch.index_select(inputs, 0, self._uses.rows, out=self._rows[:used])
        self._rows[used:].zero_()
        self._errors = take("errors", clients, self._length, out).zero_()
        self._inner = self._inner_products()
        owners = torch.from_numpy(self._uses.owners)
        # Where each example is among the errors, and where each step's rows are.
        self._held = torch.arange(used) + torch.from_numpy(self._length * self._uses.owners) - self._own_starts(owners)
        self._places = self._held.index_select(0, self._uses.by_step) if self._uses.again else None

    def train(self, errors: Errors, outputs: Tensor) -> None:
        """Take every step; leave the outputs in `outputs` (V, c), step by step."""
        before = self._by_step(self._shared(self._start), "first")
        drifts = self._network.drifts
        drift = self._by_step(self._each(drifts[0]), "drift") if drifts else None
        with self._network.threads.for_flops(self._network.step_flops(1)):
            self._take_steps(errors, outputs, before, drift)
        self._network.change()

    def _take_steps(self, errors: Errors, outputs: Tensor, before: Tensor, drift: Tensor | None) -> None:
        take, width, place = self._network.workspace.take, self._first.outputs, 0
        for step, count in enumerate(self._active):
            rows = slice(place, place + count * self._size)
            here = before[rows].view(count, self._size, width)
            own = self._correct(here, step, rows, None if drift is None else drift[rows].view_as(here))
            error = take("step's error", count, self._size, width)
            self._network.step(here, Target(errors, outputs, rows), own, error)
            self._keep(error, step, rows)
            place = rows.stop

    def rows(self, values: Tensor) -> None:
        """Fill `values` (K, d) with what each client adds to the start."""
        moved, start, descent = Weights.of(self._first, values), self._start, self._descent
        for client, (at, count) in enumerate(zip(self._uses.starts, self._uses.counts, strict=True)):
            error = self._errors[client, :count]
            torch.mm(error.t(), self._rows[at : at + count], out=moved.weight[client])
        moved.weight.mul_(-descent.rate)
        if moved.bias is not None:
            torch.mul(self._errors.sum(dim=1, keepdim=True), -descent.rate, out=moved.bias)
        if descent.keep != 1:
            moved.add(start, self._kept() - 1)
        if self._network.drifts:
            moved.add(self._network.drifts[0], self._drifted())
        for weights in self._network.rest:
            weights.put(values)

    def total(self, factors: Tensor) -> Tensor:
        """Return the sum (d,) of the rows, each times its factor (K,)."""
        out, used = torch.empty(self._network.size), len(self._uses.rows)
        errors = self._network.workspace.take("weighed", len(self._rows), self._first.outputs)
        torch.index_select(self._errors.flatten(0, 1), 0, self._held, out=errors[:used])
        errors[:used].mul_(factors[torch.from_numpy(self._uses.owners)].unsqueeze(1))
        errors[used:].zero_()
        there, descent = Weights.of(self._first, out.unsqueeze(0)), self._descent
        with self._network.threads.for_flops(self._broad_flops):
            torch.mul(added_up(errors, self._rows), -descent.rate, out=there.weight[0])
        if there.bias is not None:
            torch.mul(errors.sum(dim=0), -descent.rate, out=there.bias[0, 0])
        if descent.keep != 1:
            there.add(self._start, (factors @ (self._kept() - 1)).view(1))
        if self._network.drifts:
            drift, amounts = self._network.drifts[0], factors * self._drifted()
            for client in range(len(drift.weight)):
                alone = amounts[client : client + 1] if len(drift.weight) > 1 else amounts.sum().view(1)
                there.add(drift.part(slice(client, client + 1)), alone)
        for weights in self._network.rest:
            weights.add_up(factors, out)
        return out

    def _kept(self) -> Tensor:
        return torch.tensor([self._descent.kept(int(steps)) for steps in self._steps])

    def _drifted(self) -> Tensor:
        return torch.tensor([self._descent.drifted(int(steps)) for steps in self._steps])

    def _own_starts(self, owners: Tensor) -> Tensor:
        return torch.from_numpy(self._uses.starts).index_select(0, owners)

    def _shared(self, weights: Weights) -> Tensor:
        """Return what one client's weights make of all rows."""
        out = self._network.workspace.take("products", len(self._rows), self._first.outputs)
        with self._network.threads.for_flops(self._broad_flops):
            return linear(self._rows, weights.weight[0], None if weights.bias is None else weights.bias[0, 0], out)

    @property
    def _broad_flops(self) -> float:
        """Of a product with all rows."""
        return 2.0 * len(self._rows) * self._first.inputs * self._first.outputs

    def _each(self, weights: Weights) -> Tensor:
        """Return what each client's weights, or those of one for all, make of its rows."""
        if len(weights.weight) == 1:
            return self._shared(weights)
        out = self._network.workspace.take("products", len(self._rows), self._first.outputs)
        for client, (at, count) in enumerate(zip(self._uses.starts, self._uses.counts, strict=True)):
            torch.mm(self._rows[at : at + count], weights.weight[client].t(), out=out[at : at + count])
            if weights.bias is not None:
                out[at : at + count].add_(weights.bias[client])
        return out

    def _by_step(self, rows: Tensor, name: str) -> Tensor:
        out = self._network.workspace.take(f"{name} by step", len(self._uses.by_step), self._first.outputs)
        return torch.index_select(rows, 0, self._uses.by_step, out=out)

    def _inner_products(self) -> Tensor:
        """Return (K, r, r) inner products of each client's examples, one added for a bias, in the order of use."""
        out = self._network.workspace.take("inner", self._network.count, self._length, self._length).zero_()
        for client, (at, count) in enumerate(zip(self._uses.starts, self._uses.counts, strict=True)):
            inner_products(self._rows, int(at), int(at + count), out[client, :count, :count])
        return out if self._first.bias is None else out.add_(1.0)

    def _correct(self, before: Tensor, step: int, rows: slice, drift: Tensor | None) -> Tensor | None:
        """Bring the first layer's outputs up to date; return the step's own inner products if they are needed."""
        descent, count, size, clips = self._descent, len(before), self._size, self._descent.max_norm is not None
        if step == 0 and not clips:
            return None
        earlier = min(step * size, self._length)
        if self._places is None:
            inner = self._inner[:count, step * size : (step + 1) * size]
            own = inner[:, :, step * size : (step + 1) * size] if clips else None
        else:
            places = self._places[rows]
            inner = self._inner.flatten(0, 1).index_select(0, places).view(count, size, -1)
            columns = (places % self._length).view(count, 1, size).expand(count, size, size)
            own = inner.gather(2, columns) if clips else None
        if step:
            keep = descent.kept(step)
            if drift is not None:
                before.mul_(keep).add_(drift, alpha=descent.drifted(step))
                keep = 1.0
            before.baddbmm_(inner[:, :, :earlier], self._errors[:count, :earlier], beta=keep, alpha=-descent.rate)
        return own

    def _keep(self, error: Tensor, step: int, rows: slice) -> None:
        """Add a step's errors to those of its examples."""
        count, size = len(error), self._size
        if self._descent.keep != 1:
            self._errors[:count].mul_(self._descent.keep)
        if self._places is None:
            self._errors[:count, step * size : (step + 1) * size].copy_(error)
        else:
            self._errors.flatten(0, 1).index_add_(0, self._places[rows], error.flatten(0, 1))
