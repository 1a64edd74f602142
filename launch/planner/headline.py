"""The headline plans as text, docs/plans.md, worked out anew: python -m launch.planner.headline > docs/plans.md"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launch.planner.cluster import Cluster, load_cluster
from launch.planner.hardware import Hardware
from launch.planner.outcome import add_power
from launch.planner.plan import Plan, make_plan
from launch.planner.published import job, machine
from launch.planner.step import add_step
from launch.planner.terms import Terms
from launch.planner.workload import load_work

V100_480, V100_512, H100 = "v100-32g-x480", "v100-32g-x512", "h100-80g-x512"
ONE_T, TEN_T = "launch/recipes/m6-1t.yaml", "launch/recipes/m6-10t.yaml"
FP32 = ["ds.bf16.enabled=false"]  # what a V100 would run here: Volta has no bf16
LARGE = ["global_batch=61440"]
ON_DEVICE = ["ds.zero_optimization.offload_optimizer.device=none"]
THEN = "delink.then.ds"
ON_DISK = [
    f"{THEN}.zero_optimization.offload_param.device=nvme", f"{THEN}.zero_optimization.offload_optimizer.device=nvme",
    f"{THEN}.m6.optimizer_states=fp32", f"{THEN}.data_types.grad_accum_dtype=fp32",
]  # fmt: skip
WEIGHTS_HERE = [f"{THEN}.zero_optimization.offload_param.device=none"]


@dataclass(frozen=True)
class Run:
    """A headline run: in words, its recipe and changes of it, its cluster, or so many nodes of it."""

    name: str
    recipe: str
    cluster: str
    changes: Sequence[str] = ()
    delinked: bool = False
    nodes: int | None = None

    def plan(self) -> Plan:
        cluster = load_cluster(self.cluster)
        cluster = cluster.model_copy(update={"nodes": self.nodes or cluster.nodes})
        return make_plan(load_work(self.recipe, cluster, None, TOKENS, self.changes, self.delinked))


TOKENS = 1e9  # of a plan, whose rates alone are shown
SPARSE = Run("1T, 480 H100, all on the device, 61,440 rows", ONE_T, H100, [*ON_DEVICE, *LARGE], nodes=60)
RUNS = [
    Run("1T, 480 V100, at fp16's rate and bytes", ONE_T, V100_480),
    Run("1T, 480 V100, fp32", ONE_T, V100_480, FP32),
    Run("1T, 480 V100, fp16, 61,440 rows a step", ONE_T, V100_480, LARGE),
    Run("10T, shared layers, 512 V100, fp16", TEN_T, V100_512),
    Run("10T, own layers, 512 V100, fp16, 8-bit states", TEN_T, V100_512, delinked=True),
    Run("10T, own layers, 512 V100, fp16, all on NVMe", TEN_T, V100_512, ON_DISK, delinked=True),
    Run("10T, own layers, 512 V100, fp32, all on NVMe", TEN_T, V100_512, [*ON_DISK, *FP32], delinked=True),
    Run("1T, 480 H100", ONE_T, H100, nodes=60),
    Run("1T, 480 H100, all on the device", ONE_T, H100, ON_DEVICE, nodes=60),
    SPARSE,
    Run("1T, 512 H100, all on the device", ONE_T, H100, [*ON_DEVICE, "global_batch=4096"]),
    Run("10T, shared layers, 512 H100", TEN_T, H100),
    Run("10T, own layers, 512 H100, 8-bit states", TEN_T, H100, delinked=True),
    Run("10T, own layers, 512 H100, 8-bit states, weights on the device", TEN_T, H100, WEIGHTS_HERE, delinked=True),
    Run("10T, own layers, 512 H100, all on NVMe", TEN_T, H100, ON_DISK, delinked=True),
]
GPT3 = {  # arXiv 2005.14165, as laid out in arXiv 2104.04473, section 5
    "id": "GPT-3", "model": "GPT-3", "layers": "96", "hidden": "12288", "ffn": "49152", "heads": "96", "seq": "2048",
    "vocab": "51200", "experts": "", "top_k": "", "moe_every": "", "params_total": "1.75e11",
    "params_active": "1.75e11", "global_batch_tokens": "3145728", "gpu": "A100-80GB", "gpus": "1024", "tp": "8",
    "pp": "8", "dp": "16", "ep": "1", "zero": "0", "offload": "none", "micro_batch": "1", "recompute": "full",
    "precision": "bf16", "notes": "",
}  # fmt: skip
GPT3_TOKENS, GPT3_MWH = 300e9, 1287.0  # the energy as estimated by Patterson et al., arXiv 2104.10350
ONE_PERCENT_KWH = 12_870.0
# A call, assumed: positions read (a picture's 16 and 112 of text), and written one at a time.
CALLS_A_DAY, READ, WRITTEN, BUSIEST = 1e8, 128, 32, 3.0
DAY = 86400


def text() -> str:
    parts = (_introduction(), _runs(), _one_percent(), _checks(), _serving(), _saving())
    return "\n".join(["# The headline plans", "", *itertools.chain(*parts)])


def _introduction() -> Iterator[str]:
    yield "What `m6 plan` says of the runs that M6 is known for. **None of them has been run here**; how far such plans"
    yield "are off on published measurements is in `docs/planner.md`. `python -m launch.planner.headline` writes this"
    yield "page, and a test writes it again. Tables show the middle of each estimate's band; `m6 plan` shows all of it."
    yield ""


def _runs() -> Iterator[str]:
    yield from ["## 1T and 10T", "", "Energy is of all: devices, hosts, switches where they are known, and PUE."]
    yield from ["The engine trains in bf16 or fp32: on V100, only the plans in fp32 are of what would run.", ""]
    yield from _heading(
        "run", "device, GB", "host, GB a node", "NVMe, TB a node", "fits", "s a step", "tokens/s", "tokens in 10 days",
        "MWh in 10 days", "J a token",
    )  # fmt: skip
    plans = [(run.name, run.plan()) for run in RUNS]
    yield from (_row(name, plan) for name, plan in plans)
    yield ""
    yield "Where a run does not fit:"
    yield ""
    yield from (f"- {name}: {limit}." for name, plan in plans for limit in plan.limits)
    yield ""


def _heading(*cells: str) -> Iterator[str]:
    yield f"| {' | '.join(cells)} |"
    yield "|---" * len(cells) + "|"


def _row(name: str, plan: Plan) -> str:
    value = {key: term.value for key, term in plan.terms.items()}
    ten_days = value["tokens_per_second"] * 10 * DAY
    cells = [
        name, f"{value['memory.device_bytes'] / 1e9:.1f}", f"{value['memory.host_bytes_per_node'] / 1e9:,.0f}",
        f"{value['memory.nvme_bytes_per_node'] / 1e12:.2f}", "yes" if plan.fits else "**no**",
        f"{value['step.seconds']:.3g}", f"{value['tokens_per_second']:,.0f}", f"{ten_days / 1e9:,.3g} B",
        f"{value['energy.joules_per_token'] * ten_days / 3.6e9:.3g}", f"{value['energy.joules_per_token']:.3g}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _one_percent() -> Iterator[str]:
    yield from ["## One per cent of GPT-3's energy", ""]
    percent = ONE_PERCENT_KWH / 1000
    yield f"GPT-3's training is estimated at {GPT3_MWH:,.0f} MWh (arXiv 2104.10350); 1 % are {percent:.2f} MWh."
    yield "The claim was of the same number of parameters, not of the run of ten days. What that energy would train:"
    yield ""
    yield from _heading("run", "hours", "tokens", "kWh a billion parameters")
    for run in RUNS:
        plan = run.plan()
        if plan.fits:
            joules, rate = plan.terms["energy.joules_per_token"].value, plan.terms["tokens_per_second"].value
            tokens = ONE_PERCENT_KWH * 3.6e6 / joules
            parameters = plan.terms["parameters.total"].value / 1e9
            hours, each = tokens / rate / 3600, ONE_PERCENT_KWH / parameters
            yield f"| {run.name} | {hours:.3g} | {tokens / 1e9:,.3g} B | {each:,.3g} |"
    yield ""


def _gpt3(**changes: str) -> tuple[Terms, Hardware, float]:
    """The step of GPT-3 with these columns changed: its terms, its devices, and tokens a second."""
    row = GPT3 | changes
    terms, hardware, asked = Terms(), machine(row), job(row)
    seconds = add_step(terms, asked, hardware)
    add_power(terms, hardware, asked.layout.micro_batches * terms["step.device_work"].value, seconds)
    return terms, hardware, asked.tokens / seconds.value


def _checks() -> Iterator[str]:
    _, hardware, rate = _gpt3()
    days = GPT3_TOKENS / rate / DAY
    hire = 512 / 8 * 20 * 240
    yield from ["## Checks against published estimates", ""]
    yield f"- GPT-3, 300 B tokens on {hardware.devices:,} A100 (tensor 8, pipeline 8, data 16, all recomputed):"
    yield f"  **{days:.1f} days**; arXiv 2104.04473, section 5, estimates 34."
    yield "- 512 A100 for ten days at 20 USD an hour of eight: 64 nodes x 240 h x 20 USD ="
    yield f"  **{hire:,.0f} USD**; published: 307,200."
    yield ""


def _serving() -> Iterator[str]:
    cluster, terms = load_cluster(H100), Terms()
    add_serving(terms, cluster, SPARSE.plan())
    yield from ["## A hundred million calls a day", ""]
    yield f"The 1T model in 16 bits on H100, a call of {READ} positions read and {WRITTEN} written, the busiest hour at"
    yield f"{BUSIEST:g} times the mean: all assumed. Nothing of this is measured, and batches are taken to be full."
    yield ""
    for name, term in terms.under("serving").items():
        yield f"- {name.replace('_', ' ')}: {term.value:,.0f} ({term.source})"
    yield ""


def add_serving(terms: Terms, cluster: Cluster, plan: Plan) -> None:
    """Terms `serving.*`: devices that answer the calls, and their energy."""
    hardware, family = cluster.hardware, cluster.hardware.family
    shape, calls = plan.work.job.shape, BUSIEST * CALLS_A_DAY / DAY
    flops = terms.add(
        "serving.flops_devices", "ceil(calls * (read + written) * 2 * active / (peak * share))", "devices",
        "to multiply: two FLOPs a parameter and position", calls=calls, read=READ, written=WRITTEN,
        active=shape.matrices + shape.head, peak=hardware.peak("bf16"), share=family.matmul,
    )  # fmt: skip
    memory = terms.add(
        "serving.memory_devices", "ceil(2 * total / (0.8 * bytes))", "devices",
        "to hold the weights in 80 % of their memory", total=shape.total, bytes=hardware.device_bytes,
    )  # fmt: skip
    # All devices together hold the model once, and work on all calls: a step of decoding reads all of it.
    bandwidth = terms.add(
        "serving.bandwidth_devices", "ceil(2 * total / (bandwidth * share * seconds))", "devices",
        "to read all experts for every token written, 20 a second", total=shape.total,
        bandwidth=hardware.device_bandwidth, share=family.memory, seconds=1 / 20,
    )  # fmt: skip
    devices = terms.add(
        "serving.devices", "max(flops, memory, bandwidth)", "devices", "the most of these", flops=flops, memory=memory,
        bandwidth=bandwidth,
    )  # fmt: skip
    watts = add_power(terms, hardware, 1.0, BUSIEST)
    terms.add(
        "serving.kwh_a_day", "devices / each * watts * 24 / 1000 * pue", "kWh",
        "nodes' power at the mean load, and PUE", devices=devices, each=hardware.devices_per_node, watts=watts,
        pue=cluster.pue,
    )  # fmt: skip


def _saving() -> Iterator[str]:
    yield from ["## Where a saving comes from", ""]
    cluster = load_cluster(H100)
    start = GPT3_MWH * 3.6e9 / GPT3_TOKENS
    dense, eight = (_gpt3_joules(cluster, precision) for precision in ("bf16", "fp8"))
    sparse = SPARSE.plan().terms["energy.joules_per_token"].value
    tokens = ONE_PERCENT_KWH * 3.6e6 / sparse
    yield "From GPT-3 as it was trained to the 1T model at 1 % of its energy, one thing after the other; PUE 1.1."
    yield ""
    yield from _heading("step", "J a token", "factor")
    yield f"| GPT-3 on V100, fp16 (published estimate) | {start:.3g} | |"
    yield f"| hardware: the same on H100, bf16 (planned) | {dense:.3g} | {start / dense:.2f} |"
    yield f"| precision: fp8 (planned; the engine here trains in bf16) | {eight:.3g} | {dense / eight:.2f} |"
    yield f"| sparsity: {SPARSE.name}, bf16 (planned) | {sparse:.3g} | {dense / sparse:.1f} (of bf16) |"
    yield f"| tokens: {tokens / 1e9:,.0f} B in place of 300 B | | {GPT3_TOKENS / tokens:.2f} |"
    yield ""
    yield "A sparse parameter is not worth a dense one: the factors say nothing about quality, and no number is *the*"
    yield "share of GPT-3's energy. Energy to a stated loss has to be measured."


def _gpt3_joules(cluster: Cluster, precision: str) -> float:
    terms, hardware, rate = _gpt3(
        gpu="H100-80GB", gpus="512", dp="8", pp="8", precision=precision, recompute="none", zero="1"
    )  # fmt: skip
    watts = (terms["power.node"].value + cluster.power.switch_watts) * hardware.nodes * cluster.pue
    return watts / rate


if __name__ == "__main__":
    print(text())
