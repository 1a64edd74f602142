"""What a device computes in a micro-batch: matrix products at the matrix units' rate, the rest at its memory's.

Sources by number: [1] Narayanan et al., arXiv 2104.04473, appendix (FLOPs); [2] Korthikanti et al., arXiv 2205.05198
(activations by operator, recomputation); [3] GShard, arXiv 2006.16668, section 3.2.
"""

from __future__ import annotations

from launch.planner.hardware import Hardware
from launch.planner.job import Job
from launch.planner.overlap import BUILT_OVERLAP
from launch.planner.terms import Term, Terms

# Passes over what a layer stores for its backward pass: written, read, read again, and its gradient written.
PASSES = 4
# What recomputation adds to them, and to the host's time. A CPU takes next to all of its time on the way back, where
# gradients are made, summed and gathered: a job of benchmarks/plan_here.py took 7 % longer, its products among it.
RECOMPUTED, RECOMPUTED_ON_CPU = 1 / 2, 1 / 8


def add_flops(terms: Terms, job: Job) -> Term:
    """FLOPs of a step: `flops.model` without recomputation, `flops.hardware` with it; returns the latter."""
    shape, layout = job.shape, job.layout
    scores = terms.add(
        "flops.scores", "4 * layers * seq * padded**2 * attended * (0.5 if fused else 1)", "FLOPs a token, forward",
        "[1] appendix; fused kernels leave half of a causal mask out", layers=shape.layers, seq=shape.seq,
        padded=shape.padded, attended=shape.attended, fused=shape.fused_attention,
    )  # fmt: skip
    terms.add(
        "flops.model", "3 * tokens * (2 * matrices + 2 * targets * head + 4 * layers * seq * attended)", "FLOPs a step",
        "[1] appendix: backward takes twice forward; scores counted in full, as published figures do",
        tokens=job.tokens, matrices=shape.matrices, head=shape.head, targets=shape.targets, layers=shape.layers,
        seq=shape.seq, attended=shape.attended,
    )  # fmt: skip
    again = {
        "none": "0", "selective": "scores", "alternate": "(2 * matrices + scores) / 2", "full": "2 * matrices + scores",
    }[layout.recompute]  # fmt: skip
    terms.add(
        "flops.wide", "tokens * ((4 if again else 3) * scores + 6 * targets * head)", "FLOPs a step",
        "scores and head are of 16 bits also where the other products are of 8 (Transformer Engine: linear layers)",
        tokens=job.tokens, again=layout.recompute in ("selective", "full"), scores=scores, targets=shape.targets,
        head=shape.head,
    )  # fmt: skip
    return terms.add(
        "flops.hardware", f"tokens * (3 * (2 * matrices + 2 * targets * head + scores) + {again})", "FLOPs a step",
        "[1] appendix; [2] section 5", tokens=job.tokens, matrices=shape.matrices, head=shape.head,
        targets=shape.targets, scores=scores,
    )  # fmt: skip


