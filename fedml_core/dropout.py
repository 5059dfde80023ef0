"""Dropout whose masks are keyed by client, layer and step, so that every engine, on any device, drops the same units.

Torch's own draws depend on their order and on the device; those of one client could not be repeated beside others.
Masks from `fedml_core.randomness.keyed_words` can, and cost a fraction of `bernoulli_` on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fedml_core.errors import TaskError
from fedml_core.randomness import Key, key_bytes
from fedml_core.replaced_forward import has_forward_of, replaced_forwards

__all__ = ["KeyedDropout", "purpose_and_stream", "torch_words"]

# How many dimensions of a layer's mask are drawn one by one: all, or the batch and the channels only.
_WHOLE, _CHANNELS = 0, 2
_DROPOUTS: dict[type[_DropoutNd], tuple[int, tuple[int, ...]]] = {
    # layer: (dimensions of its mask, those of its input; any if empty). Other inputs are torch's own affair.
    nn.Dropout: (_WHOLE, ()),
    nn.Dropout1d: (_CHANNELS, (3,)),
    nn.Dropout2d: (_CHANNELS, (4,)),
    nn.Dropout3d: (_CHANNELS, (5,)),
    nn.AlphaDropout: (_WHOLE, ()),
    nn.FeatureAlphaDropout: (_CHANNELS, (2, 3, 4, 5)),
}
_ALPHAS = (nn.AlphaDropout, nn.FeatureAlphaDropout)
# The value that SELU saturates at, negated: Klambauer et al. (2017), arXiv:1706.02515.
_ALPHA = 1.6732632423543772 * 1.0507009873554805

_LANES = 4
_LEVELS = 1 << 16
_KNOWN_SIZES = 32


def _signed(word: int) -> int:
    """Return the int64 with the same 64 bits: torch has no arithmetic on unsigned words."""
    word %= 1 << 64
    return word - (1 << 64) if word >> 63 else word


_STREAM_STEP = _signed(0xD1342543DE82EF95)
_WORD_STEP = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))


def purpose_and_stream(key: tuple[Key, ...]) -> tuple[tuple[Key, ...], int]:
    """Return a client's key as its purpose and its stream: the client's number, or 0 where the key ends in text."""
    *purpose, last = key
    return (key, 0) if isinstance(last, str) else (tuple(purpose), int(last))


def torch_words(key: tuple[Key, ...], stream: int | Tensor, steps: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Return the bits of `fedml_core.randomness.keyed_words(key, stream, n)` as int64 (n,) on the device of `steps`.

    Args: stream: a number, or a 0-d int64 tensor, which may be one of many under `torch.vmap`. steps: the numbers of
        the words, from 1, times the golden ratio's word. scratch: (2, n), of which the result is then a part: fresh
        memory costs more than the arithmetic. For a number only.
    """
    base = int.from_bytes(key_bytes(*key, size=8), "little")
    if isinstance(stream, Tensor):
        return _mixed(steps + _mixed((stream + 1) * _STREAM_STEP + _signed(base)))
    start = _mixed_number(base + (stream + 1) * _STREAM_STEP)
    if scratch is None:
        return _mixed(steps + start)
    return _mixed(torch.add(steps, start, out=scratch[0]), scratch[1])


