"""What the fullest device, its host and its disks hold, component by component.

Sources by number: [2] Korthikanti et al., arXiv 2205.05198, sections 4 and 5 (bytes of activations); [3] ZeRO,
arXiv 1910.02054, section 5 (states); [4] ZeRO-Infinity, arXiv 2104.07857, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping

from launch.planner.job import Job
from launch.planner.terms import Term, Terms

# What a process has on a device beyond its tensors: the driver's context, NCCL's buffers and library workspaces, and a
# share of what is allocated that is lost between blocks. Fitted to BSA's peak memory and to ZCAP's capacities.
CONTEXT_BYTES, FRAGMENTED = 2.5e9, 0.05
# Of a rank without a GPU: the corpus, and what it has mapped of its files after some steps (benchmarks/plan_here.md).
CORPUS_BYTES = 0.13e9
CPU_PROCESS_BYTES = 0.45e9  # of a rank without a GPU that has imported all; `m6 doctor` measures it
HOST_PROCESS_BYTES = 4e9  # of a rank: libraries, page-locked buffers, data. Assumed


def add_states(terms: Terms, job: Job) -> Term:
    """Terms `memory.device.{weights,gradients,optimizer}` of a published job; returns their sum, in bytes."""
    layout, here = job.layout, parameters_here(job)
    replicas = layout.dp if layout.ep == 1 else layout.devices / (layout.pp * layout.tp)
    source = "[3] section 5: stage 1 shares optimizer states, 2 gradients, 3 weights"
    parts = [
        terms.add(
            f"memory.device.{name}", "on_device * bytes * parameters / shared", "B", source, on_device=on_device,
            bytes=size, parameters=here, shared=replicas if layout.zero >= stage else 1,
        )
        for name, size, stage, on_device in (
            ("weights", layout.weight_bytes, 3, layout.parameters.device),
            ("gradients", layout.gradient_bytes, 2, layout.optimizer.device),
            ("optimizer", layout.state_bytes, 1, layout.optimizer.device),
        )
    ]  # fmt: skip
    return terms.total("memory.states", "B", parts)


def parameters_here(job: Job) -> float:
    """Of the fullest device before ZeRO shares them out: its stage's, its experts', and all that is in no layer."""
    shape, layout = job.shape, job.layout
    outside = shape.head if layout.pp > 1 else shape.outside
    layers = shape.layers * shape.common / layout.pp + outside
    return layers / layout.tp + shape.all_experts / (layout.pp * max(layout.ep, 1))


def add_activations(terms: Terms, job: Job, mode: str = "") -> Term:
    """Terms of what the passes hold, by [2]; `mode` in place of the layout's recomputation and sequence parallelism."""
    shape, layout = job.shape, job.layout
    mode = mode or layout.recompute + ("+seqpar" if layout.sequence_parallel else "")
    each = stored_bytes(mode, fused=shape.fused_attention)
    terms.add(
        "memory.stored", each, "B a position, hidden unit and layer", "[2] equations 1 to 4, section 5",
        width=shape.width, tp=layout.tp, heads=shape.heads, seq=shape.seq, hidden=shape.hidden,
        score=shape.score_bytes,
    )  # fmt: skip
    return terms.add(
        "memory.activations", "tokens * layers * (hidden * stored * size / 2 + kept_rows) * schedule", "B",
        "[2] section 4.2.3: the first stage holds as many micro-batches as there are stages", tokens=job.micro_tokens,
        hidden=shape.hidden, layers=shape.layers / layout.pp * min(layout.pp, layout.micro_batches),
        stored=terms["memory.stored"], size=layout.weight_bytes,
        kept_rows=0 if "full" in mode else layout.weight_bytes * shape.rows * (2 * shape.hidden + 2 * shape.ffn),
        schedule=1 + (layout.pp - 1) / (layout.pp * layout.chunks) if layout.chunks > 1 else 1.0,
    )  # fmt: skip


def stored_bytes(mode: str, fused: bool) -> str:
    """The formula of [2], table 2, for a mode such as `selective+seqpar`."""
    scores = "" if "selective" in mode or fused else " + score * heads * seq / (hidden * tp)"
    if mode == "alternate":
        return "((18 + 4 * width) / tp + 2) / 2"
    if "full" in mode:
        return "2 / tp" if "seqpar" in mode else "2"
    return f"(18 + 4 * width) / tp{scores}" if "seqpar" in mode else f"10 + (8 + 4 * width) / tp{scores}"


