"""Membership inference: rates by hand, and an attack that finds what was planted."""

from __future__ import annotations

import numpy as np
import pytest

from fedml_core.errors import PrivacyError
from fedml_core.privacy.auditing import gaussian_tpr
from fedml_core.privacy.membership import likelihood_ratios, logit_confidence, roc_area, tpr_at
from fedml_core.randomness import seeded


def test_rates_are_counted_and_ties_never_flatter() -> None:
    # "rates are counted at thresholds that exactly separate scores, and ties never flatter the attack."
    members, others = [5.0, 4.0, 3.0, 2.0], [4.0, 1.0, 1.0, 0.0]
    assert tpr_at(members, others, 0.25) == 1.0
    assert tpr_at(members, others, 0.24) == 0.25
    assert tpr_at([1.0] * 4, [1.0] * 4, 0.5) == 0.0
    assert roc_area(members, others) == pytest.approx((4 + 3.5 + 3 + 3) / 16)
    assert roc_area([1.0] * 4, [1.0] * 4) == 0.5


def test_a_perfect_gaussian_attack_reaches_its_ceiling() -> None:
    # The scores are those of a release that is 1-GDP; 200,000 of each leave 1 % of error.
    members, others = seeded("in").standard_normal(200_000) + 1.0, seeded("out").standard_normal(200_000)
    for rate in (0.1, 0.01):
        assert tpr_at(members, others, rate) == pytest.approx(gaussian_tpr(rate, 1.0), rel=0.03)


def test_shadow_models_tell_members_of_a_model_that_remembers() -> None:
    # "the score is the log-likelihood ratio of two Gaussians that the shadow models fit."
    # "the attacker knows the model, the task and data like the training data; a stronger one may find more."
    count, shadows = 2000, 16
    hardness = seeded("hardness").standard_normal(count) * 3
    mask = seeded("halves").random((shadows, count)).argsort(axis=0) < shadows // 2
    member = np.arange(count) < count // 2
    shadow = hardness + 2.0 * mask + seeded("shadow").standard_normal((shadows, count))
    target = hardness + 2.0 * member + seeded("target").standard_normal(count)
    scores = likelihood_ratios(target, shadow, mask)
    assert roc_area(scores[member], scores[~member]) > 0.85
    # Without shadow models an example's hardness hides whether it was a member.
    assert roc_area(target[member], target[~member]) < 0.75
    honest = likelihood_ratios(hardness + seeded("target").standard_normal(count), shadow, mask)
    assert abs(roc_area(honest[member], honest[~member]) - 0.5) < 0.05


def test_confidence_is_the_logit_of_the_right_labels_probability() -> None:
    probability = np.array([0.9, 0.5, 0.01])
    assert logit_confidence(-np.log(probability)) == pytest.approx(np.log(probability / (1 - probability)))
    assert np.isfinite(logit_confidence([0.0, 1e9])).all()


def test_shadows_that_cannot_tell_are_refused() -> None:
    with pytest.raises(PrivacyError, match="every example needs a shadow model"):
        likelihood_ratios(np.zeros(2), np.zeros((2, 2)), [[True, True], [False, True]])
    with pytest.raises(PrivacyError, match="must be"):
        likelihood_ratios(np.zeros(3), np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(PrivacyError, match="got 0 and 1"):
        roc_area([], [1.0])
