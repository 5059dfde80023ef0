"""One step of local training: forward, backward, guide, clip, optimizer; and the sums that it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clients.minibatches import Batch
from clients.optimizers import needs_closure
from fedml_core.errors import ConfigError, FedveilError, TaskError
from fedml_core.task import Task

__all__ = ["Forward", "LocalStep", "Steering", "Tally", "guarded"]

# How many numbers on the device wait to be added up; a list costs less than an addition at every step.
_WAITING = 512

_REMEDIES = {
    "Expected more than 1 value per channel": "BatchNorm cannot train on a single example: give the client at least 2 "
    "and a batch_size of at least 2, or use GroupNorm",
    "does not require grad": "the loss must depend on the model's trainable parameters, through torch alone",
    "must have the same dtype": "give the model inputs of its own dtype, or convert them in its forward",
}


def guarded(call: Callable[..., Any], what: str, when: str, kind: type[FedveilError] = TaskError) -> Callable[..., Any]:
    """Return `call`, changed so that whatever user code raises becomes one line of `kind`, with its cause chained."""

    def run(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except FedveilError:
            raise
        except Exception as error:
            line = " ".join(str(error).split())
            remedy = next((f"; {text}" for sign, text in _REMEDIES.items() if sign in line), "")
            raise kind(f"{what} failed {when}: {type(error).__name__}: {line}{remedy}") from error

    return run


class Tally:
    """Sums of per-example values by name. They stay on the device until `read`, so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        # Apple's GPUs have no float64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._waiting: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """Add `values` (n,), each times its weight."""
        # Summed at once: the values could be a view of the weights that the next step changes.
        if weights is not None:
            values = values.to(self._dtype) * weights
        waiting = self._waiting.setdefault(name, [])
        waiting.append(values.sum(dtype=self._dtype))
        if len(waiting) == _WAITING:
            waiting[:] = [torch.stack(waiting).sum()]

    def read(self) -> dict[str, float]:
        """Return the sums."""
        return {name: torch.stack(waiting).sum().item() for name, waiting in self._waiting.items()}


class Forward:
    """The user's model, loss and metrics; each is called so that its failure names it and the round."""

    def __init__(self, task: Task, module: nn.Module, when: str, precision: AbstractContextManager[object]) -> None:
        self._model = guarded(module, "the task's model", when)
        self._loss = guarded(task.loss, "the task's loss", when)
        self._metrics = {
            name: guarded(metric, f"the task's metric {name}", when) for name, metric in task.metrics.items()
        }
        self._precision = precision

    def __call__(self, batch: Batch) -> tuple[Tensor, Any]:
        """Return the losses, of shape (batch,) or for the whole batch (), and the outputs.

        Raises: TaskError: for any other shape, or for a scalar loss of weighted examples.
        """
        inputs, targets, weights = batch
        with self._precision:
            outputs = self._model(*inputs)
            losses = self._loss(outputs, targets)
        if not isinstance(losses, Tensor) or losses.shape != (len(targets),) or not losses.is_floating_point():
            _require_scalar(losses, len(targets), weights)
        return losses, outputs

    @torch.no_grad()
    def tally(self, tally: Tally, losses: Tensor, outputs: Any, batch: Batch) -> None:
        """Add the batch's losses, metrics and, as `examples`, weights to `tally`.

        Raises: TaskError: if a metric is not of shape (batch,).
        """
        _, targets, weights = batch
        count = len(targets)
        if weights is not None:
            tally.add("examples", weights)
        tally.add("loss", losses if losses.dim() else losses.expand(count), weights)
        for name, metric in self._metrics.items():
            values = metric(outputs, targets)
            if not isinstance(values, Tensor) or values.shape != (count,):
                raise TaskError(f"the task's metric {name} must return shape ({count},), {_got(values)}")
            tally.add(name, values, weights)


