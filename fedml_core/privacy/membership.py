"""Membership inference: how often an attacker tells who was trained on, at a fixed rate of false alarms.

Guarantees: rates are counted at thresholds that exactly separate scores, and ties never flatter the attack.
Trust: the attacker knows the model, the task and data like the training data; a stronger one may find more.
Source: Carlini et al. (2022), arXiv:2112.03570.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedml_core.checks import require_number
from fedml_core.errors import PrivacyError

__all__ = ["likelihood_ratios", "logit_confidence", "roc_area", "tpr_at"]

Floats = NDArray[np.float64]


def logit_confidence(losses: ArrayLike) -> Floats:
    """Return log p/(1-p) of the probability p = exp(-loss) of the right label, which is close to Gaussian over models.

    Args: losses: cross-entropies, of any shape.
    """
    loss = np.clip(np.asarray(losses, dtype=np.float64), 1e-12, 60.0)
    return np.asarray(-loss - np.log(-np.expm1(-loss)))


def likelihood_ratios(target: ArrayLike, shadows: ArrayLike, trained_on: ArrayLike) -> Floats:
    """Return, for each example, how much better the target's confidence fits models that trained on it: (n,).

    Each example has a mean of its own, with and without; the spread is common to all, since few shadows tell no more.
    Guarantees: the score is the log-likelihood ratio of two Gaussians that the shadow models fit.
    Args: target: (n,) confidences of the audited model. shadows: (S, n), those of S shadow models. trained_on: (S, n),
        whether each trained on each.
    Raises: PrivacyError: if an example lacks a shadow model on either side, or shapes do not fit.
    """
    mine, theirs = np.asarray(target, dtype=np.float64), np.asarray(shadows, dtype=np.float64)
    mask = np.asarray(trained_on, dtype=bool)
    if mine.ndim != 1 or theirs.shape != mask.shape or theirs.shape[1:] != mine.shape:
        raise PrivacyError(f"confidences {mine.shape}, {theirs.shape} and {mask.shape} must be (n,), (S, n) and (S, n)")
    if bool((mask.all(axis=0) | (~mask).all(axis=0)).any()):
        raise PrivacyError("every example needs a shadow model that trained on it and one that did not; train more")
    inside, outside = _fitted(theirs, mask), _fitted(theirs, ~mask)
    return np.asarray(_log_density(mine, *inside) - _log_density(mine, *outside))


def tpr_at(members: ArrayLike, others: ArrayLike, false_positive_rate: float) -> float:
    """Return the share of members above the lowest threshold with at most this share of false alarms.

    Raises: ConfigError: for a rate outside (0, 1). PrivacyError: if either side is empty.
    Example:
        >>> tpr_at([3.0, 1.0], [2.0, 0.0], 0.4)
        0.5
    """
    require_number("false_positive_rate", false_positive_rate, above=0, below=1)
    hits, alarms = _both(members, others)
    allowed = int(false_positive_rate * len(alarms) + 1e-9)
    threshold = np.sort(alarms)[::-1][allowed]
    return float((hits > threshold).mean())


def roc_area(members: ArrayLike, others: ArrayLike) -> float:
    """Return the probability that a member scores above another; 0.5 is chance, and a tie counts half.

    Raises: PrivacyError: if either side is empty.
    """
    hits, alarms = _both(members, others)
    ordered = np.sort(alarms)
    below, upto = np.searchsorted(ordered, hits, "left"), np.searchsorted(ordered, hits, "right")
    return float((below + upto).mean() / (2 * len(alarms)))


def _fitted(scores: Floats, mask: NDArray[np.bool_]) -> tuple[Floats, float]:
    means = np.where(mask, scores, 0.0).sum(axis=0) / mask.sum(axis=0)
    left = (scores - means)[mask]
    freedom = max(1, mask.sum() - mask.shape[1])
    return means, max(float(np.sqrt((left**2).sum() / freedom)), 1e-6)


def _log_density(at: Floats, means: Floats, spread: float) -> Floats:
    return np.asarray(-0.5 * ((at - means) / spread) ** 2 - np.log(spread))


def _both(members: ArrayLike, others: ArrayLike) -> tuple[Floats, Floats]:
    hits, alarms = np.asarray(members, dtype=np.float64).ravel(), np.asarray(others, dtype=np.float64).ravel()
    if not len(hits) or not len(alarms):
        raise PrivacyError(f"scores of members and of others are needed, got {len(hits)} and {len(alarms)}")
    return hits, alarms
