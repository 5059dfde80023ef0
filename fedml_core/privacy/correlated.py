"""Noise that later rounds partly take back, for protection without secret sampling: trees and banded matrices.

DP-FTRL: Kairouz et al. (2021), arXiv:2103.00039; banded factorisations: Choquette-Choo et al. (2023),
arXiv:2306.08153, with the square root of the prefix-sum matrix (Fichtenberger, Henzinger and Upadhyay 2022,
arXiv:2202.11205), cut to a band. Both hold only while no client takes part more often than said;
`MinimumSeparation` sampling sees to that.

Guarantees: a client that takes part at most once in so many rounds as are asked for moves the noised sums by at most
    the sensitivity that the event states.
Guarantees: a round beyond those that the noise is for raises PrivacyError.
Trust: the server sees every update, and is trusted to add the noise and to forget the sum.
Trust: the state holds keys or noise of rounds that are past, so whoever reads a checkpoint can take noise off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedml_core.checks import require_whole
from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.model import ModelSpec
from fedml_core.named import Named
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.gaussian import ServerNoise
from fedml_core.privacy.lattice import Lattice
from fedml_core.secagg.secrets import Secret
from fedml_core.transform import Draws, State, Transform
from fedml_core.update import Total

__all__ = ["BandedNoise", "Noise", "ServerBanded", "ServerTree", "TreeNoise", "root_coefficients"]

_MOST_MOVED = 0.01  # of the bound, by rounding what is taken back


@dataclass(frozen=True, kw_only=True)
class Noise(Named):
    """The base of noise that is correlated over a run of `rounds` rounds."""

    rounds: int

    def __post_init__(self) -> None:
        """Check the rounds."""
        require_whole("rounds", self.rounds, at_least=1)

    @property
    def apart(self) -> int:
        """Return the fewest rounds from one participation of a client to its next."""
        raise ConfigError(f"{type(self).__name__} must define apart")

    def left_after(self, rounds: int) -> float | None:
        """Return the variance of what is left of the noise in the sum of so many rounds' releases, in draws' own.

        Independent noise would leave `rounds`. None: this noise does not say.
        """
        return None

    def transform(self, noise_multiplier: float, expected_cohort: float) -> Transform:
        """Return the transform that adds it."""
        raise ConfigError(f"{type(self).__name__} must define transform(noise_multiplier, expected_cohort)")


@dataclass(frozen=True, kw_only=True)
class TreeNoise(Noise):
    """Tree aggregation: the sum over the first t rounds carries the noise of at most log2(t) + 1 nodes.

    Guarantees: a client that takes part once in a tree is in at most floor(log2(restart_every)) + 1 of its nodes.
    Args: rounds: of the whole run. restart_every: rounds after which a new tree begins, and a client may take part
        again; None for one tree.
    """

    restart_every: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        if self.restart_every is not None:
            require_whole("restart_every", self.restart_every, at_least=1, at_most=self.rounds)

    @property
    def apart(self) -> int:
        """Return the rounds of one tree."""
        return self.restart_every or self.rounds

    def left_after(self, rounds: int) -> float:
        """Return the nodes that stand: those of every tree that is over, and of the last one."""
        over, begun = divmod(rounds, self.apart)
        return float(over * self.apart.bit_count() + begun.bit_count())

    def transform(self, noise_multiplier: float, expected_cohort: float) -> Transform:
        """Return the tree."""
        return ServerTree(noise_multiplier, expected_cohort, self)


@dataclass(frozen=True, kw_only=True)
class BandedNoise(Noise):
    """Banded matrix factorisation: each round takes back a part of the noise of the `bands` - 1 rounds before it.

    Guarantees: the sensitivity is exact, since participations `bands` rounds apart have columns that do not overlap.
    Args: rounds: of the whole run. bands: 1 for independent noise; state grows by the model for each more, in int64.
        separation: >= bands, the fewest rounds between participations; None for `bands`.
    """

    bands: int
    separation: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        require_whole("bands", self.bands, at_least=1, at_most=self.rounds)
        if self.separation is not None:
            require_whole("separation", self.separation, at_least=self.bands)

    @property
    def apart(self) -> int:
        """Return the separation."""
        return self.separation or self.bands

    @property
    def sensitivity(self) -> float:
        """Return the L2 sensitivity of the whole run over that of one participation."""
        squares = np.cumsum(np.square(root_coefficients(self.bands)))
        # Column j of the matrix loses what would stand below row `rounds`, so the earliest participations count most.
        columns = range(0, self.rounds, self.apart)
        return math.sqrt(sum(float(squares[min(self.bands, self.rounds - column) - 1]) for column in columns))

    def left_after(self, rounds: int) -> float:
        """Return the squared length of the last row of the prefix sums' matrix times the inverse of the banded one."""
        banded, inverse = root_coefficients(self.bands)[1:], np.zeros(rounds)
        for place in range(rounds):
            before = inverse[max(0, place - len(banded)) : place][::-1]
            inverse[place] = float(place == 0) - float(banded[: len(before)] @ before)
        return float(np.square(np.cumsum(inverse)).sum())

    def transform(self, noise_multiplier: float, expected_cohort: float) -> Transform:
        """Return the matrix."""
        return ServerBanded(noise_multiplier, expected_cohort, self)


