"""The core abstraction: a federated feature as two halves around a sum.

Weigh / divide, clip / rescale, quantise / dequantise, nothing / Adam: a client half runs on each update before it is
added, a server half on the total after. `chain` composes and is itself a transform; the base class is the identity.
Encode runs left to right on the client, decode right to left on the server. The idea of pairing both halves is that of
TensorFlow Federated's aggregators and pfl-research's postprocessors; the shape of the contract is Optax's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedml_core.errors import StrategyError
from fedml_core.model import ModelSpec
from fedml_core.named import Named
from fedml_core.randomness import Key, seeded
from fedml_core.update import Total, Update

State = Mapping[str, Any]


@dataclass(frozen=True)
class Draws:
    """Reproducible randomness for one client, or a stream for each of K, keyed by purpose and never by worker."""

    keys: tuple[tuple[Key, ...], ...]
    batched: bool = False

    @classmethod
    def of(cls, *key: Key) -> Draws:
        """Return the draws of one key."""
        return cls((key,))

    @classmethod
    def each(cls, keys: Sequence[tuple[Key, ...]]) -> Draws:
        """Return the draws of K keys; every draw then has a leading dimension K."""
        return cls(tuple(keys), batched=True)

    def within(self, part: Key) -> Draws:
        """Return independent draws for one part of the work."""
        return Draws(tuple((*key, part) for key in self.keys), self.batched)

    def uniform(self, size: int) -> Tensor:
        """Return float32 uniforms in [0, 1) of shape (size,), or (K, size)."""
        rows = [seeded(*key).random(size, dtype=np.float32) for key in self.keys]
        return torch.from_numpy(np.stack(rows) if self.batched else rows[0])


@dataclass(frozen=True)
class Guide:
    """How local training deviates from plain descent: each step's gradient g becomes g + mu (w - w_start) + offset.

    `mu`: >= 0. `offset`: float32, (..., p) over the p trainable parameters, or None. Guides add up.
    """

    mu: float = 0.0
    offset: Tensor | None = None

    def __add__(self, other: Guide) -> Guide:
        """Return the guide that applies both."""
        if self.offset is None or other.offset is None:
            offset = self.offset if other.offset is None else other.offset
        else:
            offset = self.offset + other.offset
        return Guide(self.mu + other.mu, offset)


@dataclass(frozen=True)
class Transform(Named):
    """A federated feature: a client half, a server half, and what both guarantee. The base class is the identity.

    Subclasses are frozen dataclasses. Fields are public configuration; secrets come only as arguments.
    Laws, tested for every transform: `decode` of the summed `encode`s is what its docstring promises; no argument is
    changed; a batch of K equals K singles; `l2_bound` holds on adversarial inputs; states are trees that survive a
    checkpoint.
    """

    def init(self, spec: ModelSpec) -> State:
        """Return the server's state before the first round."""
        return {}

    def told(self, state: State) -> State:
        """Return the part of the server's state that clients need this round; it is public."""
        return {}

    def memory(self, spec: ModelSpec) -> State:
        """Return what each client keeps between rounds, before its first; it never leaves the client."""
        return {}

    def encoded_size(self, size: int) -> int:
        """Return the length of encoded values for incoming values of length `size`."""
        return size

    def guide(self, told: State, memory: State) -> Guide:
        """Return how the client's local training deviates from plain descent."""
        return Guide()

    def encode(self, update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
        """Return the client half's result and the client's new memory. `update` may hold K clients."""
        return update, memory

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the server half's result and the server's new state."""
        return total, state

    def l2_bound(self, incoming: float) -> float:
        """Return the largest L2 norm of one client's encoded values, given that of the incoming values.

        Where `encode` is the identity, that is `incoming`; whoever overrides `encode` must override this, or promises
        nothing.
        """
        return incoming if type(self).encode is Transform.encode else math.inf

    def event(self) -> Mapping[str, Any] | None:
        """Return what an accountant must be told about one round, or None for nothing."""
        return None

    def placed(self, left: Transform, right: Transform) -> Transform:
        """Return what stands in a chain for this transform, between what is left and what is right of it.

        Noise calibrates itself here to what is left of it, or refuses; nearly everything else stays as it is.
        Raises: PrivacyError: if it cannot protect in this place.
        """
        return self

    def client_half(self) -> Transform | None:
        """Return what a client needs of this transform, or None if its client half is the identity."""
        kind = type(self)
        plain = all(
            getattr(kind, name) is getattr(Transform, name)
            for name in ("encode", "guide", "memory", "told", "encoded_size")
        )
        return None if plain else self


@dataclass(frozen=True)
class Chain(Transform):
    """Transforms one after the other: `encode` left to right, `decode` right to left. Empty, it is the identity."""

    parts: tuple[Transform, ...] = ()

    def init(self, spec: ModelSpec) -> State:
        """Return each part's state, by its place."""
        return {key: part.init(spec) for key, part in self._keyed()}

    def told(self, state: State) -> State:
        """Return what each part tells, by its place."""
        return {key: part.told(state[key]) for key, part in self._keyed() if part.client_half()}

    def memory(self, spec: ModelSpec) -> State:
        """Return each part's memory, by its place; parts without any are left out."""
        return {key: kept for key, part in self._keyed() if (kept := part.memory(spec))}

    def encoded_size(self, size: int) -> int:
        """Return the length after the last part."""
        for part in self.parts:
            size = part.encoded_size(size)
        return size

    def guide(self, told: State, memory: State) -> Guide:
        """Return the sum of the parts' guides."""
        guides = (part.guide(told.get(key, {}), memory.get(key, {})) for key, part in self._keyed())
        return sum(guides, Guide())

    def encode(self, update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
        """Return the update after every client half, left to right."""
        kept = dict(memory)
        for key, part in self._keyed():
            update, after = part.encode(update, told.get(key, {}), memory.get(key, {}), draws.within(key))
            if after:
                kept[key] = after
        return update, kept

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the total after every server half, right to left."""
        states = dict(state)
        for key, part in reversed(self._keyed()):
            total, states[key] = part.decode(total, state[key], draws.within(key))
        return total, states

    def l2_bound(self, incoming: float) -> float:
        """Return the bound after the last part."""
        for part in self.parts:
            incoming = part.l2_bound(incoming)
        return incoming

    def event(self) -> Mapping[str, Any] | None:
        """Return the parts' events, or None if there are none."""
        events = [event for part in self.parts if (event := part.event()) is not None]
        return {"name": "composed", "events": events} if events else None

    def client_half(self) -> Transform | None:
        """Return a chain of the same length whose pure server parts are empty chains, or None if all are.

        An empty chain stands for the identity because it has a name to be sent by, and keeps the others' places.
        """
        halves = [part.client_half() for part in self.parts]
        if all(half is None for half in halves):
            return None
        return Chain(tuple(half or Chain() for half in halves))

    def _keyed(self) -> list[tuple[str, Transform]]:
        return [(str(place), part) for place, part in enumerate(self.parts)]


def chain(*transforms: Transform) -> Transform:
    """Return the transforms as one; nested chains are flattened, identities dropped, and noise calibrated.

    Raises: PrivacyError: if noise finds no bound to its left, or something to its right that would change the sum.
    Example:
        >>> chain(Transform(), chain()) == chain()
        True
    """
    parts: list[Transform] = []
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise StrategyError(f"a chain takes transforms, got {type(transform).__name__}")
        if isinstance(transform, Chain):
            parts.extend(transform.parts)
        elif type(transform) is not Transform:
            parts.append(transform)
    return Chain(
        tuple(
            part.placed(Chain(tuple(parts[:place])), Chain(tuple(parts[place + 1 :])))
            for place, part in enumerate(parts)
        )
    )
