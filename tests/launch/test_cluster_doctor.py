"""What is told of a cluster's machines, from what was measured of them."""

from typing import Any

import pytest

from launch.cluster_doctor import alike, enough, even
from launch.planner.cluster import load_cluster


def cluster(count: int = 4) -> dict[str, dict[str, Any]]:
    """Machines that are all well."""
    return {
        f"node{number}": {
            "versions": {"python": "3.12.1", "torch": "2.11.0", "code": "abc"}, "cores": 96,
            "devices": ["H100"] * 8, "memory_bytes": 2_000_000_000_000, "lockable_bytes": None,
            "shared_bytes": 10**11, "disk_bytes": 10**13, "disk_write": 2e10, "disk_read": 4e10, "memory_rate": 2.6e12,
            "matmul_flops": 7e14, "clock": 0.002 * number, "link": 4e10, "all_to_all": 3e10,
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


@pytest.mark.parametrize("key", ["disk_write", "disk_read", "memory_rate", "matmul_flops", "link", "all_to_all"])
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