@dataclass(frozen=True)
class ServerTree(ServerNoise, Transform):
    """Adds, round by round, the change of a tree's prefix noise: the node that is new, less those that it stands for.

    The state keeps each standing node's key, drawn when the node is, and draws its noise again when it goes. A round
    that is run again after a crash draws a new key, so no noise covers two different sums.
    Guarantees: the sum of t rounds of a tree carries the noise of as many nodes as t has binary ones.
    """

    noise: TreeNoise

    def init(self, spec: ModelSpec) -> State:
        """Return a tree without nodes."""
        return {"done": 0, "keys": {}}

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the sum plus the change of the prefix noise; `draws`, which can be reproduced, are not used."""
        done = _next_round(state, self.noise.rounds)
        place = done % self.noise.apart + 1  # in its tree, from 1
        standing = dict(state["keys"]) if place > 1 else {}
        level = (place & -place).bit_length() - 1
        gone = [standing.pop(str(below)) for below in range(level)]
        with Secret.fresh() as fresh:
            key = torch.frombuffer(bytearray(fresh.view()), dtype=torch.uint8)
        lattice, size = self.lattice(total.values.shape[-1]), total.values.shape[-1]
        steps = lattice.whole(total.values)
        steps += _node(lattice, key, size)
        for old in gone:
            steps -= _node(lattice, old, size)
        after = {"done": done + 1, "keys": {**standing, str(level): key}}
        return self.released(total, lattice.values(steps, total.values)), after

    def event(self) -> Mapping[str, Any]:
        """Return all of the run's trees as one event."""
        restarts = math.ceil(self.noise.rounds / self.noise.apart) - 1
        return {
            "name": "tree",
            "noise_multiplier": float(self.noise_multiplier),
            "steps": self.noise.apart,
            "restarts": restarts,
        }


@dataclass(frozen=True)
class ServerBanded(ServerNoise, Transform):
    """Adds noise n_t = z_t - sum over i < bands of c_i n_(t-i), where z_t is fresh and c are the square root's numbers.

    Sum, noise and what is taken back are whole steps of a grid: given what was released before, a release is a discrete
    Gaussian around a whole number, so there are no floating-point numbers that one sum can reach and another cannot.
    Guarantees: the matrix of c times the noise of all rounds is independent, of standard deviation
        noise_multiplier x bound.
    Guarantees: what rounding the sum and what is taken back adds to a client's influence is paid for by more noise, of
        at most 2 %.
    Args: as `ServerNoise`; noise: the factorisation.
    """

    noise: BandedNoise

    def init(self, spec: ModelSpec) -> State:
        """Return no noise of earlier rounds."""
        return {"done": 0, "recent": torch.zeros(0, dtype=torch.int64)}

    def lattice(self, size: int) -> Lattice:
        """Return the grid, whose noise pays for one more step in each coordinate of `bands` rounds.

        Raises: PrivacyError: as `ServerNoise`, or if that would be more than 1 % of the bound.
        """
        fine, bands = super().lattice(size), self.noise.bands
        moved = self.noise_multiplier * math.sqrt(size * bands) * fine.step / fine.sigma
        if moved > _MOST_MOVED:
            raise PrivacyError(
                f"{size} coordinates with {bands} bands are too many for noise_multiplier {self.noise_multiplier:g}: "
                "rounding them would move the sum too far; use a smaller model, fewer bands or less noise"
            )
        # Relative to the bound less the 1 % that `fine` may have given to its own rounding.
        return Lattice(fine.step / (1 - moved / (1 - _MOST_MOVED)))

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the sum plus this round's noise; `draws`, which can be reproduced, are not used."""
        done = _next_round(state, self.noise.rounds)
        lattice, size = self.lattice(total.values.shape[-1]), total.values.shape[-1]
        noise, taken_back = lattice.noise(NoiseStream.fresh(), size), np.zeros(size)
        recent = state["recent"].reshape(-1, size).numpy()  # the newest first
        for coefficient, before in zip(root_coefficients(self.noise.bands)[1:], recent, strict=False):
            taken_back += coefficient * before
        noise -= np.rint(taken_back).astype(np.int64)
        values = lattice.values(lattice.whole(total.values) + noise, total.values)
        kept = np.concatenate([noise[None], recent])[: self.noise.bands - 1]
        return self.released(total, values), {"done": done + 1, "recent": torch.from_numpy(kept.reshape(-1, size))}

    def event(self) -> Mapping[str, Any]:
        """Return the whole run's factorisation as one event."""
        return {
            "name": "matrix",
            "noise_multiplier": float(self.noise_multiplier),
            "sensitivity": self.noise.sensitivity,
        }


def root_coefficients(count: int) -> NDArray[np.float64]:
    """Return the first `count` numbers of the Toeplitz matrix whose square sums prefixes: 1, 1/2, 3/8, 5/16, ..."""
    index = np.arange(1, count, dtype=np.float64)
    return np.concatenate([[1.0], np.cumprod((2 * index - 1) / (2 * index))])


def _next_round(state: State, rounds: int) -> int:
    done = int(state["done"])
    if done >= rounds:
        raise PrivacyError(
            f"the noise was drawn for {rounds} rounds, and this is round {done + 1}; "
            "name more rounds before a run begins"
        )
    return done


def _node(lattice: Lattice, key: torch.Tensor, size: int) -> NDArray[np.int64]:
    return lattice.noise(NoiseStream(key.numpy().tobytes()), size)
