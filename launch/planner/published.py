"""Rows of published measurements as jobs: the columns of `benchmarks/calibration.csv`, and nothing by name.

Configuration that the columns have no place for is read from `notes` where it stands there in plain terms
(`mbs=4`, `recompute=full`, `vp 4`, `14.8T tokens`). What a row leaves open is filled by the habits of its time, below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args

from launch.planner.hardware import Hardware
from launch.planner.job import Job, Layout, Recompute, Shape, Shares

Row = Mapping[str, str]


COLUMNS = (
    "layers", "hidden", "ffn", "heads", "seq", "vocab", "experts", "top_k", "moe_every", "params_total",
    "params_active", "global_batch_tokens", "tp", "pp", "dp", "ep", "zero", "offload", "micro_batch", "recompute",
    "precision", "model",
)  # fmt: skip


class Inexpressible(Exception):
    """A row that lacks what a prediction needs, or asks for what the planner has no model of; says which."""


@dataclass(frozen=True)
class Kind:
    """A published device and the nodes that it is commonly found in. Bytes, bytes a second, FLOP/s, watts."""

    memory: float
    bandwidth: float
    half: float
    link: float
    watts: float
    each: int  # devices of a node
    network: float  # of a node
    host_link: float
    host_memory: float
    disk: float = 28e12
    disk_rate: float = 28e9
    fp8: float = 0.0
    node_factor: float = 1.25  # a node's draw over its devices' rated power: 1.22 to 1.28 measured on H100


GIB = 2.0**30
# Data sheets; NICs of DGX-2, Azure NDm A100 v4, DGX H100, DGX B200 and NVL72 (facts that each row's notes repeat).
KINDS = {
    "V100": Kind(32 * GIB, 0.9e12, 125e12, 150e9, 300, 16, 100e9, 4e9, 1.5e12, node_factor=1.1),
    "A100-80GB": Kind(80 * GIB, 2.0e12, 312e12, 300e9, 400, 8, 200e9, 31e9, 1.7e12),
    "A100": Kind(40 * GIB, 1.56e12, 312e12, 300e9, 400, 8, 200e9, 31e9, 1.0e12),
    "H100-96GB": Kind(96 * GIB, 2.4e12, 836e12, 450e9, 500, 8, 400e9, 63e9, 2e12, fp8=1979e12),
    "H100": Kind(80 * GIB, 3.35e12, 989e12, 450e9, 700, 8, 400e9, 63e9, 2e12, fp8=1979e12),
    "H800": Kind(80 * GIB, 3.35e12, 989e12, 200e9, 700, 8, 400e9, 63e9, 2e12, fp8=1979e12),
    "H200": Kind(141e9, 4.8e12, 989e12, 450e9, 700, 8, 400e9, 63e9, 2e12, fp8=1979e12),
    "GB200": Kind(186e9, 8e12, 2500e12, 900e9, 1200, 72, 72 * 50e9, 63e9, 17e12, fp8=5000e12),
    "B200": Kind(180e9, 8e12, 2250e12, 900e9, 1000, 8, 400e9, 63e9, 2e12, fp8=4500e12),
}


OMNI_PATH = 12.5e9  # bytes a second of one link


def family(row: Row) -> str:
    """The name of a row's device without its sizes: a key of `KINDS`. Raises Inexpressible."""
    found = re.search(r"G?[ABHV]\d00", row["gpu"].upper())
    if not found or found[0] not in KINDS:
        raise Inexpressible(f"the device {row['gpu'] or '(none)'} is not known")
    return found[0]


def _kind(row: Row) -> Kind:
    """A row's device with the memory that its name states. Raises Inexpressible."""
    plain, stated = KINDS[family(row)], re.search(r"(\d+) ?GB\b", row["gpu"].upper())
    if not stated or int(stated[1]) in (round(plain.memory / GIB), round(plain.memory / 1e9)):
        return plain
    return KINDS.get(f"{family(row)}-{stated[1]}GB") or replace(plain, memory=int(stated[1]) * GIB)


