"""The next chunk's examples gathered, and on their way to a GPU, while that is busy with the current chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedml_core.data import Examples
from simulations.engines.engine import Stage
from simulations.engines.resident import Resident, uploaded
from simulations.packing import Packed

__all__ = ["Ahead", "pays_ahead"]

Pack = Callable[[Sequence[int]], Packed | None]


class Ahead:
    """Packs one chunk before it is asked for, and sends it to `device` on a stream of its own.

    In the caller's thread: a GPU's steps go on by themselves once they are launched, and what users load by need not
    bear to be called while something else draws from torch's generator.
    Guarantees: gives what `pack` gives, or raises what it raises.
    """

    def __init__(self, pack: Pack, device: torch.device) -> None:
        self._pack, self._device = pack, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: tuple[list[int], Packed | None] | None = None

    def begin(self, chunk: Sequence[int]) -> None:
        """Pack a chunk, and start to send it; what was begun before and not taken is let go."""
        self._begun = None
        self._begun = list(chunk), self._prepared(chunk)

    def take(self, chunk: Sequence[int]) -> Packed | None:
        """Return a chunk, packed now unless it was begun; on a GPU, whatever uses it waits for it there."""
        if self._begun is None or self._begun[0] != list(chunk):
            self.begin(chunk)
        assert self._begun is not None
        (_, packed), self._begun = self._begun, None
        if packed is not None and self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in _tensors(packed.examples):
                tensor.record_stream(current)  # so that its memory is not given away while the steps still read it
        return packed

    def forget(self) -> None:
        """Let go of what was begun."""
        self._begun = None

    def _prepared(self, chunk: Sequence[int]) -> Packed | None:
        packed = self._pack(chunk) if chunk else None
        if packed is None or self._stream is None:
            return packed
        with torch.cuda.stream(self._stream):
            return Packed(uploaded(packed.examples, self._device), packed.offsets)


def pays_ahead(stage: Stage) -> bool:
    """Return whether there is a GPU to send examples to, on which they are not already; a CPU is busy itself."""
    return stage.trainer.device.type == "cuda" and not isinstance(stage.population, Resident)


def _tensors(examples: Examples) -> list[Tensor]:
    return [*examples.inputs, examples.targets, *([] if examples.weights is None else [examples.weights])]
