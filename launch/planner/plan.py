"""A plan: does a training fit a cluster, and what does it take. All of it is arithmetic on terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.planner.hardware import Hardware
from launch.planner.memory import CONTEXT_BYTES, HOST_PROCESS_BYTES, add_device, add_placed
from launch.planner.outcome import CHECKPOINT_BYTES, add_checkpoint, add_outcome
from launch.planner.step import add_step
from launch.planner.terms import Terms
from launch.planner.workload import Work

# How far an estimate may be off: about the largest errors of `m6 plan --validate` by kind of job (docs/planner.md).
TIME, TIME_OF_EXPERTS, TIME_OF_OFFLOAD, MEMORY, POWER = 0.15, 0.30, 0.30, 0.10, 0.10


@dataclass(frozen=True)
class Plan:
    work: Work
    terms: Terms
    limits: list[str]  # what is short, and by how much
    remarks: list[str]

    @property
    def fits(self) -> bool:
        return not self.limits

    def band(self, key: str) -> float:
        """The share by which a term may be off: a plan is an interval."""
        if key.startswith("memory."):
            return MEMORY
        if key.startswith(("parameters", "checkpoint.bytes", "tokens")) and key != "tokens_per_second":
            return 0.0
        layout, shape = self.work.job.layout, self.work.job.shape
        offload = layout.optimizer.device < 1 or layout.parameters.device < 1
        time = max(TIME, TIME_OF_OFFLOAD if offload else 0, TIME_OF_EXPERTS if shape.experts else 0)
        return time + (POWER if key.startswith(("energy.", "co2e")) else 0)

    def estimate(self, key: str) -> dict[str, float]:
        value, band = self.terms[key].value, self.band(key)
        return {"value": value, "low": value / (1 + band), "high": value * (1 + band)}


def make_plan(work: Work) -> Plan:
    """Every term of a plan, in the order in which one follows from another."""
    job, machine, terms = work.job, work.cluster.hardware, Terms()
    counts = work.config.model.parameter_counts()
    terms.add("parameters.total", "total", "parameters", "model/config.py", total=counts.total)
    terms.add("parameters.active", "active", "parameters", "model/config.py", active=counts.active)
    placed = work.config.placement.bytes(work.config.elements, work.config.sizes)
    saved = CHECKPOINT_BYTES * counts.total / machine.devices
    process = 0 if machine.is_cpu else HOST_PROCESS_BYTES
    states = add_placed(terms, placed, machine.devices_per_node, min(work.recipe.save_buffer, saved), process)
    add_device(terms, job, states, machine.process_bytes or CONTEXT_BYTES)
    add_step(terms, work.usual, machine)
    terms.add(
        "flops_utilization", "flops / (seconds * devices * peak)", "share of peak", flops=terms["flops.model"],
        seconds=terms["step.seconds"], devices=machine.devices, peak=machine.peak(job.layout.precision),
    )  # fmt: skip
    add_outcome(terms, machine, work.cluster, work.tokens, work.usual.tokens)
    add_checkpoint(terms, machine, work.cluster, counts.total, work.recipe.save_every, job.layout.optimizer)
    return Plan(work, terms, _limits(terms, work), _remarks(work))


def _limits(terms: Terms, work: Work) -> list[str]:
    machine = work.cluster.hardware
    if machine.is_cpu:
        return _limits_of_cpu(terms, machine)
    wants = [
        ("device memory", "device", terms["memory.device_bytes"].value, machine.device_bytes, _relief(work)),
        (
            "host memory",
            "node",
            terms["memory.host_bytes_per_node"].value,
            machine.host_bytes,
            "take more nodes, or nvme",
        ),
        ("NVMe space", "node", terms["memory.nvme_bytes_per_node"].value, machine.disk_bytes, "take more nodes"),
    ]
    return [
        f"{what}: {need / 1e9:,.1f} GB a {where} are needed, {there / 1e9:,.1f} GB are there, "
        f"{(need - there) / 1e9:,.1f} GB are short: {way}"
        for what, where, need, there, way in wants
        if need > there
    ]


def _limits_of_cpu(terms: Terms, machine: Hardware) -> list[str]:
    """Ranks' devices and host are one memory."""
    need = machine.devices_per_node * terms["memory.device_bytes"].value + terms["memory.host_bytes_per_node"].value
    if need <= machine.host_bytes:
        return []
    return [
        f"memory: {need / 1e9:,.1f} GB a node are needed, {machine.host_bytes / 1e9:,.1f} GB are there, "
        f"{(need - machine.host_bytes) / 1e9:,.1f} GB are short: take smaller micro-batches, or offload to nvme"
    ]


