"""How long a step takes, part by part: a roofline for the device, volumes over rates for links, memory and disks.

Sources by number: [1] Narayanan et al., arXiv 2104.04473 (FLOPs, pipeline bubble, tensor parallelism);
[2] Korthikanti et al., arXiv 2205.05198 (activations by operator, recomputation); [3] Rajbhandari et al., ZeRO,
arXiv 1910.02054, section 7 (2 P + P of traffic); [4] ZeRO-Infinity, arXiv 2104.07857; [5] GShard, arXiv 2006.16668.
"""

from __future__ import annotations

from launch.planner.hardware import HOST_SHARE, LINK_SHARE, Hardware
from launch.planner.job import Job, Layout
from launch.planner.terms import Term, Terms

# Passes over what a layer stores for its backward pass: written, read, read again, and its gradient written.
PASSES = 4
# What overlaps: parts that run side by side take less than their sum and more than the longest, as their p-norm does
# between a sum (p = 1) and perfect overlap (infinity). ZeRO-3's gathers hide badly, as AZ and ZINF tell: they are many,
# wait for one another and compete with the products for memory. Megatron's later overlaps were built to hide.
GATHERS_OVERLAP, BUILT_OVERLAP = 1.1, 2.5


def add_step(terms: Terms, job: Job, machine: Hardware) -> Term:
    """Terms `step.*`, in seconds; returns `step.seconds`."""
    flops = add_flops(terms, job)
    compute = _compute(terms, job, machine, flops)
    busy = _pipelined(terms, job, compute, _exchanges(terms, job, machine), _all_to_all(terms, job, machine))
    passes = terms.add(
        "step.passes", "(busy**p + gathers**p + host_traffic**p)**(1/p)", "s", "what runs side by side, by a p-norm",
        busy=busy, gathers=_gathers(terms, job, machine), host_traffic=_host_traffic(terms, job, machine),
        p=GATHERS_OVERLAP,
    )  # fmt: skip
    return terms.add(
        "step.seconds", "(passes**p + reduction**p)**(1/p) + optimizer", "s", passes=passes,
        reduction=_reduction(terms, job, machine), optimizer=_optimizer(terms, job, machine),
        p=BUILT_OVERLAP if job.layout.overlapped else 1.0,
    )  # fmt: skip


def add_flops(terms: Terms, job: Job) -> Term:
    """FLOPs of a step: `flops.model` without recomputation, `flops.hardware` with it; returns the latter."""
    shape, layout = job.shape, job.layout
    scores = terms.add(
        "flops.scores", "4 * layers * seq * hidden * (0.5 if fused else 1)", "FLOPs a token, forward",
        "[1] appendix; fused kernels leave half of a causal mask out", layers=shape.layers, seq=shape.seq,
        hidden=shape.hidden, fused=shape.fused_attention,
    )  # fmt: skip
    terms.add(
        "flops.model", "3 * tokens * (2 * matrices + 2 * targets * head + 4 * layers * seq * hidden)", "FLOPs a step",
        "[1] appendix: backward takes twice forward; scores counted in full, as published figures do",
        tokens=job.tokens, matrices=shape.matrices, head=shape.head, targets=shape.targets, layers=shape.layers, seq=shape.seq,
        hidden=shape.hidden,
    )  # fmt: skip
    selective = "(2 * matrices + scores) / 2" if shape.fused_attention else "scores"
    again = {"none": "0", "selective": selective, "full": "2 * matrices + scores"}[layout.recompute]
    return terms.add(
        "flops.hardware", f"tokens * (3 * (2 * matrices + 2 * targets * head + scores) + {again})", "FLOPs a step",
        "[1] appendix; [2] section 5", tokens=job.tokens, matrices=shape.matrices, head=shape.head,
        targets=shape.targets, scores=scores,
    )  # fmt: skip


