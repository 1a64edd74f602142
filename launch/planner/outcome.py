"""What a training takes as a whole: days, energy, CO2e, cost, checkpoints, and time lost to failures."""

from __future__ import annotations

from launch.planner.cluster import Cluster
from launch.planner.hardware import MULTIPLYING, WAITING, Hardware
from launch.planner.job import Shares
from launch.planner.terms import Term, Terms

CHECKPOINT_BYTES = 12  # of a parameter: fp32 master and two moments
HOUR, DAY = 3600, 86400


def add_power(terms: Terms, machine: Hardware, busy: Term | float, seconds: Term | float) -> Term:
    """Terms `power.*`, of a node in watts, with its devices multiplying for `busy` of `seconds`."""
    devices = terms.add(
        "power.devices", "devices * watts * (waiting + (multiplying - waiting) * min(1, busy / seconds))", "W a node",
        "shares of the rated power are assumed", devices=machine.devices_per_node, watts=machine.device_watts,
        waiting=WAITING, multiplying=MULTIPLYING, busy=busy, seconds=seconds,
    )  # fmt: skip
    host = terms.add(
        "power.host", "max(0, node - devices * watts * multiplying)", "W a node",
        "the rest of what was measured of a node while it trained", node=machine.node_watts,
        devices=machine.devices_per_node, watts=machine.device_watts, multiplying=MULTIPLYING,
    )  # fmt: skip
    return terms.total("power.node", "W a node", [devices, host])


def add_outcome(terms: Terms, machine: Hardware, cluster: Cluster, tokens: float, step_tokens: float) -> None:
    """Terms of the whole training: `days`, `energy.*`, `co2e_kg`, `cost`. `step.seconds` must be there."""
    seconds = terms["step.seconds"]
    terms.add("tokens_per_second", "tokens / seconds", "tokens/s", tokens=step_tokens, seconds=seconds)
    hours = terms.add(
        "hours", "tokens / tokens_per_second / 3600", "h", "without time lost to failures", tokens=tokens,
        tokens_per_second=terms["tokens_per_second"],
    )  # fmt: skip
    terms.add("days", "hours / 24", "days", hours=hours)
    terms.add(
        "step.computing", "micro_batches * work", "s", "in which devices draw full power",
        micro_batches=terms["step.busy"].inputs["micro_batches"], work=terms["step.device_work"],
    )  # fmt: skip
    add_power(terms, machine, terms["step.computing"], seconds)
    parts = [
        terms.add(f"energy.{name}", "nodes * watts * hours / 1000", "kWh", nodes=machine.nodes, watts=watts,
                  hours=hours)
        for name, watts in (
            ("compute", terms["power.devices"]), ("host", terms["power.host"]), ("switches", machine.switch_watts)
        )
    ]  # fmt: skip
    overhead = terms.add(
        "energy.overhead", "(pue - 1) * (compute + host + switches)", "kWh", "cooling and supply", pue=cluster.pue,
        compute=parts[0], host=parts[1], switches=parts[2],
    )  # fmt: skip
    kwh = terms.total("energy.kwh", "kWh", [*parts, overhead])
    terms.add("energy.joules_per_token", "kwh * 3.6e6 / tokens", "J/token", kwh=kwh, tokens=tokens)
    terms.add(
        "co2e_kg", "kwh * grams / 1000", "kg", "location-based", kwh=kwh, grams=cluster.grid_g_co2e_per_kwh,
    )  # fmt: skip
    terms.add(
        "cost", "devices * hours * price", cluster.price.currency, f"prices of {cluster.price.date}",
        devices=machine.devices, hours=hours, price=cluster.price.per_device_hour,
    )  # fmt: skip


def add_checkpoint(
    terms: Terms, machine: Hardware, cluster: Cluster, parameters: float, every: int, states: Shares
) -> None:
    """Terms `checkpoint.*`, and `effective.*`: the share of time that trains, at the stated failure rate and others.

    `states`: of the optimizer, which are what is saved.
    """
    size = terms.add(
        "checkpoint.bytes", "each * parameters", "B", "fp32 master and two moments", each=CHECKPOINT_BYTES,
        parameters=parameters,
    )  # fmt: skip
    terms.add(
        "checkpoint.save_seconds", "bytes / nodes / (disk * share)", "s",
        "each node writes its share to its own disks, in the background", bytes=size, nodes=machine.nodes,
        disk=machine.disk_write, share=machine.host_share,
    )  # fmt: skip
    stall = terms.add(
        "checkpoint.stall_seconds",
        "bytes / nodes / share * (on_device / (each * link) + 2 * in_memory / memory + on_disk / read)", "s",
        "training stops while states are copied: over the links, from memory to memory, or read",
        bytes=size, nodes=machine.nodes, on_device=states.device, each=machine.devices_per_node,
        link=machine.busy_host_link, in_memory=states.cpu, memory=machine.host_bandwidth, on_disk=states.nvme,
        read=machine.disk_read, share=machine.host_share,
    )  # fmt: skip
    # A save that takes longer than the steps between saves delays the next one.
    between = terms.add(
        "checkpoint.interval_seconds", "max(every * seconds, save)", "s", every=every, seconds=terms["step.seconds"],
        save=terms["checkpoint.save_seconds"],
    )  # fmt: skip
    for name, factor in (("at_stated_rate", 1.0), ("at_half_the_rate", 0.5), ("at_ten_times_the_rate", 10.0)):
        failures = cluster.failures.per_device_day * factor
        terms.add(
            f"effective.{name}",
            "1 / ((1 + stall / interval) * (1 + failures * devices / 86400 * (restart + interval / 2 + save / 2)))",
            "share of time",
            "Young 1974: what is lost is half an interval and a restart; the newest save may be unfinished",
            stall=stall, interval=between, failures=failures, devices=machine.devices,
            restart=cluster.failures.restart_seconds, save=terms["checkpoint.save_seconds"],
        )  # fmt: skip
