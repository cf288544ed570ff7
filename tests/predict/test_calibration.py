"""Calibration and abstention against distributions that are known."""

import numpy as np
import pytest
import torch
from scipy.stats import binom

from mmft_hf.predict.calibration import (
    area_under_risk,
    binomial_tail,
    calibration,
    calibration_error,
    fit_temperature,
    risk_coverage,
    threshold_for,
)


def answers(n, classes=10, seed=0):
    """Logits, and labels that are drawn from their probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return logits, labels


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_a_factor(factor):
    logits, labels = answers(2000)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.06)


def test_the_temperature_stays_in_its_bounds():
    labels = torch.arange(20) % 2
    separable = 10.0 * torch.eye(2, dtype=torch.float64)[labels]
    assert 0.05 <= fit_temperature(separable, labels) < 1
    assert 1 < fit_temperature(1e6 * separable.flip(1), labels) <= 20
    one = fit_temperature(separable[:1], labels[:1])
    assert one > fit_temperature(separable, labels)  # the fewer examples, the nearer to 1


def test_a_calibrated_classifier_has_its_null_level():
    errors, nulls = [], []
    for seed in range(40):
        logits, labels = answers(300, seed=seed)
        found = calibration(logits.softmax(dim=1).numpy(), labels.numpy(), seed)
        errors.append(found.error)
        nulls.append(found.null_error)
    assert np.mean(errors) == pytest.approx(np.mean(nulls), abs=0.01)
    sharp = calibration((3 * logits).softmax(dim=1).numpy(), labels.numpy())
    assert sharp.error > 2 * sharp.null_error and sharp.loss > found.loss and sharp.brier > found.brier


def test_the_measures_by_hand():
    scores = np.array([[0.8, 0.2], [0.6, 0.4]])
    found = calibration(scores, np.array([0, 1]))
    assert found.loss == pytest.approx(-np.log([0.8, 0.4]).mean())
    assert found.brier == pytest.approx(np.mean([0.04 + 0.04, 0.36 + 0.36]))
    assert found.error == pytest.approx((abs(1 - 0.8) + abs(0 - 0.6)) / 2)
    assert calibration_error(np.full(30, 0.5), np.arange(30) % 2 == 0) == pytest.approx(0.0)
    risks = risk_coverage(np.array([0.9, 0.5, 0.7]), np.array([True, False, True]))
    assert risks.tolist() == pytest.approx([0, 0, 1 / 3])
    assert area_under_risk(np.array([0.9, 0.5, 0.7]), np.array([True, False, True])) == pytest.approx((1 / 9, 0))
    assert area_under_risk(np.array([0.9, 0.95, 0.7]), np.array([True, False, True]))[1] > 0


@pytest.mark.parametrize(("trials", "hits", "share"), [(10, 9, 0.7), (200, 150, 0.8), (5, 0, 0.3), (50, 50, 0.95)])
def test_the_binomial_tail_is_scipys(trials, hits, share):
    assert binomial_tail(trials, hits, share) == pytest.approx(binom.sf(hits - 1, trials, share))


def test_accepted_answers_keep_the_accuracy_in_95_of_100_cases():
    rng, failed, found = np.random.default_rng(0), 0, 0
    for _ in range(200):
        confidence = rng.random(400)
        right = rng.random(400) < 0.5 + 0.5 * confidence  # P(right | p) = 0.5 + p / 2
        threshold = threshold_for(confidence, right, 0.85)
        if threshold is not None:
            found += 1
            true_accuracy = 0.5 + (1 + threshold) / 4
            failed += true_accuracy < 0.85
    assert found > 150 and failed <= 0.075 * 200


def test_no_threshold_where_none_can_be_shown():
    rng = np.random.default_rng(0)
    assert threshold_for(rng.random(400), rng.random(400) < 0.5, 0.9) is None
    assert threshold_for(rng.random(10), np.ones(10, dtype=bool), 0.95) is None  # ten right answers prove little
    assert threshold_for(np.linspace(0.5, 1, 400), np.ones(400, dtype=bool), 0.95) == pytest.approx(0.5)
