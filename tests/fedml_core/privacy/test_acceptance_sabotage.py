"""Each sabotage of the plan, done to the code that runs: the claim stays as it was, and something must not.

Noise that is halved, reused, late or the same in each layer, and clipping that does not clip, are done to strategies in
`tests/simulations/audit`; here the pieces beneath them, the sampling, and the books.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import server.books
from fedml_core.errors import FedveilError, RefusalError
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.discrete import DiscreteGaussian
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.ledger import Account, Budget, Ledger, Purpose
from fedml_core.privacy.noised_encoding import NoisedEncoding
from server.sampling import PoissonSampling
from simulations.audit.audit import Audited
from simulations.audit.cohorts import check_sampling
from simulations.audit.findings import Finding, Verdict
from simulations.audit.mechanism import check_bound
from tests.simulations.audit.audit_cases import EPSILON, audit, private, same_noise, shuffled
from tests.simulations.audit.test_mechanism import SPEC, TEMPLATE, noise
from tests.simulations.project_cases import fedveil

__all__ = ["same_noise"]

ADD = "add-or-remove-one"
SITE = Account("ward", "client", ADD)
ROUND = {"name": "gaussian", "noise_multiplier": 2.0}


def failed(audited: Audited) -> set[str]:
    return {one.what for one in audited.findings if one.verdict is Verdict.FAIL}


def test_half_the_noise_of_the_sampler_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DiscreteGaussian.draw
    assert noise(private()).verdict is Verdict.PASS
    monkeypatch.setattr(DiscreteGaussian, "draw", lambda self, stream, count: honest(self, stream, count) // 2)
    assert noise(private()).verdict is Verdict.FAIL


def test_a_key_that_is_used_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoiseStream, "fresh", lambda: NoiseStream(bytes(32)))
    found = noise(private())
    assert found.verdict is Verdict.FAIL and "the same in two releases" in found.said


def test_clipping_that_is_switched_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import fedml_core.privacy.clipping as clipping

    monkeypatch.setattr(clipping, "clipped", lambda values, clip_norm: (values, values.norm(dim=-1)))
    assert check_bound(private(), SPEC, TEMPLATE, seed=3).verdict is Verdict.FAIL


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_less_noise_in_each_client_of_a_sum_is_found(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = NoisedEncoding(40_000, 10, 5, 0.5, 1.0)

    def residual() -> float:
        sent = [planned.encode_rows(np.zeros((1, 40_000), dtype=np.float32))[0] for _ in range(5)]
        return float(planned.decode(np.sum(sent, axis=0, dtype=sent[0].dtype), 5).values.std())

    # 40,000 coordinates give the deviation to 0.35 %.
    assert residual() == pytest.approx(0.5, rel=0.02)
    honest = DiscreteGaussian.draw

    def less(self: DiscreteGaussian, stream: NoiseStream, count: int) -> NDArray[np.int64]:
        drawn: NDArray[np.int64] = np.rint(honest(self, stream, count) * share).astype(np.int64)
        return drawn

    monkeypatch.setattr(DiscreteGaussian, "draw", less)
    assert residual() == pytest.approx(0.5 * share, rel=0.02)


def test_a_shuffled_order_that_is_called_poisson_sampling_is_found() -> None:
    def found(sampling: Any) -> Finding:
        return check_sampling(sampling, 100, [10] * 20, 1)[0]

    assert found(shuffled(0.1)).verdict is Verdict.FAIL
    honest = PoissonSampling(0.1)
    sizes = [len(honest.cohort(range(100), number, 5)) for number in range(1, 21)]
    assert check_sampling(honest, 100, sizes, 1)[0].verdict is Verdict.PASS


@pytest.mark.usefixtures("same_noise")
def test_an_accountant_that_is_made_anew_each_round_is_found_by_the_attack(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def forgets(spent: Sequence[Mapping[str, Any]], event: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return [{"name": "repeated", "count": 1, "event": dict(event)}]

    monkeypatch.setattr(server.books, "counted", forgets)
    audited = audit(private(), canaries=200, rounds=8).run(tmp_path)
    assert audited.claim is not None
    # Two rounds cost an epsilon of 3, and it says of eight what one costs.
    assert audited.claim["epsilon"] < EPSILON
    assert "canaries" in failed(audited) and audited.verdict is Verdict.FAIL


def test_a_release_that_fails_after_it_was_begun_gives_nothing_back(tmp_path: Path) -> None:
    cost = [epsilon_of([ROUND] * count, delta=1e-5, unit="client", adjacency=ADD).epsilon for count in (1, 2, 3)]
    budget = Budget(epsilon=(cost[1] + cost[2]) / 2, delta=1e-5, unit="client", adjacency=ADD)
    path = tmp_path / "ledger.sqlite"
    for number in (1, 2):
        with pytest.raises(RuntimeError, match="the training died"):
            Ledger(path).reserve(ROUND, SITE, Purpose("run", "", number, "central"), budget=budget)
            raise RuntimeError("the training died")
    with pytest.raises(RefusalError, match="of the epsilon .* is spent"):
        Ledger(path).reserve(ROUND, SITE, Purpose("run", "", 3, "central"), budget=budget)
    assert Ledger(path).spent(SITE, 1e-5).epsilon == pytest.approx(cost[1])


_GAUSSIAN = '{"name":"gaussian","noise_multiplier":1}'
BAD_EVENTS = [
    "[1]",
    "[null]",
    "[[]]",
    "[{}]",
    '[{"name":{"a":1}}]',
    '[{"name":"gaussian","noise_multiplier":NaN}]',
    '[{"name":"gaussian","noise_multiplier":1e999}]',
    '[{"name":"gaussian","noise_multiplier":true}]',
    '[{"name":"gaussian","noise_multiplier":1,"seed":2}]',
    '[{"name":"repeated","count":1.5,"event":{"name":"gaussian","noise_multiplier":1}}]',
    '[{"name":"repeated","count":%s,"event":{"name":"gaussian","noise_multiplier":1}}]' % ("9" * 5000),
    '[{"name":"composed","events":{}}]',
    '[{"name":"poisson","sampling_probability":0,"event":{"name":"gaussian","noise_multiplier":1}}]',
    "[" * 3000 + "]" * 3000,
    '[{"name":"repeated","count":1000000000,"event":' * 15
    + '{"name":"gaussian","noise_multiplier":1}'
    + "}" * 15
    + "]",
    "\ufeff[]",
    "",
]


@pytest.mark.parametrize("text", BAD_EVENTS, ids=[text[:40] for text in BAD_EVENTS])
def test_what_is_no_list_of_events_is_one_line_and_never_a_traceback(text: str, tmp_path: Path) -> None:
    path = tmp_path / "events.json"
    path.write_text(text, encoding="utf-8")
    result = fedveil("account", "--events", path, "--delta", "1e-5")
    assert result.exit_code == 2 and "Traceback" not in result.output and "bug" not in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--noise-multiplier nan", "--noise-multiplier must be a finite number, got nan"),
        ("--noise-multiplier 1e400", "--noise-multiplier must be a finite number, got inf"),
        ("--noise-multiplier 1 --sampling-rate nan", "--sampling-rate must be a finite number, got nan"),
        ("--noise-multiplier 1 --mechanism matrix --sensitivity inf", "--sensitivity must be a finite number, got inf"),
        ("--noise-multiplier 1 --steps 1000000000000", "count must be >= 1 and <= 1e+09"),
        ("--noise-multiplier 1 --mechanism tree --restarts -1", "restarts must be >= 0"),
        ("--noise-multiplier 1 --population 10 --sample-size 11", "sample must be <= population, got 11 of 10"),
        ("--noise-multiplier 1 --steps 0", "--steps must be >= 1, got 0"),
        ("--target-epsilon nan", "--target-epsilon must be a finite number, got nan"),
        ("--target-epsilon 1e-300", "no noise multiplier up to 1e+07 reaches epsilon 1e-300"),
    ],
)
def test_numbers_that_are_none_are_said_by_name(words: str, said: str) -> None:
    result = fedveil("account", *words.split(), "--delta", "1e-5")
    assert result.exit_code == 2 and said in result.stderr


@pytest.mark.parametrize("rate", ["1e-320", "1e-30", "1e-12"])
def test_a_sample_of_next_to_nobody_is_answered_and_no_bug(rate: str) -> None:
    result = fedveil("account", "--noise-multiplier", "1", "--sampling-rate", rate, "--delta", "1e-5", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["epsilon"] == 0.0


@pytest.mark.parametrize("command", ["show", "verify", "export"])
def test_a_file_that_is_no_ledger_is_one_line(command: str, tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    path.write_bytes(bytes(range(256)) * 64)
    result = fedveil("ledger", command, path)
    assert result.exit_code == 2 and "cannot be used" in result.stderr and "Traceback" not in result.output
    with pytest.raises(FedveilError):
        Ledger(path).reserve(ROUND, SITE, Purpose("run", "", 1, "central"))
