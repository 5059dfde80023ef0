"""The base of every strategy: a pipeline of transforms, how updates are taken together, and what clients are told."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedml_core.accumulate import Accumulator, Collect, PlainSum, Rule
from fedml_core.checks import require_number
from fedml_core.errors import ReplyError, StrategyError
from fedml_core.model import ModelSpec
from fedml_core.named import Named
from fedml_core.privacy.terms import Terms
from fedml_core.transform import Chain, Draws, State, Transform
from fedml_core.update import Total, Update, all_finite

Array = Tensor | np.ndarray[Any, Any]
Vector = TypeVar("Vector", bound=Array)
Contribution = Update | tuple[Array, float] | tuple[Array, float, Mapping[str, float]]
"""An `Update` that went through the client half, or a plain delta with its example count (and mean metrics)."""


@dataclass(frozen=True, kw_only=True)
class Strategy(Named):
    """How many updates become one step. Subclass it, define `pipeline`, and every runner can use it.

        @dataclass(frozen=True, kw_only=True)
        class EqualVoices(Strategy):
            def pipeline(self) -> Transform:
                return chain(Weigh(Uniform()))

    Args: max_weight: the largest weight, and number of examples, that one client may claim; an update beyond it is
        refused, so that nobody takes an average over with 10^12 examples.
    """

    max_weight: float = 1e9

    def __post_init__(self) -> None:
        """Build the pipeline once, so that a wrong argument is refused here."""
        require_number("max_weight", self.max_weight, above=0)
        self.pipeline()

    def pipeline(self) -> Transform:
        """Return the transforms, left to right as clients run them."""
        raise StrategyError(f"{type(self).__name__} must define pipeline()")

    def rule(self) -> Rule | None:
        """Return what makes one update of many where that is not their sum, or None."""
        return None

    @property
    def needs_single_updates(self) -> bool:
        """Return whether the server must see every update by itself, which secure aggregation does not allow."""
        return self.rule() is not None

    @property
    def takes_secure_sums(self) -> bool:
        """Return whether updates are summed by a protocol that hides each of them."""
        return False

    def require_cohort(self, fewest: int, most: int) -> None:
        """Raise ConfigError or StrategyError if no round can succeed whose cohort has from `fewest` to `most` clients.

        The base class takes any.
        """

    def accumulator(self, spec: ModelSpec) -> Accumulator:
        """Return an empty accumulator for one round."""
        size, rule = self.pipeline().encoded_size(spec.size), self.rule()
        return PlainSum(size, self.max_weight) if rule is None else Collect(rule, size, self.max_weight)

    def init(self, spec: ModelSpec) -> State:
        """Return the server's state before the first round."""
        return self.pipeline().init(spec)

    def told(self, state: State) -> State:
        """Return the part of the state that clients need this round; it is public."""
        return self.pipeline().told(state)

    def client_half(self) -> Transform:
        """Return what clients run on their updates; an empty chain for nothing."""
        return self.pipeline().client_half() or Chain()

    def protection(self) -> str:
        """Return who is protected from whom, as reports name it."""
        return "none"

    def privacy(self) -> Terms | None:
        """Return on what terms the pipeline's event is differentially private, or None if nothing here is."""
        return None

    def step(self, parameters: Tensor, total: Total, state: State, draws: Draws) -> tuple[Tensor, State]:
        """Return the new global model and the new state.

        An empty cohort leaves both as they were, unless the pipeline reports an event to an accountant: then the round
        is decoded all the same, since noise must hide that nobody came.
        Raises: StrategyError: if the step does not fit the model, or the result is not finite. Nothing has changed.
        """
        pipeline = self.pipeline()
        if total.count == 0 and pipeline.event() is None:
            return parameters, state
        decoded, after = pipeline.decode(total, state, draws)
        if decoded.values.shape != parameters.shape:
            raise StrategyError(
                f"{type(self).__name__}'s step has shape {tuple(decoded.values.shape)}, "
                f"the model {tuple(parameters.shape)}"
            )
        stepped = parameters + decoded.values.to(parameters)
        if not all_finite(stepped) or not _finite_tree(after):
            raise StrategyError(
                f"{type(self).__name__}'s step is not finite; lower the learning rates, or max_weight if a client lies"
            )
        return stepped, after

    def aggregate(
        self,
        parameters: Vector,
        updates: Iterable[Contribution],
        state: State | None = None,
        *,
        draws: Draws | None = None,
    ) -> tuple[Vector, State]:
        """Return the next global model and state, for a training loop of your own.

        Args: parameters: the global model as one vector, a torch tensor or a NumPy array; `ModelSpec` makes one of a
            module. updates: for each client (delta, examples), where delta = trained - parameters; or (delta, examples,
            {"accuracy": 0.9}) for weightings that need metrics; or `Update`s that `client_half().encode` made.
            state: from the last round, or `init(spec)`; None starts anew and takes every entry for a trainable
            parameter. draws: for what is random; fresh by default, `Draws.of(seed, round)` to reproduce.
        Returns: what was given, unchanged, for an empty cohort; else a new vector of the same kind, dtype and device.
            Computes in float32.
        Raises: ReplyError: if an update must not be used, with its place. StrategyError: as `step`, and if clients of
            this strategy keep something between rounds and so must encode their updates themselves.
        Example:
            >>> import numpy as np
            >>> from strategies import FedAvg
            >>> parameters, deltas = np.zeros(2), [(np.array([1.0, -1.0]), 30), (np.array([3.0, -1.0]), 10)]
            >>> parameters, state = FedAvg().aggregate(parameters, deltas)
            >>> parameters
            array([ 1.5, -1. ])
        """
        vector = _as_vector(parameters, "parameters")
        spec = ModelSpec.of_size(len(vector))
        state = self.init(spec) if state is None else state
        draws = Draws.of("aggregate", secrets.randbits(62)) if draws is None else draws
        accumulator, told = self.accumulator(spec), self.told(state)
        for place, contribution in enumerate(updates):
            try:
                accumulator.add(self._encoded(contribution, vector, told, draws.within(place)))
            except ReplyError as error:
                raise ReplyError(error.rule, f"update {place}: {error}") from error
        stepped, after = self.step(vector, accumulator.total(), state, draws.within("decode"))
        return parameters if stepped is vector else _like(stepped, parameters), after

    def encode_for(self, update: Update, told: State, draws: Draws) -> Update:
        """Return what a client would send for `update`, for clients that only train and know nothing of pipelines.

        Raises: StrategyError: if clients of this strategy keep something between rounds, or train with an offset.
        """
        half = self.client_half()
        if half.memory(ModelSpec.of_size(update.values.shape[-1])):
            raise StrategyError(
                f"{type(self).__name__}'s clients remember something between rounds, so they must encode their own "
                "updates; run it with fedveil's clients, or call client_half().encode in yours"
            )
        return half.encode(update, told, {}, draws)[0].outgoing()

    def _encoded(self, contribution: Contribution, vector: Tensor, told: State, draws: Draws) -> Update:
        if isinstance(contribution, Update):
            return contribution
        if not isinstance(contribution, tuple | list) or len(contribution) not in (2, 3):
            raise StrategyError(f"an update is (delta, examples) or an Update, got {type(contribution).__name__}")
        delta, examples, *metrics = contribution
        values = _as_vector(delta, "a delta").to(vector.device)
        if values.shape != vector.shape:
            raise ReplyError("shape", f"the delta must have {len(vector)} entries, got {len(values)}")
        return self.encode_for(counted(values, examples, self.max_weight, *metrics), told, draws)


