"""What offload costs: traffic to the host and its disks, and the optimizer's step on each tier.

Source: [1] ZeRO-Infinity, arXiv 2104.07857, sections 4 and 5.
"""

from __future__ import annotations

from launch.planner.hardware import Hardware
from launch.planner.job import Job, Layout
from launch.planner.terms import Term, Terms

# torch's AdamW on a CPU reads and writes 80 bytes a parameter in eight operations, and 12 for copies of gradients and
# weights, where 30 would do.
CPU_ADAMW = 92 / 30


def add_host_traffic(terms: Terms, job: Job, machine: Hardware) -> Term:
    """What crosses a device's link to its host within the passes; and `step.disk_weights`, read meanwhile."""
    shape, layout = job.shape, job.layout
    local = shape.total / layout.devices
    weights = terms.add(
        "step.host_weights", "micro_batches * 2 * weight * offloaded * parameters / (link * share)", "s",
        "[1] section 4: a device's share of the weights, forward and backward", micro_batches=layout.micro_batches,
        weight=layout.weight_bytes, offloaded=1 - layout.parameters.device, parameters=local,
        link=machine.busy_host_link,
        share=machine.host_share,
    )  # fmt: skip
    terms.add(
        "step.disk_weights", "micro_batches * 2 * weight * on_disk * parameters / (read * share)", "s",
        "[1] section 4: a node's share, forward and backward, read ahead of the layers", weight=layout.weight_bytes,
        micro_batches=layout.micro_batches, on_disk=layout.parameters.nvme,
        parameters=states_here(layout, shape.total, machine), read=machine.disk_read, share=machine.host_share,
    )  # fmt: skip
    activations = terms.add(
        "step.host_activations", "micro_batches * 2 * size * offloaded * tokens * hidden * layers / (link * share)",
        "s", "[1] section 5: each layer's input, there and back", micro_batches=layout.micro_batches,
        size=layout.weight_bytes, offloaded=1 - layout.activations.device, tokens=job.micro_tokens,
        hidden=shape.hidden, layers=shape.layers, link=machine.busy_host_link, share=machine.host_share,
    )  # fmt: skip
    return terms.total("step.host_traffic", "s", [weights, activations])


def add_optimizer(terms: Terms, job: Job, machine: Hardware) -> Term:
    """The update, once a step, by tier of the optimizer's states."""
    layout, total = job.layout, job.shape.total
    shards = layout.devices if layout.zero else layout.tp * layout.pp * max(layout.ep, 1)
    near = terms.add(
        "step.device_adam", "on_device * passes * (2 * state + gradient + weight) * parameters / rate", "s",
        "states are read and written, gradients read, weights written; torch's AdamW goes through them one operation "
        "after the other on a CPU", on_device=layout.optimizer.device, passes=CPU_ADAMW if machine.is_cpu else 1.0,
        state=layout.state_bytes, gradient=layout.gradient_bytes, weight=layout.weight_bytes, parameters=total / shards,
        rate=machine.states_rate,
    )  # fmt: skip
    here = states_here(layout, total, machine)
    host = terms.add(
        "step.cpu_adam", "offloaded * (2 * state + gradient + weight) * parameters / (bandwidth * share)", "s",
        "CPU Adam is bound by host memory", offloaded=1 - layout.optimizer.device, state=layout.state_bytes,
        gradient=layout.gradient_bytes, weight=layout.weight_bytes, parameters=here, bandwidth=machine.host_bandwidth,
        share=machine.family.update,
    )  # fmt: skip
    copies = terms.add(
        "step.host_updates", "offloaded * (gradient + weight) * parameters / (link * share)", "s",
        "gradients down, new weights up", offloaded=1 - layout.optimizer.device, gradient=layout.gradient_bytes,
        weight=layout.weight_bytes, parameters=total / layout.devices, link=machine.busy_host_link,
        share=machine.host_share,
    )  # fmt: skip
    disk = terms.add(
        "step.disk_states",
        "on_disk * parameters * ((state + gradient) / (read * share) + (state + gradient) / (write * share))", "s",
        "masters, moments and gradient sums are written and read", on_disk=layout.optimizer.nvme, parameters=here,
        state=layout.state_bytes, gradient=layout.gradient_bytes, read=machine.disk_read, write=machine.disk_write,
        share=machine.host_share,
    )  # fmt: skip
    return terms.total("step.optimizer", "s", [near, host, copies, disk])


def states_here(layout: Layout, total: float, machine: Hardware) -> float:
    """Parameters whose optimizer states are in one node."""
    return total * min(machine.devices_per_node, layout.devices) / layout.devices
