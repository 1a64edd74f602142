"""How long a step takes: which of its parts follow one another, and which run side by side.

Of parts side by side the time is more than the longest and less than the sum; their p-norm is so, between a sum (p = 1)
and perfect overlap (infinity).
"""

from __future__ import annotations

from launch.planner.compute import add_compute, add_flops
from launch.planner.hardware import Hardware
from launch.planner.job import Job
from launch.planner.offload import add_host_traffic, add_optimizer
from launch.planner.overlap import BUILT_OVERLAP
from launch.planner.terms import Term, Terms
from launch.planner.traffic import add_all_to_all, add_exchanges, add_gathers, add_reduction


def add_step(terms: Terms, job: Job, machine: Hardware) -> Term:
    """Terms `step.*`, in seconds; returns `step.seconds`."""
    flops = add_flops(terms, job)
    compute = add_compute(terms, job, machine, flops)
    busy = _pipelined(terms, job, compute, add_exchanges(terms, job, machine), add_all_to_all(terms, job, machine))
    host_traffic = add_host_traffic(terms, job, machine)
    passes = terms.add(
        "step.passes", "((busy**p + gathers**p + host_traffic**p)**(q/p) + disk_weights**q)**(1/q)", "s",
        "what runs side by side, by a p-norm; disks are read ahead", busy=busy,
        gathers=add_gathers(terms, job, machine), host_traffic=host_traffic, disk_weights=terms["step.disk_weights"],
        p=BUILT_OVERLAP if job.layout.overlapped else 1.0, q=BUILT_OVERLAP,
    )  # fmt: skip
    return terms.add(
        "step.seconds", "(passes**p + reduction**p)**(1/p) + optimizer", "s", passes=passes,
        reduction=add_reduction(terms, job, machine), optimizer=add_optimizer(terms, job, machine),
        p=BUILT_OVERLAP if job.layout.overlapped or job.layout.gradients_overlapped else 1.0,
    )  # fmt: skip


def _pipelined(terms: Terms, job: Job, compute: Term, exchanges: Term, experts: Term) -> Term:
    layout = job.layout
    micro = terms.add(
        "step.micro_batch", "(((compute + held * all_to_all)**p + exchanges**p)**(q/p) + all_to_all**q)**(1/q)", "s",
        "q: whether other micro-batches' products hide the all-to-all, which holds 20 of 132 multiprocessors meanwhile "
        "(DeepSeek-V3, arXiv 2412.19437, section 3.2.2)", compute=compute, exchanges=exchanges,
        held=20 / 132 if layout.experts_overlapped else 0.0,
        all_to_all=experts, p=BUILT_OVERLAP if layout.overlapped else 1.0,
        q=BUILT_OVERLAP if layout.experts_overlapped else 1.0,
    )  # fmt: skip
    terms.add(
        "step.bubble", "(pp - 1) / chunks * micro_batch", "s", "[1] section 2.2: of an interleaved pipeline",
        pp=layout.pp, chunks=layout.chunks, micro_batch=micro,
    )  # fmt: skip
    return terms.add(
        "step.busy", "micro_batches * micro_batch + bubble", "s", micro_batches=layout.micro_batches, micro_batch=micro,
        bubble=terms["step.bubble"],
    )  # fmt: skip