def counted(values: Tensor, examples: float, max_weight: float, metrics: Mapping[str, float] | None = None) -> Update:
    """Return the update of a client that trained on so many examples, with its mean metrics as sums over them.

    Raises: ReplyError: with rule `weight`, unless examples are a number in (0, max_weight].
    """
    try:
        number = float(examples)
        means = {str(name): float(value) for name, value in (metrics or {}).items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise ReplyError("weight", "the number of examples and the metrics must be numbers") from error
    if not 0 < number <= max_weight:
        raise ReplyError("weight", f"the number of examples must be > 0 and <= {max_weight:g}, got {number:g}")
    sums = {name: value * number for name, value in means.items()}
    return Update.of(values, 1.0, **{**sums, "examples": number})


def _as_vector(values: object, what: str) -> Tensor:
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            values = torch.from_numpy(values.astype(np.float32))
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise StrategyError(f"{what} must be a torch tensor or a NumPy array of floats, got {_kind(values)}")
    if values.dim() != 1:
        raise StrategyError(f"{what} must be one vector, got shape {tuple(values.shape)}; flatten the model first")
    return values.detach().float()


def _kind(values: object) -> str:
    return f"one of {values.dtype}" if isinstance(values, Tensor | np.ndarray) else type(values).__name__


def _like(vector: Tensor, example: Vector) -> Vector:
    """Return `vector` as the kind, dtype and device of `example`."""
    if isinstance(example, np.ndarray):
        return vector.numpy(force=True).astype(example.dtype)  # type: ignore[return-value]  # mypy does not narrow Vector
    return vector.to(example)  # type: ignore[return-value]  # as above


def _finite_tree(tree: object) -> bool:
    if isinstance(tree, Mapping):
        return all(_finite_tree(value) for value in tree.values())
    if isinstance(tree, list | tuple):
        return all(_finite_tree(value) for value in tree)
    if isinstance(tree, Tensor):
        return not tree.is_floating_point() or all_finite(tree)
    return not isinstance(tree, float) or math.isfinite(tree)
