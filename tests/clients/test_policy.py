"""A site's policy: what it allows is let through, what it does not is refused with the key and the numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from clients.asked import Asked, Sum, update_norm
from clients.policy import Policy
from fedml_core.errors import PrivacyError, RefusalError
from fedml_core.policy_tables import PolicyTable
from fedml_core.privacy.adaptive_clip import ClipByQuantile
from fedml_core.privacy.clipping import ClipByNorm
from fedml_core.privacy.local import LocalGaussian
from fedml_core.training import Training
from fedml_core.transform import Chain, Transform, chain
from fedml_core.weighting import Uniform, Weigh

PROMISE = {"name": "gaussian", "noise_multiplier": 1.0}
CLIPPED = chain(Weigh(Uniform()), ClipByNorm(2.0))
SHARE = {
    "name": "discrete-gaussian-sum",
    "clients": 4,
    "dimension": 8,
    "l2": 1.0,
    "local_noise": 0.5,
    "scale": 1000.0,
    "ring_bits": 32,
    "beta": 0.6,
}


@dataclass(frozen=True)
class _Share(Transform):
    """A share of a sum's noise, as far as its event goes."""

    clients: int = 4

    def event(self) -> dict[str, Any]:
        return {**SHARE, "clients": self.clients}


def asked(**changes: Any) -> Asked:
    made: dict[str, Any] = {
        "run": "a1b2c3",
        "server": "fl.example.org:8443",
        "round": 3,
        "training": Training(),
        "pipeline": chain(Weigh()),
    }
    return Asked(**{**made, **changes})


def policy(**table: Any) -> Policy:
    return Policy(PolicyTable.model_validate(table, strict=True))


def refusal(table: dict[str, Any], **changes: Any) -> tuple[str, str]:
    with pytest.raises(RefusalError) as caught:
        policy(**table).check(asked(**changes))
    return caught.value.rule, str(caught.value)


def test_a_site_without_a_policy_takes_part_in_everything() -> None:
    assert policy().check(asked()) == frozenset()
    assert policy().check(asked(secure=Sum(3))) == {"secure-aggregation"}
    policy().check_evaluation("any", "any", 9)


