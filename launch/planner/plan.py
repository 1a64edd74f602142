"""A plan: does a training fit a cluster, and what does it take. All of it is arithmetic on terms."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from launch.planner.memory import CPU_PROCESS_BYTES, HOST_PROCESS_BYTES, add_cpu_rank, add_device, add_placed
from launch.planner.outcome import CHECKPOINT_BYTES, add_checkpoint, add_outcome
from launch.planner.step import add_step
from launch.planner.terms import Terms
from launch.planner.workload import Work
from training.errors import UserError
from training.placement import TIERS

# How far an estimate may be off: over the largest errors of `m6 plan --validate` by kind of job (docs/planner.md), and
# of machines without GPUs those of benchmarks/plan_here.md.
TIME, TIME_OF_EXPERTS, TIME_OF_OFFLOAD, MEMORY, POWER = 0.25, 0.30, 0.30, 0.10, 0.10
TIME_OF_CPU, MEMORY_OF_CPU = 0.40, 0.20


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
            return MEMORY_OF_CPU if self.work.cluster.hardware.is_cpu else MEMORY
        if key.startswith(("parameters", "checkpoint.bytes", "tokens")) and key != "tokens_per_second":
            return 0.0
        return self._band_of_time() + (POWER if key.startswith(("energy.", "co2e")) else 0)

    def _band_of_time(self) -> float:
        layout, shape = self.work.job.layout, self.work.job.shape
        if self.work.cluster.hardware.is_cpu:
            return TIME_OF_CPU
        offload = layout.optimizer.device < 1 or layout.parameters.device < 1
        return max(TIME, TIME_OF_OFFLOAD if offload else 0, TIME_OF_EXPERTS if shape.experts else 0)

    def estimate(self, key: str) -> dict[str, float]:
        value, band = self.terms[key].value, self.band(key)
        return {"value": value, "low": value / (1 + band), "high": value * (1 + band)}


def make_plan(work: Work) -> Plan:
    """Raises UserError where the job's numbers are beyond all bounds."""
    try:
        return _planned(work)
    except ArithmeticError as error:
        raise UserError(f"the plan's numbers overflow ({error}): make the model or its batch smaller") from None


def _planned(work: Work) -> Plan:
    """Every term of a plan, in the order in which one follows from another."""
    job, machine, terms = work.job, work.cluster.hardware, Terms()
    counts = work.config.model.parameter_counts()
    terms.add("parameters.total", "total", "parameters", "model/config.py", total=counts.total)
    terms.add("parameters.active", "active", "parameters", "model/config.py", active=counts.active)
    terms.add("parameters.trained", "trained", "parameters", "recipe: tune", trained=counts.of(work.config.trained))
    placed = work.config.placement.bytes(work.config.elements, work.config.sizes)
    saved = CHECKPOINT_BYTES * counts.total / machine.devices
    process = 0 if machine.is_cpu else HOST_PROCESS_BYTES
    states = add_placed(terms, placed, machine.devices_per_node, min(work.recipe.save_buffer, saved), process)
    if machine.is_cpu:
        add_cpu_rank(terms, job, states, machine.process_bytes or CPU_PROCESS_BYTES)
    else:
        add_device(terms, job, states)
    add_step(terms, work.usual, machine)
    terms.add(
        "flops_utilization", "flops / (seconds * devices * peak)", "share of peak", flops=terms["flops.model"],
        seconds=terms["step.seconds"], devices=machine.devices, peak=machine.peak(job.layout.precision),
    )  # fmt: skip
    add_outcome(terms, machine, work.cluster, work.tokens, work.usual.tokens)
    add_checkpoint(terms, machine, work.cluster, counts.total, work.recipe.save_every, job.layout.optimizer)
    return Plan(work, terms, _limits(terms, work), _remarks(terms, work))