class KeyedDropout:
    """Drives the dropout layers of a module, in train mode, by masks drawn from keys instead of torch's generators.

    Guarantees: whether element i of a layer's input (in row-major order, examples first) is kept depends on the key,
    the layer's name, the step, how often the layer was called before in this forward pass, and i; not on the batch
    size, the device, the memory layout or the clients beside. Each is kept with probability 1 - p, to 2^-17; what is
    kept is scaled by the probability really used.

    Dropout1d, 2d and 3d of inputs without a batch, layers with a forward of their own, and calls of
    `torch.nn.functional.dropout` are left to torch.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._layers = {
            layer: name
            for name, layer in module.named_modules()
            if isinstance(layer, _DropoutNd) and any(has_forward_of(layer, kind) for kind in _DROPOUTS)
        }
        self._known: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._calls: dict[str, int] = {}
        self._purpose: tuple[Key, ...] = ()
        self._step = 0
        self._stream: int | Tensor = 0
        self._inside = False

    @contextmanager
    def drawing(self, purpose: tuple[Key, ...]) -> Iterator[None]:
        """Let the layers draw for `purpose`, a client's key without its number; `at` says for whom and when."""
        if not self._layers:
            yield
            return
        self._purpose = purpose
        hooks = [
            self._module.register_forward_pre_hook(self._enter),
            self._module.register_forward_hook(self._leave),
        ]
        try:
            with replaced_forwards({layer: self._forward_of(layer) for layer in self._layers}):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self._stream = 0

    def at(self, step: int, stream: int | Tensor) -> None:
        """Say that forward passes from now on are those of step `step`, from 0, of client `stream`."""
        self._step, self._stream = step, stream

    def _enter(self, *_: object) -> None:
        self._calls, self._inside = {}, True

    def _leave(self, *_: object) -> None:
        self._inside = False

    def _forward_of(self, layer: _DropoutNd) -> Callable[[Tensor], Tensor]:
        drawn, accepted = next(row for kind, row in _DROPOUTS.items() if has_forward_of(layer, kind))
        return partial(self._forward, layer, layer.forward, drawn, accepted)

    def _forward(
        self,
        layer: _DropoutNd,
        plain: Callable[[Tensor], Tensor],
        drawn: int,
        accepted: tuple[int, ...],
        values: Tensor,
    ) -> Tensor:
        fits = values.is_floating_point() and (not accepted or values.dim() in accepted)
        threshold = round((1 - layer.p) * _LEVELS)
        if not layer.training or not fits or layer.p == 0:
            return plain(values)
        if threshold == _LEVELS:
            return values
        shape = list(values.shape)
        if drawn:
            shape[drawn:] = [1] * (len(shape) - drawn)
        mask = self._kept(self._layers[layer], shape, threshold, values.device).to(values.dtype)
        return _dropped(values, mask, threshold / _LEVELS, layer)

    def _kept(self, name: str, shape: Sequence[int], threshold: int, device: torch.device) -> Tensor:
        count = math.prod(shape)
        key = (*self._purpose, "dropout", name, self._step, self._call(name))
        words = torch_words(key, self._stream, *self._memory(-(-count // _LANES), device))
        # Four 16-bit numbers a word, lowest first as on every machine that torch runs on.
        lanes = words.view(torch.int16)[:count]
        return (lanes < threshold - _LEVELS // 2).view(shape)

    def _call(self, name: str) -> int:
        number = self._calls.get(name, 0)
        if self._inside:
            self._calls[name] = number + 1
            return number
        if number > 1:
            raise TaskError(
                f"dropout layer {name} runs {number} times in a forward pass and again in the backward pass, as "
                "checkpointing does; give each place its own layer"
            )
        return 0

    def _memory(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        known = self._known.get((count, device))
        if known is None:
            if len(self._known) == _KNOWN_SIZES:
                # Sequences of ever new lengths would fill the memory.
                self._known.clear()
            steps = torch.arange(1, count + 1, device=device) * _WORD_STEP
            known = steps, torch.empty((2, count), dtype=torch.int64, device=device)
            self._known[count, device] = known
        return known


def _dropped(values: Tensor, mask: Tensor, keep: float, layer: _DropoutNd) -> Tensor:
    """Return `values` where `mask` is 1, scaled; elsewhere 0, or the layer's saturation value."""
    if isinstance(layer, _ALPHAS) and keep > 0:
        drop = 1 - keep
        scale = ((_ALPHA**2 * drop + 1) * keep) ** -0.5
        shift = (mask - keep).mul_(_ALPHA * scale)
        mask.mul_(scale)
        return values.mul_(mask).add_(shift) if layer.inplace else values * mask + shift
    mask.mul_(1 / keep if keep else 0.0)
    return values.mul_(mask) if layer.inplace else values * mask


def _mixed(words: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Return the words after SplitMix64's finalizer, in place; products wrap modulo 2^64."""
    for shift, factor in _ROUNDS:
        moved = words >> shift if scratch is None else torch.bitwise_right_shift(words, shift, out=scratch)
        # int64 shifts in copies of the sign; the mask takes them away again.
        words.bitwise_xor_(moved.bitwise_and_((1 << (64 - shift)) - 1))
        if factor != 1:
            words.mul_(factor)
    return words


def _mixed_number(word: int) -> int:
    """Return what `_mixed` makes of one word, as a signed number."""
    for shift, factor in _ROUNDS:
        word %= 1 << 64
        word = (word ^ (word >> shift)) * factor
    return _signed(word)