def machine(row: Row) -> Hardware:
    """The devices of a row in their usual nodes. Raises Inexpressible."""
    kind = _kind(row)
    devices = int(number(row, "gpus") or kind.each)
    each = min(int(_noted(row, r"\b(\d+) [A-Z]+\d[\w-]*/node") or kind.each), devices)
    network = _noted(row, r"\b(\d+) Omni-Path/node")
    network = network * OMNI_PATH if network else kind.network * each / kind.each
    peaks = {"bf16": kind.half, "fp16": kind.half} | ({"fp8": kind.fp8, "mxfp8": kind.fp8} if kind.fp8 else {})
    return Hardware(
        row["gpu"], devices, each, kind.memory, kind.bandwidth, peaks, kind.link, network,
        kind.host_link, kind.host_link * each, kind.host_memory, 200e9, kind.disk,
        kind.disk_rate, kind.disk_rate, kind.watts, kind.watts * each * kind.node_factor,
    )  # fmt: skip


def job(row: Row) -> Job:
    """A row's job. Raises Inexpressible."""
    return Job(shape(row), layout(row))


def shape(row: Row) -> Shape:
    """The matrices that a row's sizes and totals describe."""
    layers, hidden, ffn, seq = (number(row, name) for name in ("layers", "hidden", "ffn", "seq"))
    if not (layers and hidden and ffn and seq):
        raise Inexpressible(f"of its shape, {_missing(row, ('layers', 'hidden', 'ffn', 'seq'))} is not stated")
    if number(row, "experts") and (lacking := _missing(row, ("top_k", "params_total"))):
        raise Inexpressible(f"of its experts, {lacking} is not stated")
    total, active = number(row, "params_total") or 0.0, number(row, "params_active") or 0.0
    experts, rows = number(row, "experts") or 0.0, number(row, "top_k") or 0.0
    vocab = number(row, "vocab") or max(DEFAULT_VOCAB, _left_for_vocab(total, layers, hidden, ffn))
    embedding = vocab * hidden
    plain = Shape(
        int(layers), int(hidden), int(ffn), int(number(row, "heads") or hidden / 128), int(seq), int(vocab), common=0.0,
        outside=embedding, head=embedding, fused_attention=_hopper(row),
    )  # fmt: skip
    if not experts:
        classic = 4 * hidden**2 + 2 * hidden * ffn
        common = classic if ffn == 4 * hidden or not total else (total - 2 * embedding) / layers
        if common <= 0:
            raise Inexpressible("the parameters are fewer than those of the vocabulary")
        return replace(plain, common=common, outside=embedding * (2 if ffn != 4 * hidden else 1))
    moe_layers = layers // (number(row, "moe_every") or 1)
    matrices = min((2, 3), key=lambda n: abs(moe_layers * experts * n * hidden * ffn - total))  # gated have three
    expert = matrices * hidden * ffn
    common = (active - 2 * embedding - moe_layers * rows * expert) / layers if active else 4 * hidden**2
    if common <= 0:
        raise Inexpressible("the active parameters are fewer than those of the experts used")
    all_experts = total - 2 * embedding - layers * common  # the stated total also tells of layers without experts
    if all_experts <= 0:
        raise Inexpressible("the parameters are fewer than those outside of experts")
    each = all_experts / (moe_layers * experts)
    return replace(
        plain, common=common, outside=2 * embedding, experts=int(experts), expert=each, expert_layers=int(moe_layers),
        rows=rows * expert / each,
    )  # fmt: skip


def _missing(row: Row, names: tuple[str, ...]) -> str:
    return ", ".join(name for name in names if not number(row, name))


def _left_for_vocab(total: float, layers: float, hidden: float, ffn: float) -> float:
    """Entries of a vocabulary that the stated total leaves room for beside the layers of a plain transformer."""
    left = total - layers * (4 * hidden**2 + 2 * hidden * ffn)
    return left / hidden if 0 < left < 0.1 * total else 0


DEFAULT_VOCAB = 50257  # GPT-2's, for rows that state none


