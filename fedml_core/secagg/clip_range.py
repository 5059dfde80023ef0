"""The next round's clip, from what the previous round made public: its mean, and how many coordinates were clipped.

Guarantees: the clip depends on public sums alone, so every party computes the same one, and it tells nothing new.
Guarantees: it never falls below `floor`, and from one round to the next never changes by more than `growth`.
Trust: server sees only sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedml_core.checks import require_number, require_whole
from fedml_core.errors import ConfigError

__all__ = ["ClipFromSums"]


@dataclass(frozen=True, kw_only=True)
class ClipFromSums:
    """Sets the clip to `headroom` times the mean's largest coordinate times sqrt(n).

    It assumes that clients disagree at most as independent ones do: n coordinates of size x, of random signs, have a
    mean of about x / sqrt(n). Clients that agree more get a clip too wide by up to sqrt(n), which costs precision and
    nothing else. Clients that cancel each other more are clipped; their count is in the sum, and makes the clip grow.

    Args: floor: > 0, the smallest clip. growth: > 1, the largest factor between rounds. headroom: >= 1.
        tolerated: the share of coordinates, from 0 to below 1, that may be clipped without the clip's growing.
    """

    floor: float
    growth: float = 2.0
    headroom: float = 4.0
    tolerated: float = 1e-4

    def __post_init__(self) -> None:
        """Check every range."""
        require_number("floor", self.floor, above=0, at_most=1e30)
        require_number("growth", self.growth, above=1)
        require_number("headroom", self.headroom, at_least=1)
        require_number("tolerated", self.tolerated, at_least=0, below=1)

    def following(self, clip: float, largest_mean: float, *, count: int, clipped_share: float) -> float:
        """Return the clip of the round after one with `clip`.

        Args: largest_mean: the largest absolute coordinate of the mean of the `count` updates, in parameter units.
            clipped_share: clipped coordinates over count * d, from the masked scalars.
        Raises: ConfigError: if an argument is not a finite number in its range.
        """
        require_number("clip", clip, above=0)
        require_number("largest_mean", largest_mean, at_least=0)
        require_whole("count", count, at_least=1)
        if not 0 <= clipped_share <= 1:
            raise ConfigError(f"clipped_share must be from 0 to 1, got {clipped_share}")
        # A mean of clipped updates says little about how large they were.
        clipped = clipped_share > self.tolerated
        wanted = math.inf if clipped else self.headroom * largest_mean * math.sqrt(count)
        return max(self.floor, min(max(wanted, clip / self.growth), clip * self.growth))