def _limits(terms: Terms, work: Work) -> list[str]:
    machine = work.cluster.hardware
    device, host = terms["memory.device_bytes"].value, terms["memory.host_bytes_per_node"].value
    if machine.is_cpu:  # ranks' devices and host are one memory
        need = machine.devices_per_node * device + host
        wants = [("memory", "node", need, machine.host_bytes, "take smaller micro-batches, or offload to nvme")]
    else:
        wants = [
            ("device memory", "device", device, machine.device_bytes, _relief(work)),
            ("host memory", "node", host, machine.host_bytes, "take more nodes, or nvme"),
        ]
    disks = terms["memory.nvme_bytes_per_node"].value
    wants.append(("NVMe space", "node", disks, machine.disk_bytes, "take more nodes, or larger disks"))
    return [
        f"{what}: {need / 1e9:,.1f} GB a {where} are needed, {there / 1e9:,.1f} GB are there, "
        f"{(need - there) / 1e9:,.1f} GB are short: {way}"
        for what, where, need, there, way in wants
        if need > there
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


def _remarks(terms: Terms, work: Work) -> list[str]:
    own = (
        _remarks_on_states(work), _remarks_on_experts(work), _remarks_on_disks(terms, work), _remarks_on_tuning(terms)
    )  # fmt: skip
    return [*work.cluster.assumed, *itertools.chain(*own)]


def _remarks_on_states(work: Work) -> list[str]:
    found = []
    peaks = work.cluster.device.peak_flops
    if work.job.layout.precision == "bf16" and "bf16" not in peaks:
        taken = "the rate and bytes of fp16" if "fp16" in peaks else "fp32's rate and bytes of 16 bits"
        found.append(
            f"{work.cluster.device.name} has no bf16: planned with {taken}, which the engine does not train in; say "
            "bf16.enabled=false to plan what would run"
        )
    reached = work.cluster.device.reached
    if reached and reached.precision != work.job.layout.precision:
        found.append(
            f"device.reached was measured in {reached.precision}, the job trains in {work.job.layout.precision}: its "
            "times are less certain"
        )
    config = work.config
    pairs = zip(config.placement.parameters, config.placement.optimizer, strict=True)
    if config.sizes.weight == config.sizes.master and any(TIERS.index(w) > TIERS.index(s) for w, s in pairs):
        found.append(
            "weights colder than their fp32 states save nothing: on one tier the two share their memory; leave "
            "zero_optimization.offload_param.device where the optimizer's is"
        )
    if ignored := work.ignored:
        found.append(f"not modelled: {', '.join(ignored)}; the plan is as if they were not set")
    return found


def _remarks_on_tuning(terms: Terms) -> list[str]:
    trained, total = terms["parameters.trained"].value, terms["parameters.total"].value
    if trained == total:
        return []
    return [
        f"{trained:,.0f} of {total:,.0f} parameters are trained ({trained / total:.2%}): memory is planned so, but "
        "times and checkpoints as if all were, which are upper bounds"
    ]


def _remarks_on_disks(terms: Terms, work: Work) -> list[str]:
    machine, keep = work.cluster.hardware, work.recipe.keep
    need = (keep + 1) * terms["checkpoint.bytes"].value / machine.nodes
    free = machine.disk_bytes - terms["memory.nvme_bytes_per_node"].value
    if need <= free:
        return []
    return [
        f"keep={keep}: with the one being written, checkpoints take {need / 1e9:,.1f} GB a node, and its disks have "
        f"{max(0.0, free) / 1e9:,.1f} GB free: keep fewer, or save to a file system that nodes share"
    ]


def _remarks_on_experts(work: Work) -> list[str]:
    found = []
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
        "parameters": {
            "total": terms["parameters.total"].value,
            "active": terms["parameters.active"].value,
            "trained": terms["parameters.trained"].value,
        },
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


TOTALS = ("device_bytes", "host_bytes_per_node", "nvme_bytes_per_node")
# Of a step, as they are shown: the first three are of one micro-batch; what overlaps with what, `--explain` tells.
PARTS = (
    "compute", "exchanges", "all_to_all", "bubble", "busy", "gathers", "host_traffic", "passes", "reduction",
    "optimizer",
)  # fmt: skip