def layout(row: Row) -> Layout:
    """Raises Inexpressible."""
    devices = number(row, "gpus")
    tp, pp = int(number(row, "tp") or 1), int(number(row, "pp") or 1)
    if not devices or not (row["dp"] or row["pp"]):
        raise Inexpressible("the parallelism is not stated")
    dp = int(number(row, "dp") or devices // (tp * pp))
    if tp * pp * dp != devices:
        raise Inexpressible(f"tp x pp x dp is {tp * pp * dp}, of {devices:g} devices")
    ep = int(number(row, "ep") or 1)
    if ep > devices // pp:
        raise Inexpressible(f"ep is {ep}, of {devices // pp:g} devices of a stage")
    offload = row["offload"] or "none"
    micro, micros = _batch(row, dp, pp)
    zero = int(number(row, "zero") or 0)
    return Layout(
        int(devices), tp, pp, dp, ep, zero, _chunks(row, pp, zero),
        (number(row, "layers") or 0) % pp != 0, micro, micros, _recompute(row),
        (_hopper(row) and tp > 1) or _said_recompute(row) == "seqsel", overlapped=_hopper(row),
        experts_overlapped="1F1B overlap" in row["notes"],
        routed_once=_hopper(row) and "alltoall" not in row["notes"].lower(),
        scattered_sends=not _deepspeed(row, zero), einsum_dispatch=not _hopper(row),
        precision=_precision(row),
        optimizer=Shares.all_on(_tier(offload)),
        parameters=Shares.all_on(_tier(offload) if "param" in offload or offload == "nvme" else "device"),
        activations=Shares.all_on("cpu" if "act" in offload or "nvme" in offload else "device"),
    )  # fmt: skip


def _tier(offload: str) -> str:
    return "nvme" if "nvme" in offload else "cpu" if "cpu" in offload else "device"


# As rows name them; how fast devices multiply in others is not fitted.
ROW_PRECISIONS = ("", "bf16", "fp16", "fp8", "mxfp8")


def _precision(row: Row) -> str:
    if row["precision"] not in ROW_PRECISIONS:
        raise Inexpressible(f"precision={row['precision']}: no rate was fitted")
    fp8 = "FP8" in row["notes"] or (row["model"] in MLPERF_TOKENS and _hopper(row))
    return "fp8" if fp8 or "fp8" in row["precision"] else "bf16"


def _batch(row: Row, dp: int, pp: int) -> tuple[int, int]:
    """Rows of a micro-batch, and micro-batches."""
    seq, tokens = number(row, "seq"), number(row, "global_batch_tokens")
    if not seq:
        raise Inexpressible("the length of a row is not stated")
    micro = number(row, "micro_batch") or _noted(row, r"mbs(?:/GPU)?=(\d+)")
    if not tokens:
        return int(micro or (4 if pp == 1 else 1)), MICRO_BATCHES_A_STAGE * pp
    rows = max(1, round(tokens / seq / dp))
    noted = _noted(row, r"(\d+) microbatches")
    if not micro:
        micro = rows / noted if noted else 1 if pp > 1 else rows
    micro = max(1, int(micro))
    return micro, max(1, round(rows / micro))


MICRO_BATCHES_A_STAGE = 8  # where the batch is not stated: enough for a small bubble


def _recompute(row: Row) -> Recompute:
    said = _said_recompute(row)
    if said == "seqsel":
        return "selective"
    if said in get_args(Recompute):
        return said  # type: ignore[return-value]
    return "none" if _hopper(row) else "full"  # Megatron's and DeepSpeed's scripts recomputed all layers before


def _said_recompute(row: Row) -> str:
    """Of the column, or as noted; `seqsel` is sequence parallelism with selective recomputation."""
    return row["recompute"] or (re.search(r"recompute=(\w+)", row["notes"]) or [""])[0].partition("=")[2]


def _chunks(row: Row, pp: int, zero: int) -> int:
    """Of an interleaved pipeline: `vp N`, or what Megatron's authors used where layers divide so: three
    (arXiv 2205.05198, table 3), later as many as there are layers, up to 8.
    """
    if noted := _noted(row, r"\bvp ?(\d+)"):
        return int(noted)
    layers = number(row, "layers") or 0
    if pp == 1 or _deepspeed(row, zero) or layers % pp:
        return 1
    usual = range(8, 0, -1) if _hopper(row) else (3, 1)
    return next(chunks for chunks in usual if layers % (chunks * pp) == 0)


def _deepspeed(row: Row, zero: int) -> bool:
    """Whether the job ran in DeepSpeed's pipeline, which neither interleaves nor scatters what it sends."""
    return zero > 0 and not _hopper(row)


def _hopper(row: Row) -> bool:
    """Whether the device is of the time of fused attention. Raises Inexpressible."""
    return family(row) not in ("V100", "A100")


def _noted(row: Row, pattern: str) -> float | None:
    found = re.search(pattern, row["notes"])
    return float(found[1]) if found else None


def number(row: Row, name: str) -> float | None:
    """What a column holds, from 0; None if it is empty. Raises Inexpressible."""
    try:
        value = float(row[name]) if row[name] else None
    except ValueError:
        raise Inexpressible(f"{name}={row[name]!r} is no number") from None
    if value is not None and not 0 <= value < math.inf:
        raise Inexpressible(f"{name}={row[name]} is impossible")
    return value


# MLPerf Training's GPT-3 at batches of 2,048 rows: until its target loss (training_results_v4.0).
MLPERF_TOKENS = {"GPT-3 175B (MLPerf)": 1.208e9}  # and in fp8, where devices have it


def check_batch(row: Row) -> None:
    """Raises Inexpressible where a step has no stated length."""
    if not number(row, "global_batch_tokens"):
        raise Inexpressible("the batch of a step is not stated")


def trained_tokens(row: Row) -> float:
    """Of the whole training: as noted (`14.8T tokens`, `tokens 3e+11`), or by the rules of the benchmark."""
    if row["model"] in MLPERF_TOKENS:
        return MLPERF_TOKENS[row["model"]]
    if found := re.search(r"([\d.]+) ?([TBM]) tokens", row["notes"]):
        return float(found[1]) * {"T": 1e12, "B": 1e9, "M": 1e6}[found[2]]
    if noted := _noted(row, r"tokens ([\d.]+e[+]?\d+)"):
        return noted
    raise Inexpressible("the tokens of the whole training are not stated")


# Bytes a parameter of mixed-precision Adam as DeepSpeed keeps them: 16-bit weights, and gradients, masters and moments.
WEIGHTS, STATES = 2, 20
HEADROOM = 1.5  # of host and NVMe, for buffers and files: DeepSpeed's own estimator (additional_buffer_factor)
# Beside the states, on a device: two buckets of gradients of DeepSpeed's default size in 16 bits, and one row of 1,024
# positions through a model of about the size that fits, recomputed.
CAPACITY_WORKING = 2 * 5e8 * 2 + 1.4e9


def capacity(row: Row, context: float, fragmented: float) -> float:
    """Parameters that a machine trains at the most, by ZeRO stage and tier (ZeRO-Infinity, arXiv 2104.07857, table 2).

    The scarcest tier decides. Raises Inexpressible for what is no ZeRO stage.
    """
    cluster, stage, offload = machine(row), number(row, "zero"), row["offload"] or "none"
    if stage not in (0, 1, 2, 3):
        raise Inexpressible("the ZeRO stage is not stated")
    on_device = (cluster.device_bytes - context) / (1 + fragmented) - CAPACITY_WORKING
    tier, devices = _tier(offload), cluster.devices
    if tier == "device":
        shared = {0: 0, 1: 12, 2: 18, 3: 20}[int(stage)]  # of 20 bytes
        return on_device / (STATES - shared + shared / devices)
    if stage < 3:  # weights are whole on each device
        return min(on_device / WEIGHTS, _room(cluster, tier) / (STATES - WEIGHTS))
    if "param" in offload or tier == "nvme":
        return _room(cluster, tier) / (STATES - WEIGHTS) / HEADROOM
    return min(on_device * devices / WEIGHTS, _room(cluster, tier) / (STATES - WEIGHTS))


def _room(cluster: Hardware, tier: str) -> float:
    return cluster.nodes * (cluster.host_bytes if tier == "cpu" else cluster.disk_bytes)
