"""Rows of published measurements as jobs: the columns of `benchmarks/calibration.csv`, and nothing by name.

Configuration that the columns have no place for is read from `notes` where it stands there in plain terms
(`mbs=4`, `recompute=full`, `vp 4`, `14.8T tokens`). What a row leaves open is filled by the habits of its time, below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from launch.planner import literature
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
# Data sheets; NICs of DGX-2, Azure NDm A100 v4, DGX H100, B200, B300 and NVL72 (facts that each row's notes repeat).
KINDS = {
    "V100": Kind(32 * GIB, 0.9e12, 125e12, 150e9, 300, 16, 100e9, 4e9, 1.5e12, node_factor=1.1),
    "A100-80GB": Kind(80 * GIB, 2.0e12, 312e12, 300e9, 400, 8, 200e9, 31e9, 1.7e12),
    "A100": Kind(40 * GIB, 1.56e12, 312e12, 300e9, 400, 8, 200e9, 31e9, 1.0e12),
    "H100-96GB": Kind(96 * GIB, 2.4e12, 836e12, 450e9, 500, 8, 400e9, 63e9, 2e12, fp8=1673e12),
    "H100": Kind(80 * GIB, 3.35e12, 989e12, 450e9, 700, 8, 400e9, 63e9, 2e12, fp8=1979e12),
    "H800": Kind(80 * GIB, 3.35e12, 989e12, 200e9, 700, 8, 400e9, 63e9, 2e12, fp8=1979e12),
    "H200": Kind(141e9, 4.8e12, 989e12, 450e9, 700, 8, 400e9, 63e9, 2e12, fp8=1979e12),
    "GB200": Kind(186e9, 8e12, 2500e12, 900e9, 1200, 72, 72 * 50e9, 63e9, 17e12, fp8=5000e12),
    "GB300": Kind(279e9, 8e12, 2500e12, 900e9, 1400, 72, 72 * 100e9, 63e9, 17e12, fp8=5000e12),
    "B200": Kind(180e9, 8e12, 2250e12, 900e9, 1000, 8, 400e9, 63e9, 2e12, fp8=4500e12),
    "B300": Kind(268e9, 8e12, 2250e12, 900e9, 1100, 8, 800e9, 63e9, 2e12, fp8=4500e12),
}


OMNI_PATH = 12.5e9  # bytes a second of one link


def family(row: Row) -> str:
    """The name of a row's device without its sizes: a key of `KINDS`. Raises Inexpressible."""
    found = re.search(r"G?[ABHV]\d00", row["gpu"].upper())
    if not found or found[0] not in KINDS or "PCIE" in row["gpu"].upper():  # cards have other links
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
    is_rack = family(row).startswith("G")  # whose links reach beyond its nodes
    noted = None if is_rack else _noted(row, r"\b(\d+) [A-Z]+\d[\w-]*/node")
    each = min(int(noted or kind.each), devices)
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
    known = literature.architecture(row["model"])
    plain = Shape(
        int(layers), int(hidden), int(ffn), int(number(row, "heads") or hidden / 128), int(seq), int(vocab), common=0.0,
        outside=embedding, head=embedding, head_width=known.head_width, fused_attention=_hopper(row),
        targets=1.0 + known.further,
    )  # fmt: skip
    if not experts:
        classic = 4 * hidden**2 + 2 * hidden * ffn
        told = (total - 2 * embedding) / layers if total else classic
        if not 0.5 <= told / classic <= 2:  # as far as narrow keys and gates go
            raise Inexpressible(f"params_total={row['params_total']} contradicts layers, hidden and ffn")
        common = classic if ffn == 4 * hidden else told
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
        plain, common=common, outside=2 * embedding, experts=int(experts), expert=each,
        layers=plain.layers + known.further, expert_layers=int(moe_layers) + known.further, rows=rows * expert / each,
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
    cp = int(_noted(row, r"\bcp[= ]?(\d+)") or 1)
    dp = int(number(row, "dp") or devices // (tp * pp * cp))
    if cp > 1 and tp * pp * dp == devices and dp % cp == 0:  # counted with those that share rows
        dp //= cp
    if tp * pp * dp * cp != devices:
        product = "tp x pp x dp" + (" x cp" if cp > 1 else "")
        raise Inexpressible(f"{product} is {tp * pp * dp * cp}, of {devices:g} devices")
    ep = int(number(row, "ep") or 1)
    if ep > devices // pp:
        raise Inexpressible(f"ep is {ep}, of {devices // pp:g} devices of a stage")
    offload = row["offload"] or "none"
    micro, micros = _batch(row, dp, pp)
    zero = int(number(row, "zero") or 0)
    return Layout(
        int(devices), tp, pp, dp, cp, ep, zero, _chunks(row, pp, zero),
        _balanced(row, pp), micro, micros, _recompute(row),
        (_hopper(row) and tp > 1) or _said_recompute(row).startswith("seq"), overlapped=_hopper(row),
        # Megatron's scripts of 2021 take torch's DDP where there is no pipeline (run_table_1.sh).
        gradients_overlapped=pp == 1 and zero == 0,
        experts_overlapped=bool(re.search(EXPERTS_OVERLAP, row["notes"])),
        routed_once=_hopper(row) and not re.search(r"(?i)all-?to-?all|allgather", row["notes"]),
        scattered_sends=not _deepspeed(row, zero), einsum_dispatch=not _hopper(row),
        precision=_precision(row),
        optimizer=Shares.all_on(_tier(offload)),
        parameters=Shares.all_on(_tier(offload) if _weights_away(row, offload, zero) else "device"),
        activations=Shares.all_on("cpu" if "act" in offload or "nvme" in offload else "device"),
    )  # fmt: skip


EXPERTS_OVERLAP = r"(?i)(?<!no )(?<!without )\b(1f1b|a2a|ep|moe)[ -]([\w-]+ )?overlap|\bDualPipe"


def _tier(offload: str) -> str:
    return "nvme" if "nvme" in offload else "cpu" if "cpu" in offload else "device"


def _weights_away(row: Row, offload: str, zero: int) -> bool:
    """Whether the offload is of weights, too: where it says so, and where they would not fit the devices."""
    here = WEIGHTS * (number(row, "params_total") or 0) / (number(row, "gpus") or 1)
    return "param" in offload or offload == "nvme" or (zero >= 3 and here > _kind(row).memory)


# As rows name them, such as `mxfp8`, `fp8-cs`, `bf16+float8`; how fast devices multiply in others is not fitted.
EIGHT_BITS, SIXTEEN_BITS = r"(?i)(fp|float)8", r"(?i)bf16|fp16|bfloat16|float16|half|mixed"


def _precision(row: Row) -> str:
    """Of the column; where that is empty, as noted, or by the rules of the benchmark."""
    said = row["precision"]
    eight = re.search(EIGHT_BITS, said or row["notes"]) or (not said and row["model"] in MLPERF_TOKENS)
    if said and not eight and not re.search(SIXTEEN_BITS, said):
        raise Inexpressible(f"precision={said}: no rate was fitted")
    return "fp8" if eight and _hopper(row) else "bf16"


def _batch(row: Row, dp: int, pp: int) -> tuple[int, int]:
    """Rows of a micro-batch, and micro-batches."""
    seq, tokens = number(row, "seq"), number(row, "global_batch_tokens")
    if not seq:
        raise Inexpressible("the length of a row is not stated")
    micro = number(row, "micro_batch") or _noted(row, r"\bmbs(?:/GPU)?[= ](\d+)")
    if not tokens:
        return int(micro or (4 if pp == 1 else 1)), MICRO_BATCHES_A_STAGE * pp
    rows = max(1, round(tokens / seq / dp))
    noted = _noted(row, r"(\d+) micro-?batches")
    if not micro:
        micro = rows / noted if noted else 1 if pp > 1 else rows
    micro = max(1, int(micro))
    return micro, max(1, round(rows / micro))


MICRO_BATCHES_A_STAGE = 8  # where the batch is not stated: enough for a small bubble


def _recompute(row: Row) -> Recompute:
    said = _said_recompute(row)
    if not said:  # Megatron's and DeepSpeed's scripts recomputed all layers before
        return "none" if _hopper(row) else "full"
    if "full" in said:
        return "full"
    if any(part in said for part in SELECTED):
        return "alternate" if (number(row, "zero") or 0) >= 3 else "selective"
    if said in ("none", "no", "off", "0", "seqpar"):
        return "none"
    raise Inexpressible(f"recompute={said} is not known")


# Selective recomputation, and Megatron's modules of a layer that it may recompute (all of them small).
SELECTED = ("sel", "core_attn", "mla_up_proj", "mlp", "moe_act", "layernorm", "shared_experts")


def _said_recompute(row: Row) -> str:
    """Of the column, or as noted; with sequence parallelism it starts with `seq`, as in `seqsel`."""
    found = re.search(r"\brecompute=([\w+]+)", row["notes"])
    return (row["recompute"] or (found[1] if found else "")).lower()


def _chunks(row: Row, pp: int, zero: int) -> int:
    """Of an interleaved pipeline: `vp N`, or what Megatron's authors used where layers divide so: three (arXiv
    2205.05198, table 3), or two of several layers (arXiv 2104.04473, its run_table_1.sh), later as many as there are
    layers, up to 8. Before, it took more than two stages.
    """
    if noted := _noted(row, r"\bvpp?[= ]?(\d+)"):
        return int(noted)
    layers = number(row, "layers") or 0
    if pp <= (1 if _hopper(row) else 2) or _deepspeed(row, zero):
        return 1
    if _balanced(row, pp):
        layers += 2
    usual = range(8, 0, -1) if _hopper(row) else (3, 2) if layers / pp > 2 else ()
    return next((chunks for chunks in usual if layers % (chunks * pp) == 0), 1)


def _balanced(row: Row, pp: int) -> bool:
    """Whether embedding and head must stand for layers, as the layers do not share out evenly."""
    return (number(row, "layers") or 0) % pp != 0


def _deepspeed(row: Row, zero: int) -> bool:
    """Whether the job ran in DeepSpeed's pipeline, which neither interleaves nor scatters what it sends."""
    return zero > 0 and not _hopper(row)


def _hopper(row: Row) -> bool:
    """Whether the device is of the time of fused attention. Raises Inexpressible."""
    return family(row) not in ("V100", "A100")


def _noted(row: Row, pattern: str) -> float | None:
    found = re.search(pattern, row["notes"], re.IGNORECASE)
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


def counts_half(row: Row) -> bool:
    """Whether published FLOPs leave the masked half of the scores out: Megatron's since 2025, as rows of this source
    that state both FLOPs and tokens tell.
    """
    return bool(re.search(r"Megatron-(Bridge|MoE-ModelZoo)", row.get("source", "")))


def completed(row: Row) -> Row:
    """A row about a whole training, its empty columns filled from what its makers wrote of it."""
    known = literature.training(row["model"])
    notes = "; ".join(part for part in (row["notes"], known.get("notes", "")) if part)
    return {name: value or known.get(name, "") for name, value in row.items()} | {"notes": notes}


def trained_tokens(row: Row) -> float:
    """Of the whole training: as noted (`14.8T tokens`, `1.4 trillion tokens`, `tokens 3e+11`), or by the rules of the
    benchmark.
    """
    if row["model"] in MLPERF_TOKENS:
        return MLPERF_TOKENS[row["model"]]
    if found := re.search(r"(?i)([\d.]+) ?([TBM])(r?illion)?\+? tokens", row["notes"]):
        return float(found[1]) * {"T": 1e12, "B": 1e9, "M": 1e6}[found[2].upper()]
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
    parts = (number(row, "tp") or 1) * (number(row, "pp") or 1)  # that a model is cut into
    if stage is None and parts > 1:
        stage = 0
    if stage not in (0, 1, 2, 3):
        raise Inexpressible("the ZeRO stage is not stated")
    on_device = (cluster.device_bytes - context) / (1 + fragmented) - CAPACITY_WORKING
    tier, devices = _tier(offload), cluster.devices
    if tier == "device":
        shared = {0: 0, 1: 12, 2: 18, 3: 20}[int(stage)]  # of 20 bytes
        return parts * on_device / (STATES - shared + shared * parts / devices)
    room = cluster.nodes * (cluster.host_bytes if tier == "cpu" else cluster.disk_bytes) / (STATES - WEIGHTS) / HEADROOM
    if stage < 3:  # weights are whole on each device, or group of devices
        return min(parts * on_device / WEIGHTS, room)
    return room if "param" in offload or tier == "nvme" else min(devices * on_device / WEIGHTS, room)
