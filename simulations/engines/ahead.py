"""The next chunk's examples gathered, and on their way to a GPU, while the current chunk trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fedml_core.data import Examples
from simulations.engines.engine import Stage
from simulations.engines.resident import Resident, uploaded
from simulations.packing import Packed

__all__ = ["Ahead", "pays_ahead"]

Pack = Callable[[Sequence[int]], Packed | None]


class Ahead:
    """Packs chunks in a thread of its own, one at a time, and sends them to `device` on a stream of its own.

    Guarantees: gives what `pack` gives, or raises what it raises; to be `close`d.
    """

    def __init__(self, pack: Pack, device: torch.device) -> None:
        self._pack, self._device = pack, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fedveil-ahead")
        self._begun: tuple[list[int], Future[Packed | None]] | None = None

    def take(self, chunk: Sequence[int], following: Sequence[int]) -> Packed | None:
        """Return a chunk, and begin with the one after it; on a GPU, whatever uses the chunk waits for it there."""
        if self._begun is None or self._begun[0] != list(chunk):
            self._begin(chunk)
        assert self._begun is not None
        packed = self._begun[1].result()
        if packed is not None and self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in _tensors(packed.examples):
                tensor.record_stream(current)  # so that its memory is not given away while the steps still read it
        self._begin(following)
        return packed

    def forget(self) -> None:
        """Let go of what was begun, once it is over."""
        begun, self._begun = self._begun, None
        if begun is not None and not begun[1].cancel():
            begun[1].exception()

    def close(self) -> None:
        """End the thread."""
        self.forget()
        self._thread.shutdown()

    def _begin(self, chunk: Sequence[int]) -> None:
        self.forget()
        if chunk:
            self._begun = list(chunk), self._thread.submit(self._prepared, list(chunk))

    def _prepared(self, chunk: Sequence[int]) -> Packed | None:
        packed = self._pack(chunk)
        if packed is None or self._stream is None:
            return packed
        with torch.cuda.stream(self._stream):
            return Packed(uploaded(packed.examples, self._device), packed.offsets)


def pays_ahead(stage: Stage) -> bool:
    """Return whether there is a GPU to send examples to, on which they are not already; a CPU would only be shared."""
    return stage.trainer.device.type == "cuda" and not isinstance(stage.population, Resident)


def _tensors(examples: Examples) -> list[Tensor]:
    return [*examples.inputs, examples.targets, *([] if examples.weights is None else [examples.weights])]
