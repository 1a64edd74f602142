"""What is told of a cluster's machines, from what was measured of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import launching
from benchmarks.machines import machines
from launch.cluster_doctor import alike, enough, even
from launch.measure import partner
from launch.planner.cluster import load_cluster
from tests.marks import MACHINES


def cluster(count: int = 4) -> dict[str, dict[str, Any]]:
    """Machines that are all well."""
    return {
        f"node{number}": {
            "versions": {"python": "3.12.1", "torch": "2.11.0", "code": "abc"}, "cores": 96,
            "devices": ["H100"] * 8, "memory_bytes": 2_000_000_000_000, "lockable_bytes": None,
            "shared_bytes": 10**11, "disk_bytes": 10**13, "disk_write": 2e10, "disk_read": 4e10, "memory_rate": 2.6e12,
            "thread_rate": 2.6e12,
            "products": 7e14, "clock": 0.002 * number, "link": 4e10, "all_to_all": 3e10,
        }
        for number in range(count)
    }  # fmt: skip


def test_of_machines_that_are_well_nothing_is_told() -> None:
    found = cluster()
    assert [*alike(found), *even(found), *enough(found, load_cluster("h100-80g-x512"))] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {"python": "3.12.1", "torch": "2.10.0", "code": "abc"}}, "torch 2.10.0, most have 2.11.0"),
        ({"versions": {"python": "3.12.1", "torch": "2.11.0", "code": "abd"}}, "code abd, most have abc"),
        ({"devices": ["H100"] * 7}, "GPUs H100, H100"),
        ({"memory_bytes": 10**12}, "memory 1.0 TB, the middle one has 2.0 TB"),
        ({"clock": -3.0}, "its clock is -3.0 s off the others'"),
        ({"shared_bytes": 64 * 10**6}, "64.0 MB of shared memory"),
        ({"lockable_bytes": 64 * 2**10}, "may lock 65.5 kB of memory"),
    ],
)
def test_the_machine_that_differs_is_named(change: dict[str, Any], words: str) -> None:
    found = cluster()
    found["node2"] |= change
    [told] = alike(found)
    assert told.startswith("node2: ") and words in told


def test_of_two_that_differ_both_are_told() -> None:
    found = cluster(2)
    found["node1"] |= {"versions": {"python": "3.11.2", "torch": "2.11.0", "code": "abc"}}
    assert list(alike(found)) == ["node1: python 3.11.2, node0 has 3.12.1"]


@pytest.mark.parametrize("key", ["disk_write", "disk_read", "memory_rate", "products", "link", "all_to_all"])
def test_the_slow_machine_is_named(key: str) -> None:
    found = cluster()
    found["node3"][key] /= 10
    [told] = even(found)
    assert told.startswith("node3: ") and "10% of the middle one's" in told


def test_what_the_plan_needs_and_no_machine_has() -> None:
    found = cluster(2)
    for machine in found.values():
        machine["disk_read"] = 1e9
    told = list(enough(found, load_cluster("h100-80g-x512")))
    assert [line.split(":")[0] for line in told] == ["node0", "node1"]
    assert all("disk read 1.0 GB/s, the plan needs " in line for line in told)


@given(count=st.integers(2, 40))
def test_all_machines_meet_each_other_once(count: int) -> None:
    rounds = count - 1 + count % 2
    met = [{here: partner(here, count, meeting) for here in range(count)} for meeting in range(rounds)]
    for pairs in met:
        assert all(other is None or pairs[other] == here for here, other in pairs.items())
    for here in range(count):
        others = [pairs[here] for pairs in met if pairs[here] is not None]
        assert sorted(others) == [other for other in range(count) if other != here]


@MACHINES
def test_the_machine_with_a_slow_link_is_named(tmp_path: Path) -> None:
    """Two others have links of their machine's memory, a hundred times as fast."""
    (tmp_path / "keys").mkdir()
    with machines(3, tmp_path / "keys") as three:
        three.slow_down(2, "500mbit")
        hosts = launching.hostfile(three.addresses, tmp_path)
        command = [sys.executable, "-P", "-c", "from launch.cli import main; main()", "doctor", "--hostfile", hosts]
        told = subprocess.run(
            [*three.inside(0), *command, "--json"], cwd=tmp_path, env=os.environ | three.environment,
            stdout=subprocess.PIPE, text=True, timeout=200,
        )  # fmt: skip
    found = json.loads(told.stdout)
    assert told.returncode == 1 and not found["ok"] and list(found["machines"]) == three.addresses
    slow = [line for line in found["findings"] if ": link " in line]
    assert len(slow) == 1 and slow[0].startswith(f"{three.addresses[2]}: link ")
