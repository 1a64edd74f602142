from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.recipe import Optimizer, Recipe, Schedule
from training.schedule import learning_rate

LAW = settings(deadline=None, derandomize=True)


def recipe(steps, warmup, decay="cosine", final=0.1, lr=1e-3):
    return Recipe(
        model={"preset": "m6-tiny"},
        steps=steps,
        global_batch=8,
        tasks={"caption": 1},
        optimizer=Optimizer(lr=lr),
        schedule=Schedule(warmup=warmup, decay=decay, final=final),
    )


schedules = st.builds(
    lambda warmup, rest, decay, final, lr: recipe(warmup + rest, warmup, decay, final, lr),
    st.integers(0, 50),
    st.integers(2, 200),
    st.sampled_from(["cosine", "linear", "constant"]),
    st.floats(0, 1),
    st.floats(1e-8, 1),
)


@LAW
@given(schedules)
def test_rises_to_the_peak_and_falls_to_the_final_value(recipe):
    rates = [learning_rate(recipe, step) for step in range(recipe.steps)]
    peak, warmup = recipe.optimizer.lr, recipe.schedule.warmup
    final = peak if recipe.schedule.decay == "constant" else peak * recipe.schedule.final
    assert rates[max(warmup - 1, 0)] == pytest.approx(peak) and max(rates) == pytest.approx(peak)
    assert rates[-1] == pytest.approx(final, abs=1e-12 * peak) and min(rates) >= 0
    assert all(low < high for low, high in pairwise(rates[:warmup]))
    assert all(low <= high * (1 + 1e-12) for high, low in pairwise(rates[warmup:]))


@LAW
@given(schedules)
def test_no_jumps(recipe):
    peak, warmup = recipe.optimizer.lr, recipe.schedule.warmup
    rates = [learning_rate(recipe, step) for step in range(recipe.steps)]
    falls = max(recipe.steps - 1 - warmup, 1)
    for step, (before, after) in enumerate(pairwise(rates)):
        # A half cosine is at its steepest pi / 2 times as steep as the line.
        bound = peak / warmup if step < warmup - 1 else 1.58 * peak / falls
        assert abs(after - before) <= bound * (1 + 1e-9)


def test_warm_up_starts_above_zero():
    assert learning_rate(recipe(100, 10), 0) == pytest.approx(1e-4)


def test_a_longer_run_stays_at_the_final_value():
    assert learning_rate(recipe(100, 10), 150) == pytest.approx(1e-4)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (5, 100)])
def test_short_runs_have_rates_too(steps, warmup):
    assert all(0 < learning_rate(recipe(steps, warmup), step) <= 1e-3 for step in range(steps))
