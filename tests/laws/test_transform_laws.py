"""Every transform keeps the laws that the contract in `fedml_core.transform` states."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import math
import pickle
import pkgutil
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedml_core
import strategies
from fedml_core.accumulate import PlainSum
from fedml_core.errors import ReplyError
from fedml_core.proximal import Proximal
from fedml_core.transform import Chain, Draws, State, Transform, chain
from fedml_core.update import Total, Update, all_finite
from fedml_core.weighting import ByExamples, Uniform, Weigh
from strategies.server_optimizers import ServerAdam
from tests.laws.transform_cases import CASES, SPEC, Case, equal, leaves, restored, stacked

ALL = [(name, case) for name, cases in CASES.items() for case in cases]
EVERY_CASE = pytest.mark.parametrize("case", [case for _, case in ALL], ids=[repr(case.transform) for _, case in ALL])
MAX_WEIGHT = 1e9

Row = tuple[list[float], int]
rows = st.tuples(
    st.lists(st.floats(-1, 1, width=32), min_size=SPEC.size, max_size=SPEC.size), st.integers(min_value=1, max_value=50)
)
cohorts = st.lists(rows, min_size=1, max_size=4)
quickly = settings(max_examples=10)


def update_of(values: Sequence[float], examples: int) -> Update:
    sums = {"examples": float(examples), "loss": 0.5 * examples}
    facts = {"steps": torch.tensor(4.0), "step_size": torch.tensor(0.5, dtype=torch.float64)}
    return Update.of(torch.tensor(values, dtype=torch.float32), 1.0, **sums).replace(facts=facts)


def encoded_sum(
    transform: Transform, cohort: Sequence[Row], state: State, memories: Sequence[State] | None = None
) -> tuple[Total, list[State]]:
    """Return the total of a cohort's encoded updates, and what each client remembers.

    The total says that clients added noise to it: what they add is no part of a transform.
    """
    accumulator, after = PlainSum(transform.encoded_size(SPEC.size), MAX_WEIGHT), []
    for place, (values, examples) in enumerate(cohort):
        memory = memories[place] if memories else transform.memory(SPEC)
        draws = Draws.of("laws", place)
        encoded, kept = transform.encode(update_of(values, examples), transform.told(state), memory, draws)
        accumulator.add(encoded.outgoing())
        after.append(kept)
    return accumulator.total().replace(facts={"noise": math.inf}), after


def a_round(transform: Transform, cohort: Sequence[Row], state: State) -> tuple[Total, State]:
    summed, _ = encoded_sum(transform, cohort, state)
    return transform.decode(summed, state, Draws.of("laws", "decode"))


def test_every_transform_has_a_sample() -> None:
    for package in (fedml_core, strategies):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    ours = {
        name
        for name, member in Transform.members.items()
        if member.__module__.split(".")[0] in ("fedml_core", "strategies", "clients", "server", "simulations")
        and not inspect.isabstract(member)
    }
    missing = sorted(ours - CASES.keys())
    assert not missing, f"add a sample of {missing} to tests/laws/transform_cases.py"
    assert sorted(CASES.keys() - ours) == []
    assert all(type(case.transform).__name__ == name for name, case in ALL)


@EVERY_CASE
@quickly
@given(cohort=cohorts)
def test_decoding_the_sum_gives_what_the_docstring_promises(case: Case, cohort: list[Row]) -> None:
    decoded, _ = a_round(case.transform, cohort, case.transform.init(SPEC))
    values = torch.tensor([row for row, _ in cohort], dtype=torch.float64)
    examples = torch.tensor([count for _, count in cohort], dtype=torch.float64)
    promised = case.promised(values, examples)
    torch.testing.assert_close(decoded.values.double(), promised, rtol=1e-5, atol=case.tolerance(len(cohort)))
    assert decoded.values.dtype == torch.float32
    assert decoded.count == len(cohort)


@EVERY_CASE
@quickly
@given(cohort=cohorts)
def test_no_argument_is_changed(case: Case, cohort: list[Row]) -> None:
    transform, state = case.transform, case.transform.init(SPEC)
    memory, told, update = transform.memory(SPEC), transform.told(state), update_of(*cohort[0])
    before = copy.deepcopy((memory, told, update, state))
    transform.guide(told, memory)
    transform.encode(update, told, memory, Draws.of(0))
    summed, _ = encoded_sum(transform, cohort, state)
    kept = copy.deepcopy(summed)
    transform.decode(summed, state, Draws.of(0))
    for old, now in zip((*before, kept), (memory, told, update, state, summed), strict=True):
        assert equal(old, now)


@EVERY_CASE
@quickly
@given(cohort=cohorts)
def test_a_batch_of_clients_equals_them_one_by_one(case: Case, cohort: list[Row]) -> None:
    transform, state = case.transform, case.transform.init(SPEC)
    summed, memories = encoded_sum(transform, cohort, state)  # so that clients remember different things
    _, state = transform.decode(summed, state, Draws.of(0))
    told, updates = transform.told(state), [update_of(*row) for row in cohort]
    keys: list[tuple[int | str, ...]] = [("batch", place) for place in range(len(cohort))]
    batch = Update(**{name: stacked([vars(update)[name] for update in updates]) for name in vars(updates[0])})
    together, kept = transform.encode(batch, told, stacked(memories), Draws.each(keys))
    for place, update in enumerate(updates):
        alone, alone_kept = transform.encode(update, told, memories[place], Draws.of(*keys[place]))
        torch.testing.assert_close(together.values[place], alone.values, rtol=1e-6, atol=1e-6)
        assert together.weight[place] == alone.weight
        assert {name: value[place] for name, value in together.sums.items()} == dict(alone.sums)
        for one, many in zip(leaves(alone_kept), leaves(kept), strict=True):
            torch.testing.assert_close(many[place], one, rtol=1e-6, atol=1e-6)


def hostile() -> st.SearchStrategy[float]:
    extremes = [0.0, -0.0, 1e-45, -1e-38, 1e-20, 3.4e38, -3.4e38, 1e20, 1.0]
    return st.one_of(st.sampled_from(extremes), st.floats(width=32, allow_nan=False, allow_infinity=False))


@EVERY_CASE
@settings(max_examples=25)
@given(values=st.lists(hostile(), min_size=SPEC.size, max_size=SPEC.size), examples=st.integers(1, 10**9))
def test_the_l2_bound_holds_for_hostile_inputs(case: Case, values: list[float], examples: int) -> None:
    transform = case.transform
    update = update_of(values, examples)
    incoming = float(update.values.double().norm())
    bound = transform.l2_bound(incoming)
    assert 0 <= bound <= transform.l2_bound(math.inf)
    state = transform.init(SPEC)
    encoded, _ = transform.encode(update, transform.told(state), transform.memory(SPEC), Draws.of(1))
    assert encoded.values.double().norm() <= bound * (1 + 1e-6) or not all_finite(encoded.values)
    assert encoded.values.shape == (transform.encoded_size(SPEC.size),)


@EVERY_CASE
@quickly
@given(cohort=cohorts)
def test_states_and_memories_survive_a_checkpoint(case: Case, cohort: list[Row]) -> None:
    transform = case.transform
    _, state = a_round(transform, cohort, transform.init(SPEC))
    _, memories = encoded_sum(transform, cohort, state)
    back = restored(state)
    assert equal(back, restored(back))
    summed, kept = encoded_sum(transform, cohort, state, memories)
    again, kept_again = encoded_sum(transform, cohort, back, [restored(memory) for memory in memories])
    assert equal(
        transform.guide(transform.told(state), memories[0]), transform.guide(transform.told(back), memories[0])
    )
    if case.reproducible:
        assert equal(summed, again)
        assert all(equal(a, b) for a, b in zip(kept, kept_again, strict=True))
        first = transform.decode(summed, state, Draws.of(2))
        second = transform.decode(again, back, Draws.of(2))
        assert equal(first[0], second[0])
        assert equal(restored(first[1]), restored(second[1]))


@EVERY_CASE
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, SPEC.parameter_count - 1, SPEC.size - 1])
def test_what_is_not_finite_reaches_neither_the_sum_nor_a_memory(case: Case, wrong: float, place: int) -> None:
    transform, state = case.transform, case.transform.init(SPEC)
    values = [0.5] * SPEC.size
    values[place] = wrong
    accumulator = PlainSum(transform.encoded_size(SPEC.size), MAX_WEIGHT)
    encoded, kept = transform.encode(update_of(values, 3), transform.told(state), transform.memory(SPEC), Draws.of(3))
    try:
        accumulator.add(encoded)
    except ReplyError as error:
        assert error.rule in ("non-finite", "weight")
    assert all_finite(accumulator.total().values)
    assert all(all_finite(leaf) for leaf in leaves(kept))


@EVERY_CASE
def test_an_empty_cohort_decodes_to_a_finite_step(case: Case) -> None:
    transform, state = case.transform, case.transform.init(SPEC)
    nothing = PlainSum(transform.encoded_size(SPEC.size), MAX_WEIGHT).total()
    decoded, after = transform.decode(nothing, state, Draws.of(4))
    assert decoded.values.shape == (SPEC.size,)
    assert all_finite(decoded.values)
    assert all(all_finite(leaf) for leaf in leaves(after))
    if case.reproducible:
        assert decoded.values.abs().max() == 0


@EVERY_CASE
@quickly
@given(row=rows)
def test_the_client_half_does_on_the_client_what_the_whole_does(case: Case, row: Row) -> None:
    transform, state = case.transform, case.transform.init(SPEC)
    half = transform.client_half() or Chain()
    told, memory = transform.told(state), transform.memory(SPEC)
    assert equal(half.memory(SPEC), memory)
    whole, kept = transform.encode(update_of(*row), told, memory, Draws.of(5))
    part, part_kept = half.encode(update_of(*row), told, memory, Draws.of(5))
    if case.reproducible:
        assert equal(whole, part)
    else:
        torch.testing.assert_close(whole.values, part.values, rtol=1e-6, atol=1e-6)
    assert equal(kept, part_kept)
    assert equal(transform.guide(told, memory), half.guide(told, memory))
    assert half.encoded_size(SPEC.size) == transform.encoded_size(SPEC.size)


@EVERY_CASE
def test_a_transform_is_a_value_that_travels_by_name_and_by_pickle(case: Case) -> None:
    transform = case.transform
    assert Transform.from_config(json.loads(json.dumps(transform.to_config()))) == transform
    half = transform.client_half() or Chain()
    assert Transform.from_config(json.loads(json.dumps(half.to_config()))) == half
    assert pickle.loads(pickle.dumps(transform)) == transform
    assert repr(transform).startswith(type(transform).__name__)
    assert isinstance(hash(transform), int)


def test_the_base_class_is_the_identity() -> None:
    base, update = Transform(), update_of([1.0] * SPEC.size, 3)
    assert base.encode(update, {}, {}, Draws.of(0)) == (update, {})
    assert base.client_half() is None
    assert (base.l2_bound(2.5), base.encoded_size(7), base.event()) == (2.5, 7, None)


def test_a_transform_that_changes_values_promises_no_bound_by_default() -> None:
    class _Doubles(Transform):
        def encode(self, update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
            return update.replace(values=update.values * 2), memory

    assert _Doubles().l2_bound(1.0) == math.inf


def test_only_weights_of_one_keep_a_bound_and_server_halves_always_do() -> None:
    assert Weigh(Uniform()).l2_bound(2.5) == 2.5
    assert Weigh(ByExamples()).l2_bound(2.5) == math.inf
    assert chain(ServerAdam(), Proximal(0.1), Weigh(Uniform())).l2_bound(2.5) == 2.5


Broken = Callable[[Update, State, State, Draws], tuple[Update, State]]


def in_place(update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
    update.values.mul_(2)
    return update, memory


def forgetful_of_clients(update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
    return update.replace(values=update.values / update.values.norm().clamp(min=1e-9)), memory


def hides_divergence(update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
    return update.replace(values=update.values), {"last": update.values}


@pytest.mark.parametrize(
    ("encode", "law"),
    [
        (in_place, test_no_argument_is_changed),
        (in_place, test_decoding_the_sum_gives_what_the_docstring_promises),
        (forgetful_of_clients, test_a_batch_of_clients_equals_them_one_by_one),
    ],
)
def test_a_broken_transform_is_caught(encode: Broken, law: Callable[..., None]) -> None:
    broken = type("_Broken", (Transform,), {"encode": staticmethod(encode)})()
    with pytest.raises((AssertionError, ExceptionGroup)):
        law(case=Case(broken, CASES["Proximal"][0].promised))


def test_a_memory_that_keeps_divergence_is_caught() -> None:
    broken = type("_Broken", (Transform,), {"encode": staticmethod(hides_divergence)})()
    with pytest.raises(AssertionError):
        test_what_is_not_finite_reaches_neither_the_sum_nor_a_memory(
            case=Case(broken, CASES["Proximal"][0].promised), wrong=math.nan, place=0
        )