def add_passes(terms: Terms, job: Job) -> list[Term]:
    """What forward and backward passes hold at the most: gathered weights, the gradients' bucket, and all else."""
    shape, layout = job.shape, job.layout
    activations = add_activations(terms, job)
    if not layout.activations.device:
        activations = terms.add("memory.activations", "0", "B", "each layer's input is in host memory")
    whole = stored_bytes("seqpar" if layout.sequence_parallel else "none", shape.fused_attention)
    layer = terms.add(
        "memory.layer",
        f"recomputed * tokens * hidden * size / 2 * ({whole}) + size * tokens * rows * (2 * hidden + 3 * ffn)", "B",
        "[2] equation 1, of the layer in hand; rows at their experts, of width ffn",
        recomputed=layout.recompute == "full", tokens=job.micro_tokens, hidden=shape.hidden, size=layout.weight_bytes,
        width=shape.width, tp=layout.tp, heads=shape.heads, seq=shape.seq, score=shape.score_bytes, rows=shape.rows,
        ffn=shape.ffn,
    )  # fmt: skip
    logits = terms.add(
        "memory.logits", "(size + 4 + 4) * tokens * targets * vocab / tp", "B",
        "logits, their fp32 copy and its gradient", size=layout.weight_bytes, tokens=job.micro_tokens,
        targets=shape.targets, vocab=shape.vocab, tp=layout.tp,
    )  # fmt: skip
    gradients = terms.add(
        "memory.gradients", "gathers * size * min(bucket, layers * layer)", "B",
        "gradients that wait to be scattered (reduce_bucket_size), where they have no buffer",
        gathers=layout.zero >= 3, size=layout.weight_bytes, bucket=0.0 if layout.contiguous else layout.bucket,
        layers=shape.layers, layer=shape.common / layout.tp + expert_layer(job),
    )  # fmt: skip
    buffer = terms.add(
        "memory.device.bucket", "gathers * size * bucket", "B",
        "buffer of gradients to be scattered (reduce_bucket_size)",
        gathers=layout.zero >= 3, size=layout.weight_bytes, bucket=layout.bucket if layout.contiguous else 0.0,
    )  # fmt: skip
    passes = terms.add(
        "memory.device.passes", "max(activations + max(logits, layer), gradients + layer)", "B",
        "logits are gone when the first layer goes backward, activations when the last one does",
        activations=activations, logits=logits, layer=layer, gradients=gradients,
    )  # fmt: skip
    return [_gathered(terms, job), buffer, passes]


def _gathered(terms: Terms, job: Job) -> Term:
    """Whole weights. Experts that no other rank has are used where they lie, unless that is not on the device."""
    shape, layout = job.shape, job.layout
    alone = layout.ep * layout.pp >= layout.devices
    return terms.add(
        "memory.device.gathered", "gathers * size * max(layer, min(kept, layers * layer + outside))", "B",
        "[4] section 3: a layer's weights are whole while it is computed, and kept up to a limit "
        "(stage3_max_live_parameters)", gathers=layout.zero >= 3, size=layout.weight_bytes,
        layer=shape.common / layout.tp + expert_layer(job) * (1 - layout.parameters.device if alone else 1),
        kept=layout.kept, layers=1 if shape.shared else shape.layers, outside=shape.outside / layout.tp,
    )  # fmt: skip


def expert_layer(job: Job) -> float:
    """Parameters of one layer's experts on a device while it computes that layer."""
    return job.shape.experts * job.shape.expert / max(job.layout.ep, 1)


def add_device(terms: Terms, job: Job, states: Term) -> Term:
    """Returns `memory.device_bytes`, of the fullest device."""
    parts = [states, *add_passes(terms, job)]
    return _with_process(terms, parts, CONTEXT_BYTES, "fitted to BSA and ZCAP")


def add_cpu_rank(terms: Terms, job: Job, states: Term, process: float) -> Term:
    """The same of a rank without a GPU. `process`: its bytes before all tensors, as measured.

    It never gives freed memory back, so what is used one after the other is held at once.
    """
    parts = [states, *add_passes(terms, job)]
    parts.append(
        terms.add("memory.device.waiting", "gradients", "B", "beside activations that are freed by then",
                  gradients=terms["memory.gradients"])
    )  # fmt: skip
    parts.append(
        terms.add("memory.device.update", "optimizer / 2", "B",
                  "fp32 gradients in one piece and AdamW's copy of as much, beside 16 bytes of states",
                  optimizer=terms.get("memory.device.optimizer", 0.0))
    )  # fmt: skip
    return _with_process(terms, parts, process + CORPUS_BYTES, "measured, and the corpus")


def _with_process(terms: Terms, parts: list[Term], process: float, source: str) -> Term:
    tensors = terms.total("memory.tensors", "B", parts)
    lost = terms.add(
        "memory.device.fragmentation", "share * tensors", "B", "lost between blocks: fitted to BSA and ZCAP",
        share=FRAGMENTED, tensors=tensors,
    )  # fmt: skip
    context = terms.add(
        "memory.device.context", "bytes", "B", f"of a process beside its tensors: {source}", bytes=process
    )
    return terms.total("memory.device_bytes", "B", [tensors, lost, context])


def add_placed(
    terms: Terms, placed: Mapping[str, Mapping[str, int]], devices: int, buffer: float, process: float
) -> Term:
    """Terms of a run of ours, whose states are placed layer by layer: `placed`, bytes of a rank by tier and kind.

    `devices`: of a node; `buffer`: host bytes of a rank that a save copies into; `process`: of a rank beside all that.
    Returns the device's states.
    """
    source = "training/placement.py: layer by layer"
    for tier in ("cpu", "nvme"):
        for kind, size in placed[tier].items():
            terms.add(f"memory.{tier}.{kind}", "devices * bytes", "B a node", source, devices=devices, bytes=size)
    host = [*terms.under("memory.cpu").values()]
    host.append(
        terms.add("memory.cpu.save", "devices * bytes", "B a node", "save_buffer", devices=devices, bytes=buffer)
    )
    host.append(
        terms.add(
            "memory.cpu.processes", "devices * bytes", "B a node", "libraries, page-locked buffers, data: assumed",
            devices=devices, bytes=process,
        )
    )  # fmt: skip
    terms.total("memory.host_bytes_per_node", "B", host)
    terms.total("memory.nvme_bytes_per_node", "B", [*terms.under("memory.nvme").values()])
    for kind, size in placed["device"].items():
        terms.add(f"memory.device.{kind}", "bytes", "B", source, bytes=size)
    return terms.total(
        "memory.states", "B", [terms[f"memory.device.{kind}"] for kind in placed["device"]],
    )  # fmt: skip
