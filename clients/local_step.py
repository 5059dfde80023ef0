"""One step of local training: forward, backward, guide, clip, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clients.descent import SGD
from clients.optimizers import needs_closure
from fedml_core.dense import Factors, factored_weights
from fedml_core.errors import ConfigError
from fedml_core.forward import Forward, Tally, guarded
from fedml_core.minibatches import Batch

__all__ = ["LocalStep", "Steering"]


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
        optimizer: Optimizer | SGD,
        steering: Steering,
        *,
        tally: Tally,
        when: str,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._forward, self._optimizer, self._steering = forward, optimizer, steering
        self._tally, self._scaler = tally, scaler
        self._plain = not (steering.mu or steering.offsets or steering.max_norm)
        self._backward = guarded(_differentiate_sum, "the backward pass", when)
        self._backward_scaled = guarded(torch.autograd.backward, "the backward pass", when)
        step: Callable[..., object] = optimizer.step
        if scaler is not None:
            step = partial(scaler.step, optimizer)  # type: ignore[arg-type]  # it reads param_groups and calls step
        self._step = guarded(step, f"optimizer {type(optimizer).__name__}", when, ConfigError)
        self._searches = needs_closure(optimizer)
        self._factored = optimizer if isinstance(optimizer, SGD) and self._takes_factors(optimizer) else None
        self.steps, self.step_size = 0, 0.0
        if scaler is not None:
            self._check_scaled()

    def take(self, batch: Batch) -> None:
        """Train on one batch."""
        if self._searches:
            self._search(batch)
        elif self._scaler is None:
            _, _, factors = self._differentiate(batch, count=True)
            self._step()
            if factors and self._factored is not None:
                self._factored.descend(factors)
        elif not self._scaled_step(batch, self._scaler):
            return
        self.steps += 1
        self.step_size += float(self._optimizer.param_groups[0].get("lr", 0.0))

    def _takes_factors(self, optimizer: SGD) -> bool:
        """Return whether nobody but the optimizer's own plain step looks at a weight's gradient."""
        hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self._steering.parameters)
        return self._plain and optimizer.plain and self._scaler is None and not hooked

    def _differentiate(self, batch: Batch, *, count: bool) -> tuple[Tensor, Tensor, list[Factors]]:
        """Leave the gradient of the weighted mean loss in the parameters; return the losses and their shares.

        And the factors of gradients, or parts of them, that were not made.
        """
        for parameter in self._steering.parameters:
            parameter.grad = None
        losses, outputs = self._forward(batch)
        shares = _shares(losses.detach(), batch[2])
        factors: list[Factors] = []
        if self._factored is not None:
            with factored_weights(losses) as factors:
                self._backward(losses, shares)
        elif self._scaler is None:
            self._backward(losses, shares)
        else:
            self._backward_scaled(self._scaler.scale(losses), shares)
            self._scaler.unscale_(self._optimizer)  # type: ignore[arg-type]  # as above
        if not self._plain:
            self._steering.apply()
        if count:
            self._forward.tally(self._tally, losses, outputs, batch)
        return losses, shares, factors

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
                losses, shares, _ = self._differentiate(batch, count=first)
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


def _differentiate_sum(losses: Tensor, shares: Tensor) -> None:
    """Leave the gradient of the losses' weighted sum in the parameters."""
    # Given the shares as a gradient, torch.autograd.backward compares shapes by sympy: a third of a second to import.
    torch.autograd.backward(torch.dot(losses, shares) if losses.dim() else losses * shares)


def _shares(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return what each loss contributes to the mean; a batch whose weights are all 0 contributes nothing."""
    if weights is None:
        return torch.full_like(losses, 1.0 / losses.numel())
    weights = weights.to(losses.dtype)
    return weights / weights.sum().clamp_min(torch.finfo(losses.dtype).tiny)