def _relief(work: Work) -> str:
    """The next thing to do against a full device."""
    layout = work.job.layout
    if layout.optimizer.device:
        return "set zero_optimization.offload_optimizer.device=cpu"
    if layout.recompute == "none":
        return "set m6.recompute=true"
    if layout.parameters.device:
        return "set zero_optimization.offload_param.device=cpu"
    return "take smaller micro-batches or more devices"


def _remarks(work: Work) -> list[str]:
    found = list(work.cluster.assumed)
    peaks = work.cluster.device.peak_flops
    if work.job.layout.precision == "bf16" and "bf16" not in peaks:
        found.append(
            f"{work.cluster.device.name} has no bf16: planned with the rate and bytes of fp16, which the engine does "
            "not train in; say bf16.enabled=false to plan what would run"
        )
    rows, model, layout = work.job.shape.rows, work.config.model, work.job.layout
    if model.experts and layout.ep < layout.devices:
        found.append(
            f"ep is {layout.ep}: {layout.devices // layout.ep} ranks share the weights of each expert and gather them "
            f"in every pass; as many ranks as divide the {model.experts} experts would not"
        )
    if model.experts and model.capacity == "1x" and rows > model.capacity_factor:
        found.append(
            f"a token passes {rows:.3g} experts a layer: a rank has fewer tokens in a micro-batch than there are "
            "experts, and each expert has at least one place; larger micro-batches bring it down"
        )
    return found


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan's figures; those that are estimated as value, low and high."""
    terms = plan.terms

    def estimates(prefix: str) -> dict[str, Any]:
        return {name: plan.estimate(f"{prefix}.{name}") for name in terms.under(prefix)}

    return {
        "parameters": {"total": terms["parameters.total"].value, "active": terms["parameters.active"].value},
        "memory": {
            **{name: plan.estimate(f"memory.{name}") for name in TOTALS},
            "parts": {tier: {n: t.value for n, t in terms.under(f"memory.{tier}").items()} for tier in TIERS},
        },
        "fits": plan.fits,
        "limits": plan.limits,
        "remarks": plan.remarks,
        "step": {
            "seconds": plan.estimate("step.seconds"),
            "tokens": plan.work.usual.tokens,
            "parts": {name: terms[f"step.{name}"].value for name in PARTS},
        },
        "tokens_per_second": plan.estimate("tokens_per_second"),
        "flops_utilization": plan.estimate("flops_utilization"),
        "tokens": plan.work.tokens,
        "days": plan.estimate("days"),
        "energy": estimates("energy"),
        "co2e_kg": plan.estimate("co2e_kg"),
        "cost": plan.estimate("cost") | {"currency": plan.work.cluster.price.currency},
        "checkpoint": estimates("checkpoint"),
        "effective": {name: term.value for name, term in terms.under("effective").items()},
    }


TIERS = ("device", "cpu", "nvme")
TOTALS = ("device_bytes", "host_bytes_per_node", "nvme_bytes_per_node")
# Of a step, as they are shown: the first three are of one micro-batch; what overlaps with what, `--explain` tells.
PARTS = (
    "compute", "exchanges", "all_to_all", "bubble", "busy", "gathers", "host_traffic", "passes", "reduction",
    "optimizer",
)  # fmt: skip
