"""The audit of private training by example bites (A10): an honest site passes, and each sabotage of it fails.

Samples and noise are drawn from keys 1, 2, ... (`same_noise`), so every verdict here reproduces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from clients.per_example import AdaptiveClipping, PerLayerClipping
from fedml_core.data import Examples
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.task import Task
from fedml_core.training import Training
from simulations.audit.books import check_example_books
from simulations.audit.example_audit import ExamplesAudited, audit_examples
from simulations.audit.example_canaries import Attacked, attack_gradients, attack_labels, coins
from simulations.audit.example_mechanism import check_batches, check_example_clipping, check_example_noise
from simulations.audit.example_site import ExampleSite
from simulations.audit.findings import Finding, Verdict, overall
from tests.simulations.audit.audit_cases import examples, same_noise
from tests.simulations.audit.example_cases import CLIP, ROUNDS, SABOTAGE, mapped, private_of, real, site

__all__ = ["same_noise"]

pytestmark = pytest.mark.usefixtures("same_noise")
FOUND_BY = {
    "half the noise": {"example canaries", "example noise"},
    "no noise": {"example canaries", "example noise"},
    "no clipping": {"example canaries", "example clipping"},
    "clipping to twice the norm": {"example canaries", "example clipping"},
    "one noise for all steps of a training": {"example noise"},
    "one noise for all trainings": {"example noise"},
    "shuffled": {"example sampling"},
    "batches of one size": {"example sampling"},
    "twice the rate": {"example sampling"},
    "an account that is told once": {"example books"},
}


def _canaries(own: ExampleSite) -> Finding:
    found = attack_gradients(own, 1000)
    return found.finding if isinstance(found, Attacked) else found


def _books(own: ExampleSite) -> Finding:
    probe = own.probe()
    for _ in range(3):
        probe.released(own.data)
    return check_example_books(own, None)


TESTS: dict[str, Callable[[ExampleSite], Finding]] = {
    "example canaries": _canaries,
    "example noise": lambda own: check_example_noise(own)[0],
    "example clipping": check_example_clipping,
    "example sampling": lambda own: check_batches(own)[0],
    "example books": _books,
}


def finding(audited: ExamplesAudited, what: str) -> Finding:
    return next(one for one in audited.findings if one.what == what)


def test_an_honest_site_passes_and_its_epsilon_is_estimated() -> None:
    said: list[str] = []
    audited = audit_examples(site(), canaries=1000, tell=said.append)
    assert overall(audited.findings) is Verdict.PASS, [one.said for one in audited.findings]
    assert audited.attacked is not None
    numbers = finding(audited, "example canaries").numbers
    # Averages over Poisson samples tell less than the claim's worst case: 16 steps, of which an example is in four.
    assert 0.4 * numbers["claimed"] < numbers["estimate"] < numbers["claimed"]
    assert 0 < numbers["one_run_bound_95"] < numbers["claimed"]
    assert numbers["steps"] == numbers["steps_of_the_run"] == 16
    assert finding(audited, "mislabelled examples").numbers["one_run_bound_95"] < numbers["claimed"]
    assert finding(audited, "example noise").numbers["ratio"] == pytest.approx(1.0, abs=0.02)
    assert finding(audited, "example clipping").numbers["longest_over_clip_norm"] < 1.3
    assert "mislabelled examples: round 4 of 4" in said


def test_a_site_without_sampling_is_estimated_at_what_it_claims() -> None:
    whole = site(noise=4.0, rate=1.0, rounds=10)
    found = attack_gradients(whole, 1000)
    assert isinstance(found, Attacked)
    claimed = epsilon_of(
        [{"name": "repeated", "count": 10, "event": {"name": "gaussian", "noise_multiplier": 4.0}}],
        delta=1e-5,
        unit="example",
        adjacency="add-or-remove-one",
    ).epsilon
    assert found.claim.epsilon == pytest.approx(claimed, rel=0.01)
    # 1,000 canaries leave a standard deviation of 0.34 at this epsilon of 3.3.
    assert found.estimate.epsilon == pytest.approx(claimed, abs=1.0)
    assert found.bound < claimed


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, found in FOUND_BY.items() for what in found])
def test_each_sabotage_of_a_site_fails(name: str, what: str) -> None:
    found = TESTS[what](site(SABOTAGE[name]))
    assert found.what == what
    assert found.verdict is Verdict.FAIL, found.said


def test_every_sabotage_is_found_by_something() -> None:
    assert set(FOUND_BY) == set(SABOTAGE)
    assert all(FOUND_BY.values())


@pytest.mark.parametrize("clipping", [PerLayerClipping(CLIP), AdaptiveClipping(CLIP)], ids=["per layer", "adaptive"])
def test_other_ways_of_clipping_pass(clipping: Any) -> None:
    own = site(clipping=clipping)
    found = [check_example_clipping(own), check_example_noise(own)[0]]
    assert [one.verdict for one in found] == [Verdict.PASS] * 2, [one.said for one in found]


def test_rare_samples_are_attacked_training_by_training() -> None:
    rare = site(noise=0.8, rate=0.01)
    found = attack_gradients(rare, 200)
    assert isinstance(found, Attacked)
    assert found.finding.verdict is not Verdict.FAIL, found.finding.said
    assert found.finding.numbers["steps"] == 4 * 100
    assert check_batches(rare)[0].verdict is Verdict.PASS


def test_only_the_first_steps_of_a_long_run_are_attacked_and_the_claim_is_about_these() -> None:
    long = site(rate=0.1, rounds=1000)
    found = attack_gradients(long, 50)
    assert isinstance(found, Attacked)
    assert found.finding.numbers["steps"] == 3000 < long.steps == 10_000
    assert "for the 3000 of 10000 steps that were attacked" in found.finding.said
    assert found.claim.epsilon < long.claim(long.steps).epsilon


def test_a_print_that_forgets_earlier_rounds_fails() -> None:
    # The accountant is made anew in each round, so the run prints what one round costs.
    own = site()
    one, right = (own.claim(steps).epsilon for steps in (own.private.steps(own.training), own.steps))
    books = check_example_books(own, {"epsilon": one})
    assert books.verdict is Verdict.FAIL
    assert f"its {ROUNDS} trainings cost" in books.said
    assert check_example_books(own, {"epsilon": right}).verdict is Verdict.PASS


def test_coins_are_fair_and_differ_by_what_they_are_for() -> None:
    first = coins(3, "a", 1000)
    assert 440 < first.sum() < 560
    assert (first != coins(3, "b", 1000)).any()
    assert all(2 <= coins(seed, "few", 8).sum() <= 6 for seed in range(50))


def test_a_site_s_examples_are_taken_into_memory_without_weights() -> None:
    held = examples(6)
    from_map = ExampleSite.examples(mapped(held))
    assert torch.equal(from_map.inputs[0], held.inputs[0])
    weighted = type(held)(held.inputs, held.targets, torch.full((6,), 2.0))
    assert ExampleSite.examples(weighted).weights is None
    assert private_of().steps(site().training) == 4


def test_mislabelled_examples_of_a_regression_have_targets_of_others() -> None:
    inputs, targets = torch.arange(24.0).reshape(12, 2), torch.arange(12.0)
    task = Task.regression(model=lambda: torch.nn.Linear(2, 1), train_data=lambda: Examples.of(inputs, targets))
    private = private_of()
    own = ExampleSite(task, Examples.of(inputs, targets), real(private), private, site().training, 2, 1e-5, seed=3)
    found = attack_labels(own, own.data, 1000, lambda text: None)
    assert isinstance(found, Attacked)
    assert found.finding.numbers["canaries"] == 12
    assert found.finding.verdict is Verdict.PASS
    same = Examples.of(inputs, torch.zeros(12))
    refused = attack_labels(dataclasses.replace(own, data=same), same, 1000, lambda text: None)
    assert isinstance(refused, Finding)
    assert refused.verdict is Verdict.INFO


def test_a_site_that_learns_by_heart_under_little_noise_is_told_from_outside() -> None:
    # Hardly any noise: loss at mislabelled examples falls where they are held, and the bound says so.
    loud = dataclasses.replace(
        site(noise=0.01, rate=1.0, rounds=30), training=Training(epochs=10, batch_size=40, learning_rate=2.0)
    )
    found = attack_labels(loud, examples(100), 100, lambda text: None)
    assert isinstance(found, Attacked)
    assert found.finding.numbers["one_run_correct"] > 0.8 * found.finding.numbers["one_run_guesses"]
    assert found.bound > 0.5