def _compute(terms: Terms, job: Job, machine: Hardware, flops: Term) -> Term:
    """Seconds of one micro-batch on one device: products at the matrix units' rate, the rest at the memory's."""
    shape, layout = job.shape, job.layout
    products = terms.add(
        "step.products",
        "(flops + (pp - 1) * 6 * all_tokens * targets * head) / (devices * micro_batches * peak * matmul)", "s a micro-batch",
        "of the last stage, which the others wait for: it alone has the head; share of peak: fitted a family",
        flops=flops, pp=layout.pp, all_tokens=job.tokens,
        targets=shape.targets, head=shape.head, devices=layout.devices,
        micro_batches=layout.micro_batches, peak=machine.peak(layout.precision), matmul=machine.family.matmul,
    )  # fmt: skip
    passes = PASSES + (2 if layout.recompute == "full" else 0)
    stored = terms.add(
        "step.stored", "hidden * ((18 + 4 * width) / tp if sequence_parallel else 10 + (8 + 4 * width) / tp) + 5 * heads * seq / tp * scores",
        "B a token and layer", "[2] section 4: what a layer stores, its feed-forward layer `width` wide", width=shape.width,
        hidden=shape.hidden, tp=layout.tp,
        sequence_parallel=layout.sequence_parallel, heads=shape.heads, seq=shape.seq,
        scores=0 if shape.fused_attention else 1,
    )  # fmt: skip
    activations = terms.add(
        "step.activations", "passes * tokens * layers / pp * stored / (bandwidth * share)", "s a micro-batch",
        "written, read, read again, gradient written; two more if recomputed; share: fitted",
        passes=passes, tokens=job.micro_tokens, layers=shape.layers, pp=layout.pp, stored=stored,
        bandwidth=machine.device_bandwidth, share=machine.family.memory,
    )  # fmt: skip
    weights = terms.add(
        "step.weights", "(2 * reads + 2 * gradient) * parameters / (bandwidth * share)", "s a micro-batch",
        "16-bit weights are read in each pass, sums of gradients read and written",
        reads=3 if layout.recompute == "full" else 2, gradient=layout.gradient_bytes,
        parameters=computed_here(job), bandwidth=machine.device_bandwidth, share=machine.family.memory,
    )  # fmt: skip
    experts = terms.add(
        "step.dispatch", "2 * passes * tokens * rows * layers / (pp * tp) * (4 * hidden + 4 * ffn) / (bandwidth * share)",
        "s a micro-batch", "rows are gathered, put through an expert of width ffn, and put back; 16-bit",
        passes=passes, tokens=job.micro_tokens, rows=shape.rows, layers=shape.expert_layers, pp=layout.pp,
        tp=layout.tp, hidden=shape.hidden, ffn=shape.ffn, bandwidth=machine.device_bandwidth,
        share=machine.family.memory,
    )  # fmt: skip
    logits = terms.add(
        "step.logits", "20 * tokens * targets * vocab / tp / (bandwidth * share)", "s a micro-batch",
        "16-bit logits, an fp32 copy and its gradient, each written and read", tokens=job.micro_tokens,
        targets=shape.targets,
        vocab=shape.vocab, tp=layout.tp, bandwidth=machine.device_bandwidth, share=machine.family.memory,
    )  # fmt: skip
    masks = terms.add(
        "step.one_hot", "einsum * 2 * 2 * (4 if recomputed else 3) * tokens**2 * rows * hidden * layers / pp / (peak * matmul)", "s a micro-batch",
        "[5] section 3.2: dispatch and combine as products over tokens x places", einsum=layout.einsum_dispatch,
        recomputed=layout.recompute == "full",
        tokens=job.micro_tokens, rows=shape.rows, hidden=shape.hidden, layers=shape.expert_layers, pp=layout.pp,
        peak=machine.peak(layout.precision), matmul=machine.family.matmul,
    )  # fmt: skip
    return terms.total("step.compute", "s a micro-batch", [products, activations, weights, experts, logits, masks])


def computed_here(job: Job) -> float:
    """Parameters that a device multiplies by in a micro-batch: its stage's, its experts'."""
    shape, layout = job.shape, job.layout
    common = (shape.layers * shape.common + shape.outside) / (layout.tp * layout.pp)
    return common + shape.all_experts / (layout.pp * max(layout.ep, 1))


def _exchanges(terms: Terms, job: Job, machine: Hardware) -> Term:
    """What tensor and pipeline parallelism exchange in a micro-batch."""
    return terms.total("step.exchanges", "s a micro-batch", [_tensor(terms, job, machine), _sends(terms, job, machine)])


def _sends(terms: Terms, job: Job, machine: Hardware) -> Term:
    """Activations and their gradients to the neighbouring stages; a node sends for all its devices."""
    layout = job.layout
    copies = machine.devices_per_node / layout.tp * (1 if layout.scattered_sends else layout.tp)
    return terms.add(
        "step.sends", "(pp > 1) * 2 * chunks * 2 * tokens * hidden * copies / (network * share)", "s a micro-batch",
        "[1] sections 2.2 and 4.1", pp=layout.pp, chunks=layout.chunks, tokens=job.micro_tokens,
        hidden=job.shape.hidden, copies=copies, network=machine.network, share=machine.family.network,
    )  # fmt: skip