@dataclass(frozen=True)
class Steering:
    """What is done to a batch's gradient g before the optimizer takes it.

    First the guide, g + mu (w - w_start) + offset, then the L2 norm of the result is clipped: so `max_norm` bounds what
    the optimizer sees, whatever a strategy adds, and FedProx's proximal loss is clipped as any loss is.
    """

    parameters: list[nn.Parameter] = field(repr=False)
    mu: float = 0.0
    starts: list[Tensor] = field(default_factory=list, repr=False)
    offsets: list[Tensor] = field(default_factory=list, repr=False)
    max_norm: float | None = None

    @torch.no_grad()
    def apply(self) -> None:
        """Change the parameters' gradients; one that the loss did not reach counts as zero under a guide."""
        guided = bool(self.mu or self.offsets)
        for parameter in self.parameters if guided or self.max_norm else ():
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
            elif parameter.grad is None and guided:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self.mu:
            torch._foreach_add_(gradients, self._moved(), alpha=self.mu)
        if self.offsets:
            torch._foreach_add_(gradients, self.offsets)
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)

    @torch.no_grad()
    def value(self) -> Tensor | float:
        """Return mu/2 |w - w_start|^2 + <offset, w - w_start>, whose gradient the guide is."""
        total: Tensor | float = 0.0
        for place, moved in enumerate(self._moved() if self.mu or self.offsets else ()):
            total = total + self.mu / 2 * moved.square().sum()
            if self.offsets:
                total = total + (self.offsets[place] * moved).sum()
        return total

    def _moved(self) -> list[Tensor]:
        return [parameter - start for parameter, start in zip(self.parameters, self.starts, strict=True)]


class LocalStep:
    """Takes steps with one optimizer and counts them: `steps`, and in `step_size` their summed learning rates."""

    def __init__(
        self,
        forward: Forward,
        optimizer: Optimizer,
        steering: Steering,
        *,
        tally: Tally,
        when: str,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._forward, self._optimizer, self._steering = forward, optimizer, steering
        self._tally, self._scaler = tally, scaler
        self._plain = not (steering.mu or steering.offsets or steering.max_norm)
        self._backward = guarded(torch.autograd.backward, "the backward pass", when)
        step = optimizer.step if scaler is None else partial(scaler.step, optimizer)
        self._step = guarded(step, f"optimizer {type(optimizer).__name__}", when, ConfigError)
        self._searches = needs_closure(optimizer)
        self.steps, self.step_size = 0, 0.0
        if scaler is not None:
            self._check_scaled()

    def take(self, batch: Batch) -> None:
        """Train on one batch."""
        if self._searches:
            self._search(batch)
        elif self._scaler is None:
            self._differentiate(batch, count=True)
            self._step()
        elif not self._scaled_step(batch, self._scaler):
            return
        self.steps += 1
        self.step_size += float(self._optimizer.param_groups[0].get("lr", 0.0))

    def _differentiate(self, batch: Batch, *, count: bool) -> tuple[Tensor, Tensor]:
        """Leave the gradient of the weighted mean loss in the parameters; return the losses and their shares."""
        for parameter in self._steering.parameters:
            parameter.grad = None
        losses, outputs = self._forward(batch)
        shares = _shares(losses.detach(), batch[2])
        if self._scaler is None:
            self._backward(losses, shares)
        else:
            self._backward(self._scaler.scale(losses), shares)
            self._scaler.unscale_(self._optimizer)
        if not self._plain:
            self._steering.apply()
        if count:
            self._forward.tally(self._tally, losses, outputs, batch)
        return losses, shares

    def _scaled_step(self, batch: Batch, scaler: torch.amp.GradScaler) -> bool:
        """Return whether a step was taken: the scaler skips one whose gradients overflowed float16."""
        self._differentiate(batch, count=True)
        before = scaler.get_scale()
        self._step()
        scaler.update()
        return scaler.get_scale() >= before

    def _search(self, batch: Batch) -> None:
        first = True

        def closure() -> Tensor:
            nonlocal first
            with torch.enable_grad():
                losses, shares = self._differentiate(batch, count=first)
            first = False
            return (losses.detach() * shares).sum() + self._steering.value()

        self._step(closure)

    def _check_scaled(self) -> None:
        if self._searches:
            name = type(self._optimizer).__name__
            raise ConfigError(
                f"precision float16 cannot be used with {name}, which evaluates the loss again; use float32"
            )
        if any(parameter.dtype == torch.float16 for parameter in self._steering.parameters):
            raise ConfigError("precision float16 needs float32 weights, and this model's are float16; use float32")


def _shares(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return what each loss contributes to the mean; a batch whose weights are all 0 contributes nothing."""
    # Given to backward in place of a mean: the same gradient without two more kernels.
    if weights is None:
        return torch.full_like(losses, 1.0 / losses.numel())
    weights = weights.to(losses.dtype)
    return weights / weights.sum().clamp_min(torch.finfo(losses.dtype).tiny)


def _require_scalar(losses: object, count: int, weights: Tensor | None) -> None:
    if not isinstance(losses, Tensor) or losses.dim() or not losses.is_floating_point():
        raise TaskError(f"the task's loss must return shape ({count},), one loss an example, or (); {_got(losses)}")
    if weights is not None:
        raise TaskError("a scalar loss cannot weigh its examples; return one loss an example, of shape (batch,)")


def _got(value: object) -> str:
    return f"got {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"got {type(value).__name__}"
