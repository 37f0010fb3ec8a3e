"""What is said about a run, when, and what not."""

from __future__ import annotations

import json
import random

from graftwerk.training.callbacks.health_checks import HealthChecks
from graftwerk.training.events import Event

PRIOR = 0.69


def watcher(rate: float = 1e-3, total: int = 300, prior: float | None = PRIOR) -> HealthChecks:
    return HealthChecks(
        total_steps=total,
        warmup_steps=18,
        learning_rate=rate,
        default_learning_rate=1e-3,
        method="lora",
        prior_loss=prior,
    )


def said(diagnosis: HealthChecks, losses: list[float]) -> list[Event]:
    return [event for step, loss in enumerate(losses, start=1) for event in diagnosis.after_step(step, loss)]


def noisy(levels: list[float], seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [level + draw.gauss(0, 0.05) for level in levels]


def test_no_learning_low_rate_is_reported_early() -> None:
    events = said(watcher(2e-5), noisy([0.695] * 300))
    assert [event.values["code"] for event in events] == ["no_learning"]
    (event,) = events
    assert event.step < 150, "said when it is too late"
    assert "learning_rate=auto" in event.values["hint"]
    assert "50 times lower" in event.values["hint"]


def test_no_learning_loss_at_prior_is_reported() -> None:
    falling = [max(0.69, 1.2 - 0.02 * step) for step in range(300)]
    assert [event.values["code"] for event in said(watcher(2e-5), noisy(falling))] == ["no_learning"]


def test_no_learning_falling_loss_is_silent() -> None:
    for seed in range(20):
        levels = [0.3 + 0.4 * 0.99**step for step in range(300)]
        assert said(watcher(), noisy(levels, seed)) == []


def test_no_learning_slow_start_is_silent_at_usual_rate() -> None:
    """At a rate that is usual for the method, longer than at one that explains why nothing is learnt."""
    levels = [0.69] * 130 + [max(0.3, 0.69 - 0.01 * step) for step in range(170)]
    assert said(watcher(), noisy(levels)) == []
    assert [event.values["code"] for event in said(watcher(2e-5), noisy(levels))] == ["no_learning"]


def test_no_learning_usual_rate_is_reported() -> None:
    (event,) = said(watcher(), noisy([0.695] * 300))
    assert event.values["code"] == "no_learning"
    assert "learning_rate=0.005" in event.values["hint"]


def test_no_learning_short_run_is_silent() -> None:
    assert said(watcher(2e-5, total=40), noisy([0.695] * 40)) == []


def test_no_learning_without_prior_compares_with_start() -> None:
    assert [event.values["code"] for event in said(watcher(2e-5, prior=None), noisy([3.2] * 300))] == ["no_learning"]
    assert said(watcher(prior=None), noisy([3.2 * 0.995**step for step in range(300)])) == []


def test_divergence_is_reported_with_lower_rate() -> None:
    events = said(watcher(0.5), noisy([0.7] * 20 + [0.7 + 0.1 * step for step in range(60)]))
    assert [event.values["code"] for event in events] == ["divergence"]
    assert "learning_rate=0.001" in events[0].values["hint"]


def test_health_checks_ignore_non_finite_losses() -> None:
    levels = noisy([0.3 + 0.4 * 0.99**step for step in range(300)])
    assert said(watcher(), [float("nan") if step % 50 == 3 else loss for step, loss in enumerate(levels)]) == []


def evaluated(train: list[float], validation: list[float]) -> list[Event]:
    diagnosis, events = watcher(), []
    for number, (loss, held_out) in enumerate(zip(train, validation, strict=True)):
        for step in range(10):
            diagnosis.after_step(10 * number + step + 1, loss)
        events += diagnosis.after_evaluation(10 * number + 10, held_out)
    return events


def test_overfitting_is_reported() -> None:
    events = evaluated([0.6, 0.4, 0.2, 0.1], [0.55, 0.6, 0.7, 0.9])
    assert [(event.values["code"], event.step) for event in events] == [("overfitting", 30)]


def test_overfitting_noise_or_rise_of_both_is_silent() -> None:
    assert evaluated([0.6, 0.4, 0.2, 0.1], [0.55, 0.6, 0.58, 0.62]) == []
    assert evaluated([0.4, 0.5, 0.6, 0.7], [0.55, 0.6, 0.7, 0.9]) == []
    assert evaluated([0.6, 0.4, 0.2], [0.55, 0.5, 0.48]) == []


def test_health_checks_resumed_report_the_same() -> None:
    losses = noisy([0.695] * 300)
    whole = said(watcher(2e-5), losses)
    first, second = watcher(2e-5), watcher(2e-5)
    events = said(first, losses[:70])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    events += [event for step, loss in enumerate(losses[70:], start=71) for event in second.after_step(step, loss)]
    assert events == whole
    third = watcher(2e-5)
    third.load_state_dict(json.loads(json.dumps(second.state_dict())))
    assert said(third, losses) == [], "said twice"


def test_no_learning_fall_below_one_and_a_half_percent_is_reported() -> None:
    for level, codes in ((0.684, ["no_learning"]), (0.675, [])):  # of a known 0.69
        events = said(watcher(), [0.7] * 20 + [level] * 280)
        assert [event.values["code"] for event in events] == codes
