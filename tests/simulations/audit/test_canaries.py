"""Canaries: who they are, what they send, and how what was released scores them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedml_core.errors import ConfigError
from fedml_core.update import Update
from simulations.audit.canaries import Canaries, FirstClients, Scores, Watched
from simulations.audit.staging import watched_by
from simulations.partition import Iid
from simulations.population import partition
from tests.simulations.audit.audit_cases import federation, plain, private, task

TEMPLATE = Update.of(torch.ones(2010), 1.0, examples=7.0, loss=3.0)


def canaries(count: int = 300, dimension: int = 2000) -> Canaries:
    return Canaries(count, dimension, 5.0, TEMPLATE, seed=8)


def test_directions_have_norm_1_and_reproduce_and_coins_are_fair() -> None:
    some = canaries()
    assert np.linalg.norm(some.direction(3)) == pytest.approx(1.0, rel=1e-5)
    assert (some.direction(3) == canaries().direction(3)).all()
    assert abs(float(some.direction(3) @ some.direction(4))) < 0.2
    assert 120 < len(some.members) < 180
    assert [int(place) for place in np.flatnonzero(some.included)] == some.members


def test_a_canary_reports_what_an_honest_client_reports_and_leaves_buffers_alone() -> None:
    update = canaries().update(3)
    assert float(update.values.norm()) == pytest.approx(5.0, rel=1e-5)
    assert not update.values[2000:].any()
    assert {name: float(value) for name, value in update.sums.items()} == {"examples": 7.0, "loss": 3.0}


def test_scores_of_absent_canaries_are_standard_normal_and_of_present_ones_are_shifted() -> None:
    some = canaries(count=200)
    total = torch.zeros(2010)
    for place in some.members[:5]:
        total += some.update(place).values
    scores = np.sqrt(2000) * some.cosines(total)
    rest = np.delete(scores, some.members[:5])
    assert abs(rest.mean()) < 0.3
    assert rest.std() == pytest.approx(1.0, abs=0.2)
    assert scores[some.members[:5]].min() > 10
    assert not some.cosines(torch.zeros(2010)).any()


def test_directions_that_are_too_many_to_keep_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    released = canaries(count=20).update(5).values
    kept = canaries(count=20).cosines(released)
    monkeypatch.setattr("simulations.audit.canaries._KEPT_BYTES", 1)
    assert canaries(count=20).cosines(released) == pytest.approx(kept, abs=1e-6)


def test_likelihoods_favour_what_a_rare_participant_does() -> None:
    # One canary is far out in one round of ten, another is a little off in all; only the first looks like sampling.
    rounds = np.full((10, 2), 0.3)
    rounds[:, 0] = 0.0
    rounds[4, 0] = 3.0
    scores = Scores(rounds, rounds.sum(axis=0), rounds.sum(axis=0))
    rare, often = scores.likelihood(2.0, 0.1), scores.likelihood(2.0, 1.0)
    assert rare[0] > rare[1]
    assert often[0] == pytest.approx(often[1])


def test_a_population_with_canaries_loads_real_clients_only() -> None:
    real = partition(task, Iid(), 4, seed=0)
    watched = Watched(FirstClients(real, 3), canaries(count=20))
    assert len(watched) == 3 + len(canaries(count=20).members)
    assert len(watched.load(2).train) == len(real.load(2).train)
    counted = watched.counts([0, 2, 5])
    assert counted is not None
    assert counted.tolist() == [15, 15, 0]
    with pytest.raises(ConfigError, match="client 3 is a canary"):
        watched.load(3)


def test_canaries_are_longer_than_the_bound_where_there_is_one() -> None:
    assert watched_by(federation(private()), None, 1).canaries.length >= 5.0
    unbounded = watched_by(federation(plain()), None, 1).canaries
    assert unbounded.length == pytest.approx(float(unbounded.template.values.norm()), rel=1e-6)
    assert unbounded.count == 64
