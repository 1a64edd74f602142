"""Energy: counters that wrap and are reset, rates over whole windows, and no figure where nothing measures."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks import run_ranks
from training.energy import MODELLED, UNAVAILABLE, WINDOW_SECONDS, Counter, EnergyMeter, EnergyRates


def make_zone(powercap: Path, zone: str, name: str, microjoules: int) -> Path:
    folder = powercap / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(name + "\n")
    (folder / "max_energy_range_uj").write_text("1000000000\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_rapl_counts_each_domain_once_and_through_a_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    package = make_zone(tmp_path, "intel-rapl:0", "package-0", 900_000_000)
    memory = make_zone(tmp_path, "intel-rapl:0:1", "dram", 0)
    core = make_zone(tmp_path, "intel-rapl:0:0", "core", 0)
    platform = make_zone(tmp_path, "intel-rapl:1", "psys", 0)
    twin = make_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    meter = EnergyMeter(tmp_path)
    assert meter.source == "measured (rapl)" and meter.joules() == 0
    for counter in (core, platform, twin):
        counter.write_text("500000000\n")
    memory.write_text("2000000\n")
    package.write_text("50000000\n")  # 900 J -> wrap at 1,000 J -> 50 J
    assert meter.joules() == pytest.approx(2 + 150)
    memory.write_text("3000000\n")
    assert meter.joules() == pytest.approx(3 + 150)
    package.unlink()
    assert meter.joules() is None and meter.source == "unavailable"


def test_a_counter_that_is_reset_counts_from_zero() -> None:
    readings = iter([500.0, 510.0, 4.0])
    counter = Counter(lambda: next(readings))
    assert counter.joules() == 10
    assert counter.joules() == 14


def test_no_counter_is_no_energy_rather_than_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    meter = EnergyMeter(tmp_path)
    assert meter.source == "unavailable" and meter.joules() is None


STEPS = st.lists(st.tuples(st.floats(0, 1e6), st.floats(0.01, 30), st.integers(1, 10**6)), min_size=1, max_size=60)


@given(STEPS)
def test_rates_are_of_whole_windows_and_fit_one_another(steps: list[tuple[float, float, int]]) -> None:
    rates, window = EnergyRates(), []
    for step in steps:
        found = rates.step(*step)
        window.append(step)
        joules, seconds, tokens = map(sum, zip(*window, strict=True))
        if seconds >= WINDOW_SECONDS:
            assert found["energy/watts"] == pytest.approx(joules / seconds)
            assert found["energy/joules_per_step"] == pytest.approx(joules / len(window))
            assert found["energy/joules_per_token"] == pytest.approx(joules / tokens)
            window = []


def test_before_the_first_window_and_across_a_gap_nothing_is_told() -> None:
    rates = EnergyRates()
    assert set(rates.step(900.0, 9.0, 10).values()) == {None}
    assert rates.step(100.0, 1.0, 10)["energy/watts"] == 100
    assert rates.step(500.0, 5.0, 10)["energy/watts"] == 100  # of the last whole window
    assert set(rates.step(None, 5.0, 10).values()) == {None}
    assert rates.step(100.0, 6.0, 10)["energy/watts"] == 100  # what came before the gap counts no more
    assert rates.step(100.0, 4.0, 10)["energy/watts"] == 20


def metered(readings: list[float | None], watts: float | None, counters: dict | None) -> list[tuple]:
    """On a rank: joules, source and watts of a record a reading, after a first one, of steps of ten seconds."""
    from training.meter import Meter
    from training.start import init_distributed

    init_distributed()
    meter = Meter(SimpleNamespace(device="cpu"), [], 1.0, counters, watts)
    told: Iterator[float | None] = iter(readings)
    meter.energy = SimpleNamespace(joules=lambda: next(told), source="measured (rapl)")
    meter.restart_clock()
    records = [meter._energy(seconds=10.0, tokens=5) for _ in readings[1:]]
    return [(one["energy/joules"], one["energy/source"], one["energy/watts"]) for one in records]


def test_a_counter_that_fails_midway_is_followed_by_the_plan_without_a_jump() -> None:
    [found] = run_ranks(1, metered, [0.0, 1000.0, 5000.0, None, None], 100.0, {"tokens": 0, "joules": 70.0})
    joules, sources, watts = zip(*found, strict=True)
    assert joules[:2] == (1070.0, 5070.0) and 5070 <= joules[2] <= joules[3] < 5170
    assert sources == ("measured (rapl)",) * 2 + (MODELLED,) * 2
    assert watts[:2] == (100.0, 400.0) and min(watts) >= 0


def test_without_counter_and_plan_nothing_is_told_whatever_was_before() -> None:
    [found] = run_ranks(1, metered, [None, None], None, {"tokens": 9, "joules": 70.0, "modelled": True})
    assert found == [(None, UNAVAILABLE, None)]