def _tensor(terms: Terms, job: Job, machine: Hardware) -> Term:
    """All-reduces of tensor parallelism: two a layer in each pass."""
    shape, layout = job.shape, job.layout
    return terms.add(
        "step.tensor_parallel",
        "2 * passes * layers / pp * 2 * (tp - 1) / tp * tokens * hidden * 2 / (link * share)", "s a micro-batch",
        "[1] section 3.2, ring all-reduce of 16-bit activations", passes=3 if layout.recompute == "full" else 2,
        layers=shape.layers, pp=layout.pp, tp=layout.tp, tokens=job.micro_tokens, hidden=shape.hidden,
        link=machine.link, share=LINK_SHARE,
    )  # fmt: skip


def _all_to_all(terms: Terms, job: Job, machine: Hardware) -> Term:
    """Dispatch and combine, forward and backward: four a layer, six if recomputed."""
    shape, layout = job.shape, job.layout
    near = min(layout.ep, machine.devices_per_node)
    nodes = layout.ep / near
    volume = terms.add(
        "step.all_to_all_bytes", "passes * layers / pp * tokens / tp * hidden * (1.5 if fp8 else 2)",
        "B a device and micro-batch, of each copy",
        "[5] section 3.2: 16-bit rows to their experts and back; of 8-bit ones only what comes back is 16-bit",
        passes=6 if layout.recompute == "full" else 4, layers=shape.expert_layers, pp=layout.pp, tokens=job.micro_tokens,
        tp=layout.tp, hidden=shape.hidden, fp8=layout.precision == "fp8",
    )  # fmt: skip
    copies = terms.add(
        "step.copies_to_nodes",
        "(nodes - 1) * (1 - (1 - 1 / nodes)**rows) if once else rows * (nodes - 1) / nodes", "copies of a token",
        "experts are evenly loaded", nodes=nodes, rows=shape.rows, once=layout.routed_once,
    )  # fmt: skip
    return terms.add(
        "step.all_to_all", "bytes * max(rows * (near - 1) / near / (link * link_share), copies / (network * share))",
        "s a micro-batch", "inside the node and between nodes at once", bytes=volume, rows=shape.rows, near=near, copies=copies,
        link=machine.link, link_share=LINK_SHARE, network=machine.network / machine.devices_per_node,
        share=machine.family.network,
    )  # fmt: skip


def _pipelined(terms: Terms, job: Job, compute: Term, exchanges: Term, experts: Term) -> Term:
    layout = job.layout
    micro = terms.add(
        "step.micro_batch", "(compute**p + exchanges**p)**(1/p) + all_to_all", "s", compute=compute,
        exchanges=exchanges, all_to_all=experts, p=BUILT_OVERLAP if layout.overlapped else 1.0,
    )  # fmt: skip
    terms.add(
        "step.bubble", "(pp - 1) / chunks * micro_batch", "s", "[1] section 2.2: of an interleaved pipeline", pp=layout.pp,
        chunks=layout.chunks, micro_batch=micro,
    )  # fmt: skip
    return terms.add(
        "step.busy", "micro_batches * micro_batch + bubble", "s", micro_batches=layout.micro_batches, micro_batch=micro,
        bubble=terms["step.bubble"],
    )  # fmt: skip


def _gathers(terms: Terms, job: Job, machine: Hardware) -> Term:
    """ZeRO-3's traffic: weights gathered forward and backward, gradients scattered, in every micro-batch.

    Experts move only among the devices that hold the same ones.
    """
    shape, layout = job.shape, job.layout
    if layout.zero < 3:
        return terms.add("step.gathers", "0", "s", "weights are whole on each device")
    return _around(
        terms, "step.gathers", job, machine, "micro_batches * 2 * (2 + 1)",
        "[3] section 7: 2 P gathered twice (recomputation shares the second), 2 P scattered",
        micro_batches=layout.micro_batches,
    )  # fmt: skip


def _reduction(terms: Terms, job: Job, machine: Hardware) -> Term:
    """Gradients over data parallel groups, once a step, where ZeRO-3 does not do it on its way."""
    layout = job.layout
    if layout.zero >= 3 or layout.dp == 1:
        return terms.add("step.reduction", "0", "s", "gradients are scattered with the passes" if layout.zero else "")
    return _around(
        terms, "step.reduction", job, machine, "gradient + weight", "[3] section 7: scattered, and gathered again",
        gradient=layout.gradient_bytes, weight=layout.weight_bytes,
    )  # fmt: skip


