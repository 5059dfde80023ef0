"""K clients' sums of losses and metrics; nothing is read before the end, so that no step waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from simulations.engines.batch_plan import Plan, Step

__all__ = ["BatchTally"]


class BatchTally:
    """Collects one value an example of a plan's columns."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._columns: dict[str, Tensor] = {}

    def add(self, name: str, step: Step, places: slice | Tensor, values: Tensor, count: int) -> None:
        """Keep the values (m, count), or (m,) for the whole batch, of the clients at `places` of a step."""
        column = self._columns.get(name)
        if column is None:
            kind = values.dtype if values.is_floating_point() else torch.float64
            # Places that no group reaches weigh 0.
            column = torch.zeros(self._plan.rows.shape, dtype=kind, device=values.device)
            self._columns[name] = column
        # A copy: the values could be a view of the parameters that the step changes.
        rows = column[step.first : step.first + step.active]
        rows[places, :count] = (values[:, None] if values.dim() == 1 else values).to(column.dtype)

    def sums(self) -> dict[str, Tensor]:
        """Return each name's mean over all that was processed times the client's weight: float64 (K,) on the CPU."""
        plan = self._plan
        # Apple's GPUs have no float64.
        kind = torch.float32 if plan.rows.device.type == "mps" else torch.float64
        weights = plan.weights.to(kind)
        weighed = [(column.to(kind) * weights).sum(dim=1) for column in self._columns.values()]
        rows = torch.stack([weights.sum(dim=1), *weighed])
        clients = torch.zeros(len(rows), len(plan.order), dtype=kind, device=rows.device)
        # One copy, which waits for the device once.
        processed, *means = clients.index_add_(1, plan.who, rows).cpu().double()
        scale = plan.totals / torch.where(processed == 0, 1.0, processed)
        return {name: values * scale for name, values in zip(self._columns, means, strict=True)}