@pytest.mark.parametrize(
    ("table", "changes", "said"),
    [
        ({"runs": ["ffff*", "b"]}, {}, "the run is 'a1b2c3', this site's runs are ffff*, b"),
        ({"servers": ["*.example.com:8443"]}, {}, "the server is 'fl.example.org:8443', this site's servers are "),
        ({"optimizers": ["adam"]}, {}, "the optimizer is 'sgd', this site's optimizers are adam"),
        ({"transforms": []}, {}, "the server asks for the transform Weigh, this site's transforms are none"),
        (
            {"transforms": ["Weigh"]},
            {"pipeline": Chain((Chain((Weigh(), ClipByNorm(1.0))),))},
            "the server asks for the transform ClipByNorm, this site's transforms are Weigh",
        ),
        ({"uniform_weights": True}, {}, "the server weighs sites by ByExamples, and this site's uniform_weights is "),
        ({"maximum_rounds": 2}, {}, "the server asks for round 3, this site's maximum_rounds is 2"),
        (
            {"maximum_participations": 5},
            {"participation": 6},
            "the server asks for this site's participation 6 in the run, this site's maximum_participations is 5",
        ),
        (
            {"maximum_epochs": 2},
            {"training": Training(epochs=3)},
            "the server asks for 3 epochs in a round, this site's maximum_epochs is 2",
        ),
        (
            {"maximum_steps": 9},
            {"training": Training(steps=10)},
            "the server asks for 10 steps in a round, this site's maximum_steps is 9",
        ),
        (
            {"maximum_steps": 9},
            {},
            "the server asks for 1 epochs in a round, this site's maximum_steps is 9 and says nothing of epochs; it "
            "must ask for steps",
        ),
        (
            {"maximum_epochs": 9},
            {"training": Training(steps=1)},
            "the server asks for 1 steps in a round, this site's maximum_epochs is 9 and says nothing of steps; it "
            "must ask for epochs",
        ),
    ],
)
def test_what_the_policy_does_not_allow_is_refused_with_the_key_and_the_numbers(
    table: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    rule, words = refusal(table, **changes)
    assert rule == next(iter(table))
    assert words.startswith(said)


def test_exactly_what_the_policy_allows_is_let_through() -> None:
    policy(
        runs=["a1*"],
        servers=["fl.example.org:8443"],
        optimizers=["sgd"],
        transforms=["Weigh"],
        maximum_rounds=3,
        maximum_participations=1,
        maximum_epochs=1,
    ).check(asked())
    policy(maximum_steps=10).check(asked(training=Training(steps=10)))
    policy(uniform_weights=True).check(asked(pipeline=CLIPPED))


@pytest.mark.parametrize(
    ("accept", "changes", "found"),
    [
        (["secure-aggregation"], {"secure": Sum(3)}, {"secure-aggregation"}),
        (["central"], {"promised": PROMISE, "pipeline": CLIPPED}, {"central"}),
        (["local"], {"pipeline": LocalGaussian(1.0, 4.0)}, {"local"}),
        (["distributed"], {"secure": Sum(4), "pipeline": _Share()}, {"secure-aggregation", "distributed"}),
        (["example"], {"example": True}, {"example"}),
        (
            ["local", "secure-aggregation+central"],
            {"secure": Sum(3), "promised": PROMISE, "pipeline": CLIPPED},
            {"secure-aggregation", "central"},
        ),
    ],
)
def test_each_protection_is_recognised_by_what_the_site_can_see(
    accept: list[str], changes: dict[str, Any], found: set[str]
) -> None:
    assert policy(accept=accept).check(asked(**changes)) == found
    rule, said = refusal({"accept": accept})
    assert (rule, said) == (
        "accept",
        f"the server's work is protected by nothing that this site can see, it accepts {' or '.join(accept)}",
    )


def test_both_of_two_protections_are_needed_where_both_are_asked_for() -> None:
    rule, said = refusal({"accept": ["secure-aggregation+central"]}, secure=Sum(3))
    assert (rule, said) == (
        "accept",
        "the server's work is protected by secure-aggregation that this site can see, it accepts "
        "secure-aggregation+central",
    )


@pytest.mark.parametrize(
    ("table", "changes", "rule", "said"),
    [
        (
            {"accept": ["central"], "central": {"minimum_noise_multiplier": 1.5}},
            {"promised": PROMISE, "pipeline": CLIPPED},
            "central.minimum_noise_multiplier",
            "noise_multiplier 1 is below this site's central.minimum_noise_multiplier 1.5; more noise is needed",
        ),
        (
            {"accept": ["central"], "central": {"maximum_clip_norm": 1.0}},
            {"promised": PROMISE, "pipeline": CLIPPED},
            "central.maximum_clip_norm",
            "the server lets this site's update be 2 long, its central.maximum_clip_norm is 1; it must clip shorter",
        ),
        (
            {"accept": ["central"]},
            {"promised": PROMISE},
            "central",
            "the server promises noise and asks for an update that nothing clips, so no noise could cover it; it must "
            "clip",
        ),
        (
            {"accept": ["central"], "central": {"maximum_sampling_rate": 0.1}},
            {"promised": {"name": "poisson", "sampling_probability": 0.2, "event": PROMISE}, "pipeline": CLIPPED},
            "central.maximum_sampling_rate",
            "the sampling rate 0.2 is above this site's central.maximum_sampling_rate 0.1",
        ),
        (
            {"accept": ["local"], "local": {"minimum_noise_multiplier": 5.0}},
            {"pipeline": LocalGaussian(1.0, 4.0)},
            "local.minimum_noise_multiplier",
            "noise_multiplier 4 is below this site's local.minimum_noise_multiplier 5; more noise is needed",
        ),
        (
            {"accept": ["local"], "local": {"maximum_clip_norm": 0.5}},
            {"pipeline": LocalGaussian(1.0, 4.0)},
            "local.maximum_clip_norm",
            "the server lets this site's update be 1 long, its local.maximum_clip_norm is 0.5; it must clip shorter",
        ),
        (
            {"accept": ["distributed"]},
            {"pipeline": _Share()},
            "distributed",
            "the server asks for a share of the noise without a secure sum, in which alone the shares protect; it must "
            "ask for one",
        ),
        (
            {"accept": ["distributed"]},
            {"pipeline": _Share(40), "secure": Sum(4)},
            "distributed",
            "the noise needs 40 honest members, and the secure sum may have as few as 4; it must ask for a larger "
            "minimum or for more noise",
        ),
        (
            # 4 members with a deviation of 0.5 each make one of 1 over a clip norm of 1.
            {"accept": ["distributed"], "distributed": {"minimum_noise_multiplier": 1.01}},
            {"pipeline": _Share(), "secure": Sum(4)},
            "distributed.minimum_noise_multiplier",
            "noise_multiplier 1 is below this site's distributed.minimum_noise_multiplier 1.01; more noise is needed",
        ),
    ],
)
def test_noise_that_is_less_than_its_floor_protects_nothing_and_is_refused_with_both_numbers(
    table: dict[str, Any], changes: dict[str, Any], rule: str, said: str
) -> None:
    # Guarantees: "noise that is less than its floor protects nothing in the policy's eyes."
    assert refusal(table, **changes) == (rule, said)
    assert rule.split(".")[0] not in policy(**{**table, "accept": ["none"]}).check(asked(**changes))


def test_the_clip_norm_that_a_server_tells_counts_only_where_a_transform_clips_to_it() -> None:
    adaptive = ClipByQuantile(1.0, 0.5, 0.2, counter_scale=0.2, expected_cohort=10.0)
    told = {"1": {"clip_norm": torch.tensor(0.25, dtype=torch.float64)}}
    weigh = Weigh(Uniform())
    assert update_norm(asked(pipeline=Chain((weigh, adaptive)), told=told)) == pytest.approx(0.25)
    assert update_norm(asked(pipeline=Chain((weigh, ClipByNorm(50.0))), told=told)) == 50.0
    assert update_norm(asked(pipeline=Chain((weigh, Chain((adaptive,)))), told=told)) == math.inf
    assert update_norm(asked(pipeline=Chain((weigh, adaptive)))) == math.inf
    assert update_norm(asked(told=told)) == math.inf


def test_the_noise_of_the_sites_own_training_is_checked_before_its_first_step() -> None:
    site = policy(example={"minimum_noise_multiplier": 0.8, "maximum_sampling_rate": 0.1})
    step = {"name": "poisson", "sampling_probability": 0.1, "event": {"name": "gaussian", "noise_multiplier": 0.8}}
    site.check_example({"name": "repeated", "count": 5, "event": step})
    weaker = {**step, "event": {"name": "gaussian", "noise_multiplier": 0.4}}
    with pytest.raises(RefusalError) as caught:
        site.check_example({"name": "repeated", "count": 5, "event": weaker})
    assert caught.value.rule == "example.minimum_noise_multiplier"
    with pytest.raises(RefusalError) as caught:
        site.check_example({**step, "sampling_probability": 0.2})
    assert caught.value.rule == "example.maximum_sampling_rate"


def test_a_promise_that_is_no_event_is_an_error() -> None:
    with pytest.raises(PrivacyError, match="nothing can account for an event named 'trust me'"):
        policy(accept=["central"]).check(asked(promised={"name": "trust me"}, pipeline=CLIPPED))


def test_evaluations_are_refused_where_the_policy_says_so() -> None:
    with pytest.raises(RefusalError) as caught:
        policy(metrics={"evaluate": False}).check_evaluation("r", "s", 1)
    assert caught.value.rule == "metrics.evaluate"
    with pytest.raises(RefusalError) as caught:
        policy(maximum_rounds=1).check_evaluation("r", "s", 2)
    assert caught.value.rule == "maximum_rounds"
