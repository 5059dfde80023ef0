"""What one client can add to a sum: its L2 norm, cut at the client and measured again where sums are taken.

Guarantees: no sum that noise is added to holds an update that is longer than its bound, or not finite.
Trust: clipping hides nothing by itself; the server sees every clipped update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fedml_core.accumulate import PlainSum
from fedml_core.checks import require_number
from fedml_core.errors import PrivacyError, ReplyError
from fedml_core.transform import Draws, State, Transform
from fedml_core.update import Update

__all__ = ["BoundedSum", "ClipByNorm", "clipped"]

_SLACK = 1 + 1e-6  # what another machine's rounding may differ by
_INWARDS = 1 - 2.0**-22  # more than rounding a row to float32 can lengthen it


@dataclass(frozen=True)
class ClipByNorm(Transform):
    """Scales an update down to an L2 norm of `clip_norm` where it is longer.

    Guarantees: the encoded update's L2 norm is at most clip_norm, for every finite update.
    Guarantees: an update that is at most as long, a zero update too, is left as it is.
    Guarantees: an update that holds NaN or infinity becomes NaN as a whole, which no sum accepts.
    Args: clip_norm: > 0, in parameter units.
    Source: McMahan et al. (2018), arXiv:1710.06963, FlatClip.
    """

    clip_norm: float

    def __post_init__(self) -> None:
        """Check the norm."""
        require_number("clip_norm", self.clip_norm, at_least=1e-12, at_most=1e12)

    def encode(self, update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
        """Return the clipped update."""
        return update.replace(values=clipped(update.values, self.clip_norm)[0]), memory

    def l2_bound(self, incoming: float) -> float:
        """Return the smaller of both."""
        return min(incoming, self.clip_norm)


class BoundedSum(PlainSum):
    """A sum in float64 of updates that are measured once more before they are added: a client may forget to clip.

    Guarantees: an update whose L2 norm is above `bound` by more than 10^-6 of it raises ReplyError, and is not added.
    Trust: whoever runs it sees every update.
    Args: size, max_weight: as `PlainSum`. bound: > 0.
    """

    def __init__(self, size: int, max_weight: float, bound: float) -> None:
        super().__init__(size, max_weight)
        require_number("bound", bound, above=0)
        self.bound = bound

    def add(self, update: Update, clients: Sequence[int] = ()) -> None:
        """Add an update of one client, or of K, none of them too long.

        Raises: ReplyError: with rule `norm` where one is; otherwise as `PlainSum`.
        """
        longest = _norms(update.values)
        if longest.numel() and float(longest.max()) > self.bound * _SLACK:
            raise ReplyError("norm", f"the update is longer than the {self.bound:g} that noise is added for")
        super().add(update, clients)

    def merge(self, other: Self) -> None:
        """Add what another sum with the same bound has taken."""
        if other.bound != self.bound:
            raise PrivacyError(f"cannot merge a sum bounded by {other.bound:g} into one bounded by {self.bound:g}")
        super().merge(other)

    def _add_values(self, values: Tensor) -> None:
        if values.dim() == 1:
            self._add_row(values.double())
        else:
            self._add_row(values.reshape(-1, self.size).sum(dim=0, dtype=torch.float64))


def clipped(values: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Return each row scaled down to at most the norm, and its norm before, float64 of shape (...).

    Guarantees: a row that is not finite is NaN in both, so that no comparison takes it for a short one.
    """
    norms = _norms(values)
    norms = torch.where(torch.isfinite(norms), norms, torch.full_like(norms, torch.nan))
    scale = torch.where(norms > clip_norm, clip_norm * _INWARDS / norms, torch.ones_like(norms))
    scale = torch.where(torch.isnan(norms), norms, scale).unsqueeze(-1)
    # A factor that float32 cannot hold would clip to nothing, or to a rounded norm: such rows are scaled in float64.
    return (values.double() * scale).to(values.dtype) if bool((scale < 1).any()) else values * scale.to(values), norms


def _norms(values: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64)
    return norms
