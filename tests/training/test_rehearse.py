"""A rehearsal of a rank agrees with that rank of a real job."""

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.training import rehearsal_ranks as ranks
from training import ds_config, placement, rank_share

pytestmark = pytest.mark.timeout(500)


@functools.cache
def measured(world: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the last of so many real ranks measures, and its rehearsal.

    Of the real ranks, which have equal shares, the least memory: a buffer lives longer while another rank is late.
    """
    found = run_ranks(world, ranks.real, world, timeout=240)
    for case, measured_last in found[-1].items():
        for kind in ("device_bytes", "host_bytes", "step_bytes"):
            measured_last["memory"][kind] = min(rank[case]["memory"][kind] for rank in found)
    return found[-1], run_ranks(1, ranks.alone, world, world - 1, timeout=240)[0]


def without_other(memory: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The states alone: what else stays may differ by a few hundred bytes."""
    return {tier: {kind: kinds[kind] for kind in placement.KINDS} for tier, kinds in memory["held"].items()}


@pytest.mark.parametrize(("world", "case"), [(world, case) for world, cases in ranks.CASES.items() for case in cases])
def test_rehearsal_agrees_with_real_ranks(world: int, case: str) -> None:
    real, alone = (found[case] for found in measured(world))
    assert alone["collectives"] == real["collectives"]
    assert real["collectives"]["all_gather"]["bytes"] and real["collectives"]["reduce_scatter"]["bytes"]
    assert alone["parameters"] == real["parameters"]
    assert without_other(alone["memory"]) == without_other(real["memory"])
    for kind in ("device_bytes", "host_bytes", "step_bytes"):
        assert alone["memory"][kind] == pytest.approx(real["memory"][kind], rel=0.1)


def test_components_are_the_model_s() -> None:
    """Two equal halves, since everything is even."""
    shares = dict(measured(2)[1]["ep 2"]["parameters"])
    counts = ranks.recipe(2, ranks.CASES[2]["ep 2"]).model_shape().parameter_counts()
    assert shares.pop("total") * 2 == counts.total
    assert {name: 2 * share for name, share in shares.items()} == {name: getattr(counts, name) for name in shares}


def test_some_layers_tell_of_all() -> None:
    two, four, five = (measured(2)[1][f"{layers} layers"] for layers in (2, 4, 5))
    told = rank_share.extrapolate(
        *({key: one[key] for key in ("parameters", "memory", "collectives")} for one in (two, four)), (2, 4), 5
    )
    assert told["parameters"] == five["parameters"]
    for kind in ("all_gather", "reduce_scatter", "all_to_all"):
        assert told["collectives"][kind]["bytes"] == five["collectives"][kind]["bytes"]
    assert without_other(told["memory"]) == without_other(five["memory"])
    assert told["memory"]["step_bytes"] == pytest.approx(five["memory"]["step_bytes"], rel=0.1)


def test_what_noise_takes_away_does_not_count() -> None:
    fewer, more = {"step": {"seconds": 3.0, "tokens": 8}}, {"step": {"seconds": 2.0, "tokens": 8}}
    assert rank_share.extrapolate(fewer, more, (1, 2), 4) == more


def test_arithmetic_agrees_with_what_is_held(tmp_path: Path) -> None:
    """The check before anything is built: all states, and no more than is held at the most."""
    for world, cases in ranks.CASES.items():
        for name, case in cases.items():
            config = ds_config.resolve(ranks.recipe(world, case), world, 0, tmp_path)
            share, memory = rank_share.needed(config), measured(world)[1][name]["memory"]
            held = [memory["held"][tier][kind] for tier in ("device", "cpu") for kind in ("parameters", "optimizer")]
            at_most = memory["device_bytes"] + memory["host_bytes"]
            assert sum(held) <= share["device"] + share["cpu"] <= at_most
