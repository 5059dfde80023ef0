"""The order in which a client visits its examples, and the batches that come of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fedml_core.data import Examples
from fedml_core.memory_layout import rearranged
from fedml_core.randomness import Key, keyed_words
from fedml_core.training import Training

__all__ = ["Batch", "Fetch", "epoch_order", "epoch_orders", "ordered_batches", "training_order"]

Batch = tuple[tuple[Tensor, ...], Tensor, Tensor | None]
"""Inputs, targets and example weights, on the trainer's device."""

Fetch = Callable[[Tensor], Examples]
"""Loads the examples at an index as one batch."""

# One gather serves many batches; this bounds what it holds beside the client's data.
_GATHERED_BYTES = 64 << 20


def epoch_order(key: tuple[Key, ...], epoch: int, count: int) -> Tensor:
    """Return the order in which epoch `epoch` (0 is the first) visits `count` examples; the same on every engine.

    Where the key ends in a client's number, this is that client's row of `epoch_orders`.
    """
    *purpose, last = key
    if isinstance(last, str):
        return epoch_orders(key, epoch, [0], [count])[0]
    return epoch_orders(tuple(purpose), epoch, [last], [count])[0]


def epoch_orders(purpose: tuple[Key, ...], epoch: int, clients: ArrayLike, counts: ArrayLike) -> Tensor:
    """Return each client's order in one epoch: int64 (K, max(counts)), of which row k's first counts[k] are an order.

    Args: purpose: a client's key without its last part, the client's number. counts: each client's examples, (K,).
    """
    sizes = np.asarray(counts, dtype=np.int64)
    words = keyed_words((*purpose, "shuffle", epoch), clients, int(sizes.max(initial=0)))
    words[np.arange(words.shape[1]) >= sizes[:, None]] = np.iinfo(np.uint64).max
    # Not a stable sort, which takes four times as long: words of 64 random bits are different.
    return torch.from_numpy(np.argsort(words, axis=1))


def training_order(training: Training, key: tuple[Key, ...], count: int, *, skip_single: bool) -> Iterator[Tensor]:
    """Yield each epoch's order, shortened to what `training` asks for; `steps` go on through as many epochs as needed.

    `skip_single` leaves out an epoch's last batch where it is smaller than the others and has one example.
    """
    size = training.batch_size
    whole = count - 1 if skip_single and count > 1 and count % size == 1 else count
    each = -(-whole // size)
    left = training.epochs * each if training.steps is None else training.steps
    for epoch in itertools.count():
        yield epoch_order(key, epoch, count)[: min(whole, left * size)]
        left -= each
        if left <= 0:
            return


def ordered_batches(
    data: Examples | Fetch,
    orders: Iterable[Tensor],
    batch_size: int,
    device: torch.device,
    *,
    channels_last: bool = False,
) -> Iterator[Batch]:
    """Yield batches of `data` (on `device` already, or fetched batch by batch) in each of `orders`.

    Examples in memory are gathered once for many batches, which are then views: a step pays for no indexing.
    `channels_last`: the memory layout of 4-d inputs, as `fedml_core.memory_layout.rearranged` makes it.
    """
    for order in orders:
        if isinstance(data, Examples):
            for rows in torch.split(order.to(device), _rows_at_once(data, batch_size)):
                inputs, targets, weights = _gathered(data, rows)
                yield from _views((_arranged(inputs, channels_last), targets, weights), batch_size)
        else:
            for rows in torch.split(order, batch_size):
                batch = data(rows).to(device)
                yield _arranged(batch.inputs, channels_last), batch.targets, batch.weights


def _rows_at_once(data: Examples, batch_size: int) -> int:
    row_bytes = sum(t[:1].numel() * t.element_size() for t in (*data.inputs, data.targets))
    return max(1, _GATHERED_BYTES // max(1, row_bytes * batch_size)) * batch_size


def _gathered(data: Examples, rows: Tensor) -> Batch:
    weights = None if data.weights is None else data.weights.index_select(0, rows)
    return tuple(t.index_select(0, rows) for t in data.inputs), data.targets.index_select(0, rows), weights


def _arranged(inputs: tuple[Tensor, ...], channels_last: bool) -> tuple[Tensor, ...]:
    return tuple(rearranged(tensor) for tensor in inputs) if channels_last else inputs


def _views(batch: Batch, batch_size: int) -> Iterator[Batch]:
    inputs, targets, weights = batch
    # A model may take no input at all; zip of nothing would then end before the first batch.
    columns = zip(*(torch.split(t, batch_size) for t in inputs), strict=True) if inputs else itertools.repeat(())
    weighted = itertools.repeat(None) if weights is None else torch.split(weights, batch_size)
    return zip(columns, torch.split(targets, batch_size), weighted, strict=False)
