"""Metrics, against their definitions."""

import numpy as np
import pytest

from feddistill.metrics import classification


@pytest.fixture
def answers():
    random = np.random.default_rng(0)
    logits = random.normal(size=(500, 4))
    labels = random.integers(0, 3, 500)  # the fourth class never occurs
    logits[np.arange(500), labels] += 1.0
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32), labels


def test_figures_are_the_textbooks(answers):
    log_probs, labels = answers
    guess = log_probs.argmax(1)
    found = classification(log_probs, labels)
    assert found.accuracy == pytest.approx((guess == labels).mean())
    f1 = []
    for c in range(3):
        right = ((guess == c) & (labels == c)).sum()
        f1.append(2 * right / ((guess == c).sum() + (labels == c).sum()))
    assert found.macro_f1 == pytest.approx(np.mean(f1))
    assert found.cross_entropy == pytest.approx(-log_probs[np.arange(500), labels].mean(), rel=1e-5)


def test_calibration_error_is_the_gap_in_each_bin(answers):
    log_probs, labels = answers
    confidence, right = np.exp(log_probs.max(1)), log_probs.argmax(1) == labels
    gap = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            gap += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert classification(log_probs, labels).ece == pytest.approx(gap, abs=1e-4)


def test_certainty_is_in_the_last_bin():
    sure = np.log(np.array([[1.0, 1e-30], [1.0, 1e-30]], dtype=np.float32))
    assert classification(sure, np.array([0, 1])).ece == pytest.approx(0.5)


def test_chance_has_no_correlation():
    constant = np.log(np.full((100, 2), 0.5, dtype=np.float32))
    assert classification(constant, np.arange(100) % 2).mcc == 0.0