def add_compute(terms: Terms, job: Job, machine: Hardware, flops: Term) -> Term:
    """Seconds of one micro-batch on one device: products at the matrix units' rate, the rest at the memory's."""
    shape, layout = job.shape, job.layout
    products = terms.add(
        "step.products",
        "((flops - wide) / peak + (wide + (not balanced) * (pp - 1) * 6 * all_tokens * targets * head) / wide_peak) / "
        "(devices * micro_batches * matmul)", "s a micro-batch",
        "of the last stage, which the others wait for: it has the head besides, unless that stands for a layer; share "
        "of peak: fitted a family", flops=flops, wide=terms["flops.wide"],
        balanced=layout.balanced, pp=layout.pp, all_tokens=job.tokens, targets=shape.targets, head=shape.head,
        devices=layout.devices, micro_batches=layout.micro_batches,
        peak=machine.peak(layout.precision),
        wide_peak=machine.peak("bf16" if layout.precision == "fp8" else layout.precision),
        matmul=machine.family.matmul,
    )  # fmt: skip
    again = RECOMPUTED_ON_CPU if machine.is_cpu else RECOMPUTED
    ways = 1 + (again if layout.recompute == "full" else 0)
    passes = PASSES * ways
    stored = terms.add(
        "step.stored",
        "size / 2 * (hidden * ((18 + 4 * width) / tp if sequence_parallel else 10 + (8 + 4 * width) / tp) "
        "+ 5 * heads * seq * padded**2 / tp * scores * (1.5 if scores_again else 1))", "B a token and layer",
        "[2] section 4, of 16 bits: what a layer stores, its feed-forward layer `width` wide; scores that alone are "
        "recomputed go through memory six times for four", size=layout.weight_bytes,
        width=shape.width, hidden=shape.hidden, tp=layout.tp, sequence_parallel=layout.sequence_parallel,
        heads=shape.heads, seq=shape.seq, padded=shape.padded, scores=0 if shape.fused_attention else 1,
        scores_again=layout.recompute == "selective",
    )  # fmt: skip
    activations = terms.add(
        "step.activations", "passes * tokens * layers / pp * stored / (bandwidth * share)", "s a micro-batch",
        "written, read, read again, gradient written; again if recomputed; share: fitted", passes=passes,
        tokens=job.micro_tokens, layers=shape.layers, pp=layout.pp, stored=stored, bandwidth=machine.device_bandwidth,
        share=machine.family.memory,
    )  # fmt: skip
    weights = terms.add(
        "step.weights", "(size * reads + 2 * gradient) * parameters / rate", "s a micro-batch",
        "weights are read in each pass, sums of gradients read and written", size=layout.weight_bytes,
        reads=3 if layout.recompute == "full" else 2, gradient=layout.gradient_bytes, parameters=computed_here(job),
        rate=machine.weights_rate,
    )  # fmt: skip
    experts = terms.add(
        "step.dispatch",
        "passes * tokens * rows * layers / (pp * tp) * size * (4 * hidden + 4 * ffn) / (bandwidth * share)",
        "s a micro-batch", "rows are gathered, put through an expert of width ffn, and put back", passes=passes,
        size=layout.weight_bytes,
        tokens=job.micro_tokens, rows=shape.rows, layers=shape.expert_layers, pp=layout.pp, tp=layout.tp,
        hidden=shape.hidden, ffn=shape.ffn, bandwidth=machine.device_bandwidth, share=machine.family.memory,
    )  # fmt: skip
    logits = terms.add(
        "step.logits", "2 * (size + 4 + 4) * tokens * targets * vocab / tp / (bandwidth * share)", "s a micro-batch",
        "logits, an fp32 copy and its gradient, each written and read", size=layout.weight_bytes,
        tokens=job.micro_tokens, targets=shape.targets, vocab=shape.vocab, tp=layout.tp,
        bandwidth=machine.device_bandwidth, share=machine.family.memory,
    )  # fmt: skip
    masks = terms.add(
        "step.one_hot",
        "einsum * 2 * 2 * (4 if recomputed else 3) * tokens**2 * rows * hidden * layers / pp / (peak * matmul)",
        "s a micro-batch", "[3] section 3.2: dispatch and combine as products over tokens x places",
        einsum=layout.einsum_dispatch, recomputed=layout.recompute == "full", tokens=job.micro_tokens, rows=shape.rows,
        hidden=shape.hidden, layers=shape.expert_layers, pp=layout.pp, peak=machine.peak(layout.precision),
        matmul=machine.family.matmul,
    )  # fmt: skip
    written = terms.add(
        "step.masks",
        "einsum * (22 * (2 if recomputed else 1) + 16) * tokens**2 * rows * layers / pp / (bandwidth * share)",
        "s a micro-batch", "[3] section 3.2: the masks themselves, of tokens x places, in fp32, as bits and in 16 bits",
        einsum=layout.einsum_dispatch, recomputed=layout.recompute == "full", tokens=job.micro_tokens, rows=shape.rows,
        layers=shape.expert_layers, pp=layout.pp, bandwidth=machine.device_bandwidth, share=machine.family.memory,
    )  # fmt: skip
    matrices = terms.add(
        "step.matrices", "(products**p + weights**p)**(1/p)", "s a micro-batch",
        "of one product the longer of multiplying and reading counts; of many, a p-norm; a CPU sums gradients after it",
        products=products, weights=weights, p=1.0 if machine.is_cpu else BUILT_OVERLAP,
    )  # fmt: skip
    device = terms.add(
        "step.device_work", "uneven * (matrices + activations + dispatch + logits + one_hot + masks)",
        "s a micro-batch", "of the device whose rows hold the most, for which the others wait", uneven=shape.uneven,
        matrices=matrices, activations=activations, dispatch=experts, logits=logits, one_hot=masks, masks=written,
    )  # fmt: skip
    launches = terms.add(
        "step.launches", "passes / pp * (layers * layer_seconds + expert_layers * experts / ep * expert_seconds)",
        "s a micro-batch", "the host's time to start a layer's kernels and hooks, which bounds small micro-batches: "
        "assumed of GPUs, where all experts start at once", passes=2 * ways,
        pp=layout.pp, layers=shape.layers, layer_seconds=machine.family.layer_seconds, ep=max(layout.ep, 1),
        expert_layers=shape.expert_layers, experts=shape.experts, expert_seconds=machine.family.expert_seconds,
    )  # fmt: skip
    return terms.add(
        "step.compute", "device + launches if one_after_the_other else max(device, launches)", "s a micro-batch",
        "on a CPU the host is the device", one_after_the_other=machine.is_cpu, device=device, launches=launches,
    )  # fmt: skip


def computed_here(job: Job) -> float:
    """Parameters that a device multiplies by in a micro-batch: its stage's, its experts'."""
    shape, layout = job.shape, job.layout
    common = (shape.layers * shape.common + shape.outside) / (layout.tp * layout.pp)
    return common + shape.all_experts / (layout.pp * max(layout.ep, 1))