def _around(
    terms: Terms, key: str, job: Job, machine: Hardware, bytes_each: str, source: str, **inputs: float
) -> Term:
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
        f"({bytes_each}) * max((groups * common + spread * experts) * apart / (network * share), "
        "(common + experts) / (link * link_share))",
        "s", source, groups=groups, common=common, experts=experts, spread=spread, apart=apart,
        network=machine.network, share=machine.family.network, link=machine.link, link_share=LINK_SHARE, **inputs,
    )  # fmt: skip


def states_here(layout: Layout, total: float, machine: Hardware) -> float:
    """Parameters whose optimizer states are in one node."""
    return total * min(machine.devices_per_node, layout.devices) / layout.devices


def _host_traffic(terms: Terms, job: Job, machine: Hardware) -> Term:
    """What crosses a device's link to its host within the passes: offloaded weights and activations."""
    shape, layout = job.shape, job.layout
    local = shape.total / layout.devices
    weights = terms.add(
        "step.host_weights", "micro_batches * 2 * weight * offloaded * parameters / (link * share)", "s",
        "[4] section 4: a device's share of the weights, forward and backward", micro_batches=layout.micro_batches,
        weight=layout.weight_bytes, offloaded=1 - layout.parameters.device, parameters=local,
        link=_host_link(machine), share=HOST_SHARE,
    )  # fmt: skip
    disk = terms.add(
        "step.disk_weights", "micro_batches * 2 * weight * on_disk * parameters / (read * share)", "s",
        "[4] section 4: a node's share, forward and backward", micro_batches=layout.micro_batches,
        weight=layout.weight_bytes, on_disk=layout.parameters.nvme,
        parameters=states_here(layout, shape.total, machine), read=machine.disk_read, share=HOST_SHARE,
    )  # fmt: skip
    activations = terms.add(
        "step.host_activations", "micro_batches * 2 * offloaded * 2 * tokens * hidden * layers / (link * share)", "s",
        "[4] section 5: each layer's input, there and back", micro_batches=layout.micro_batches,
        offloaded=1 - layout.activations.device, tokens=job.micro_tokens, hidden=shape.hidden, layers=shape.layers,
        link=_host_link(machine), share=HOST_SHARE,
    )  # fmt: skip
    return terms.total("step.host_traffic", "s", [weights, disk, activations])


def _host_link(machine: Hardware) -> float:
    """A device's rate to the host while its neighbours copy too."""
    return min(machine.host_link, machine.host_links / machine.devices_per_node)


def _optimizer(terms: Terms, job: Job, machine: Hardware) -> Term:
    """The update, once a step, by tier of the optimizer's states."""
    layout, total = job.layout, job.shape.total
    shards = layout.devices if layout.zero else layout.tp * layout.pp * max(layout.ep, 1)
    near = terms.add(
        "step.device_adam", "on_device * (2 * state + gradient + weight) * parameters / (bandwidth * share)", "s",
        "states are read and written, gradients read, weights written", on_device=layout.optimizer.device,
        state=layout.state_bytes, gradient=layout.gradient_bytes, weight=layout.weight_bytes, parameters=total / shards,
        bandwidth=machine.device_bandwidth, share=machine.family.memory,
    )  # fmt: skip
    here = states_here(layout, total, machine)
    host = terms.add(
        "step.cpu_adam", "offloaded * (2 * state + gradient + weight) * parameters / (bandwidth * share)", "s",
        "CPU Adam is bound by host memory", offloaded=1 - layout.optimizer.device, state=layout.state_bytes,
        gradient=layout.gradient_bytes, weight=layout.weight_bytes, parameters=here, bandwidth=machine.host_bandwidth,
        share=HOST_SHARE,
    )  # fmt: skip
    copies = terms.add(
        "step.host_updates", "offloaded * (gradient + weight) * parameters / (link * share)", "s",
        "gradients down, new weights up", offloaded=1 - layout.optimizer.device, gradient=layout.gradient_bytes,
        weight=layout.weight_bytes, parameters=total / layout.devices, link=_host_link(machine), share=HOST_SHARE,
    )  # fmt: skip
    disk = terms.add(
        "step.disk_states",
        "on_disk * parameters * ((state + gradient) / (read * share) + (state + gradient) / (write * share))", "s",
        "masters, moments and gradient sums are written and read", on_disk=layout.optimizer.nvme, parameters=here,
        state=layout.state_bytes, gradient=layout.gradient_bytes, read=machine.disk_read, write=machine.disk_write,
        share=HOST_SHARE,
    )  # fmt: skip
    return terms.total("step.optimizer", "s", [near, host, copies, disk])
