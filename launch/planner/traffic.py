"""What devices exchange: over the links inside their nodes and the network between.

Sources by number: [1] Narayanan et al., arXiv 2104.04473 (tensor and pipeline parallelism); [2] Rajbhandari et al.,
ZeRO, arXiv 1910.02054, section 7; [3] GShard, arXiv 2006.16668, section 3.2.
"""

from __future__ import annotations

from launch.planner.hardware import ROUTED_SHARE, Hardware
from launch.planner.job import Job
from launch.planner.memory import expert_layer
from launch.planner.terms import Term, Terms

MESSAGE_SECONDS = 3e-6  # of one message of an all-to-all to another node: assumed


def add_exchanges(terms: Terms, job: Job, machine: Hardware) -> Term:
    """What tensor and pipeline parallelism exchange in a micro-batch."""
    return terms.total("step.exchanges", "s a micro-batch", [_tensor(terms, job, machine), _sends(terms, job, machine)])


def _tensor(terms: Terms, job: Job, machine: Hardware) -> Term:
    """All-reduces of tensor parallelism: two a layer in each pass."""
    shape, layout = job.shape, job.layout
    return terms.add(
        "step.tensor_parallel",
        "2 * passes * layers / pp * 2 * (tp - 1) / tp * tokens * hidden * size / (link * share)",
        "s a micro-batch", "[1] section 3.2, ring all-reduce of activations", size=layout.weight_bytes,
        passes=3 if layout.recompute == "full" else 2, layers=shape.layers, pp=layout.pp, tp=layout.tp,
        tokens=job.micro_tokens, hidden=shape.hidden, link=machine.link, share=machine.link_share,
    )  # fmt: skip


def _sends(terms: Terms, job: Job, machine: Hardware) -> Term:
    """Activations and their gradients to the neighbouring stages; a node sends for all its devices."""
    layout = job.layout
    copies = machine.devices_per_node / layout.tp * (1 if layout.scattered_sends else layout.tp)
    return terms.add(
        "step.sends", "(pp > 1) * 2 * chunks * size * tokens * hidden * copies / (network * share)", "s a micro-batch",
        "[1] sections 2.2 and 4.1", pp=layout.pp, chunks=layout.chunks, size=layout.weight_bytes,
        tokens=job.micro_tokens,
        hidden=job.shape.hidden, copies=copies, network=machine.network, share=machine.family.network,
    )  # fmt: skip


def add_all_to_all(terms: Terms, job: Job, machine: Hardware) -> Term:
    """Dispatch and combine, forward and backward: four a layer, six if recomputed."""
    shape, layout = job.shape, job.layout
    near = min(layout.ep, machine.devices_per_node)
    nodes, passes = layout.ep / near, 6 if layout.recompute == "full" else 4
    volume = terms.add(
        "step.all_to_all_bytes", "passes * layers / pp * tokens / tp * hidden * (1.5 if fp8 else size)",
        "B a device and micro-batch, of each copy",
        "[3] section 3.2: rows to their experts and back, in the weights' type; of fp8 what comes back is 16-bit",
        passes=passes, layers=shape.expert_layers, pp=layout.pp,
        tokens=job.micro_tokens, tp=layout.tp, hidden=shape.hidden, fp8=layout.precision == "fp8",
        size=layout.weight_bytes,
    )  # fmt: skip
    copies = terms.add(
        "step.copies_to_nodes", "(nodes - 1) * (1 - (1 - 1 / nodes)**rows) if once else rows * (nodes - 1) / nodes",
        "copies of a token", "experts are evenly loaded", nodes=nodes, rows=shape.rows, once=layout.routed_once,
    )  # fmt: skip
    return terms.add(
        "step.all_to_all",
        "bytes * max(rows * (near - 1) / near / (link * link_share), "
        "copies / (network * (routed_share if once else share))) + exchanges * (ep - near) * latency",
        "s a micro-batch", "inside the node and between nodes at once; a message to each rank elsewhere takes its time",
        bytes=volume, rows=shape.rows, exchanges=passes * shape.expert_layers / layout.pp, ep=layout.ep,
        latency=MESSAGE_SECONDS,
        near=near, copies=copies, link=machine.link, link_share=machine.link_share,
        network=machine.network / machine.devices_per_node, share=machine.family.network, once=layout.routed_once,
        routed_share=ROUTED_SHARE,
    )  # fmt: skip


def add_gathers(terms: Terms, job: Job, machine: Hardware) -> Term:
    """ZeRO-3's traffic: weights gathered forward and backward, gradients scattered, in every micro-batch.

    Experts move only among the devices that hold the same ones. In a pipeline, weights are kept for the step.
    """
    layout = job.layout
    if layout.zero < 3:
        return terms.add("step.gathers", "0", "s", "weights are whole on each device")
    return _around(
        terms, "step.gathers", job, machine, "micro_batches * size * ((1 if gathered <= kept else 2) + 1)",
        "[2] section 7: weights gathered forward and, unless all of them are kept, backward (which recomputation "
        "shares); gradients scattered; in a pipeline once a step (torchtitan)",
        micro_batches=layout.micro_batches if layout.pp == 1 else 1, size=layout.weight_bytes, kept=layout.kept,
        gathered=job.shape.layers * (job.shape.common / layout.tp + expert_layer(job)),
    )  # fmt: skip


def add_reduction(terms: Terms, job: Job, machine: Hardware) -> Term:
    """Gradients over data parallel groups, once a step, where ZeRO-3 does not do it on its way."""
    layout = job.layout
    if layout.zero >= 3 or layout.dp == 1:
        return terms.add("step.reduction", "0", "s", "gradients are scattered with the passes" if layout.zero else "")
    return _around(
        terms, "step.reduction", job, machine, "(gradient if summed_wide else weight) + weight",
        "[2] section 7: scattered, and gathered again; Megatron sums in fp32 from 2023 on",
        gradient=layout.gradient_bytes, weight=layout.weight_bytes, summed_wide=layout.overlapped,
    )  # fmt: skip


def _around(terms: Terms, key: str, job: Job, machine: Hardware, bytes_each: str, source: str, **inputs: float) -> Term:
    """Seconds in which every device gets so many bytes of each parameter that its data-parallel group shares.

    A node's network carries them once for all members of a group that it houses; its links, to each.
    """
    shape, layout = job.shape, job.layout
    groups = min(layout.tp, machine.devices_per_node)  # in a node
    model_parallel = layout.tp * layout.pp
    common = (shape.layers * shape.common + shape.outside) / model_parallel
    copies = layout.devices // (layout.pp * max(layout.ep, 1))  # of an expert
    experts = shape.all_experts / (layout.pp * max(layout.ep, 1)) if copies > 1 else 0.0
    apart = max(0.0, 1 - machine.devices_per_node / layout.devices)
    spread = min(layout.ep, machine.devices_per_node) if experts else 0
    return terms.add(
        key,
        f"({bytes_each}) * max((groups * common + spread * experts) * apart / (network * share), " "(common + "
        f"experts) / (link * link_share))", "s", source, groups=groups, common=common, experts=experts, spread=spread,
        apart=apart, network=machine.network, share=machine.family.network, link=machine.link,
        link_share=machine.family.gathers,
        **inputs,
    )  # fmt: skip
