"""A task's model on one device, ready to load any parameters and evaluate them. Servers and clients both need one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedml_core.data import Data, Examples, batch_of
from fedml_core.dense import quick_dense
from fedml_core.devices import choose_device, fitting_threads, precision_context, seeded_torch
from fedml_core.errors import ConfigError, FedveilError, TaskError
from fedml_core.forward import Forward, Tally, guarded
from fedml_core.memory_layout import MemoryLayout, arrange, blames_layout, in_channels_last
from fedml_core.minibatches import Batch, Fetch, ordered_batches
from fedml_core.model import ModelSpec
from fedml_core.randomness import seed_of
from fedml_core.task import Task
from fedml_core.update import MAX_SUMS, flaw_in_name

_log = logging.getLogger(__name__)
_IN_EVERY_REPORT = ("examples", "loss")
_Result = TypeVar("_Result")


class Evaluator:
    """Keeps one module of a task and evaluates whatever parameters it is given.

    Guarantees: what a call returns depends on its arguments, the task, the seed and the kind of device, never on the
    calls before: everything of the module that does not travel in the vector (frozen parameters, integer buffers such
    as BatchNorm's batch counter, buffers that are not persistent) starts each call as it was built. Torch's global
    random state is left as it was. One evaluator serves one thread at a time.

    Args: seed: of the initial weights. device: see `fedml_core.devices.choose_device`. memory_layout: see
        `fedml_core.memory_layout.MemoryLayout`. tell: told when "auto" has to give channels-last up.
    Raises: TaskError: if the model cannot be built, or a reply cannot hold the metrics: too many, or a name that is
        reserved or not one of letters, digits, `_`, `-` and `.`. ConfigError: for the device or the memory layout.
    """

    def __init__(
        self,
        task: Task,
        seed: int = 0,
        *,
        device: str = "auto",
        memory_layout: MemoryLayout = "contiguous",
        tell: Callable[[str], None] = _log.warning,
    ) -> None:
        _check_names(task.metrics)
        self.task, self._seed = task, seed
        self.device = choose_device(device)
        self.module = task.build(seed)
        self.spec = ModelSpec.of(self.module)
        self._initial = self.spec.flatten(self.module).cpu()
        self.module.to(self.device)
        self.threads = fitting_threads(self.module)
        self._exact = all(tensor.dtype == "float32" for tensor in (*self.spec.parameters, *self.spec.buffers))
        self._rest = _Rest.of(self.module, self.spec)
        self.channels_last, self._gave_up = False, False
        self.lay_out(memory_layout, tell)

    def initial(self) -> Tensor:
        """Return the built model as a new float32 vector of shape (d,) on the CPU."""
        return self._initial.clone()

    def lay_out(self, memory_layout: MemoryLayout, tell: Callable[[str], None]) -> None:
        """Lay the module out in memory as the constructor's arguments of these names say; "auto" gives up only once.

        Raises: ConfigError: for an unknown layout.
        """
        self._may_give_up, self._tell = memory_layout == "auto", tell
        given_up = self._may_give_up and self._gave_up
        self.channels_last = in_channels_last(memory_layout, self.module, self.device) and not given_up
        arrange(self.module, channels_last=self.channels_last)

    def adapting(self, work: Callable[[], _Result]) -> _Result:
        """Return what `work`, one whole call, returns; if channels-last lets it fail, begin it anew without.

        From then on this evaluator stays with the default layout. It is the user's model that decides, by calling
        `.view` on activations for example; where it does so for some inputs only, calls differ by rounding.
        """
        try:
            return work()
        except FedveilError as error:
            if not (self.channels_last and self._may_give_up and blames_layout(error)):
                raise
            why = error
        self._turn(channels_last=False)
        try:
            result = work()
        except FedveilError:
            # The layout was not to blame.
            self._turn(channels_last=True)
            raise
        self._gave_up = True
        self._tell(f"the model cannot be laid out channels-last, which is faster, and keeps the default layout: {why}")
        return result

    def _turn(self, *, channels_last: bool) -> None:
        self.channels_last = channels_last
        arrange(self.module, channels_last=channels_last)

    def evaluate(self, parameters: Tensor, data: Data, batch_size: int = 256) -> dict[str, float]:
        """Return `examples`, the data's total weight, and the weighted sums of the loss and of each metric over it.

        Divided by `examples` they are exact averages; sums of several clients, or of parts of the data, add up.

        Raises: TaskError: if the data does not fit the task, or the user's code fails; SpecMismatchError:
            if `parameters` is not (d,).
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be >= 1, got {batch_size}")
        return self.adapting(lambda: self._evaluate(parameters, data, batch_size))

    def _evaluate(self, parameters: Tensor, data: Data, batch_size: int) -> dict[str, float]:
        when = "in evaluation"
        seeded = seeded_torch(seed_of(self._seed, "evaluate"), self.device, self.threads)
        with seeded, torch.no_grad(), quick_dense(self.module, self.device):
            source, total = self.source(data, when)
            self.load(parameters, when)
            self.module.eval()
            tally = Tally(self.device)
            forward = Forward(self.task, self.module, when, precision_context("float32", self.device))
            orders = [torch.arange(len(data))]
            for batch in self.batches(source, orders, batch_size):
                losses, outputs = forward(batch)
                forward.tally(tally, losses, outputs, batch)
        return {"examples": total, **{name: value for name, value in tally.read().items() if name != "examples"}}

    def source(self, data: Data, when: str) -> tuple[Examples | Fetch, float]:
        """Return the data on the device, or how to fetch it there, and its total weight."""
        guarded(self.task.check, "the task's data", when)(data, "the client's data")
        if isinstance(data, Examples):
            total = len(data) if data.weights is None else data.weights.cpu().sum(dtype=torch.float64).item()
            return data.to(self.device), float(total)

        def fetch(index: Tensor) -> Examples:
            batch = batch_of(data, index)
            # Out of range, a label would end the process on a GPU.
            self.task.check(batch, "a batch of the client's data")
            return batch

        return guarded(fetch, "the task's data", when), float(len(data))

    def batches(self, source: Examples | Fetch, orders: Iterable[Tensor], batch_size: int) -> Iterator[Batch]:
        """Return the batches of `source` in each of `orders`, on the device and in the module's memory layout."""
        return ordered_batches(source, orders, batch_size, self.device, channels_last=self.channels_last)

    def load(self, parameters: Tensor, when: str) -> Tensor:
        """Return what the module holds after loading, in its own dtypes, as a float32 vector on the device.

        It may be `parameters` itself; whoever changes it must copy it.
        """

        def load() -> Tensor:
            self._rest.restore(self.module)
            given = parameters.to(self.device)
            self.spec.load(given, self.module)
            return given if self._exact and given.dtype == torch.float32 else self.spec.flatten(self.module)

        start: Tensor = guarded(load, "loading the task's model", when)()
        return start

    @torch.no_grad()
    def moved(self, start: Tensor, when: str) -> Tensor:
        """Return what the module holds now minus `start`, as a new float32 vector on the device."""

        def subtract() -> Tensor:
            if not self._exact:
                return self.spec.flatten(self.module).sub_(start)
            moved = torch.empty_like(start)
            held: dict[str, Tensor] = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
            for tensor in (*self.spec.parameters, *self.spec.buffers):
                now, part = held[tensor.name], slice(tensor.offset, tensor.offset + tensor.size)
                # Checked, since a smaller tensor would be stretched without a word.
                if now.shape != tensor.shape:
                    raise RuntimeError(f"{tensor.name} had shape {tensor.shape}, now {tuple(now.shape)}")
                torch.sub(now, start[part].view(tensor.shape), out=moved[part].view(tensor.shape))
            return moved

        values: Tensor = guarded(subtract, "reading the task's model", when)()
        return values


def _check_names(metrics: Iterable[str]) -> None:
    names = list(metrics)
    most = MAX_SUMS - len(_IN_EVERY_REPORT)
    if len(names) > most:
        raise TaskError(f"a task may have at most {most} metrics, got {len(names)}; leave some out, or derive them")
    for name in names:
        if name in _IN_EVERY_REPORT:
            raise TaskError(f"a metric may not be called {name}, which every report has; rename it")
        if flaw := flaw_in_name(name):
            raise TaskError(f"a metric may not be called {name!r:.80}: {flaw}; rename it")


@dataclass(frozen=True)
class _Rest:
    """What of a module does not travel in its vector, as it was built."""

    kept: dict[str, Tensor] = field(repr=False)
    names: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module, spec: ModelSpec) -> _Rest:
        travelling = {tensor.name for tensor in (*spec.parameters, *spec.buffers)}
        tensors = dict(chain(module.named_parameters(), module.named_buffers()))
        kept = {name: tensor.detach().clone() for name, tensor in tensors.items() if name not in travelling}
        return cls(kept, frozenset(tensors))

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Put it back, also where a forward pass replaced, resized or added a buffer."""
        now: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, kept in self.kept.items():
            held = now.get(name)
            if held is not None and held.shape == kept.shape and held.dtype == kept.dtype:
                held.copy_(kept)
            else:
                setattr(*_place(module, name), kept.clone())
        for name in now.keys() - self.names:
            delattr(*_place(module, name))


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf
