"""What this machine offers: cores, memory, tools. Imports no torch."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Physical cores that this process may use: fewer than the machine has under affinity or a CPU quota."""
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    cores = min(physical, len(os.sched_getaffinity(0)))
    quota, _, period = _cgroup("cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def memory_bytes() -> int:
    """Memory that this process may use: a container's limit, else the machine's."""
    total = psutil.virtual_memory().total
    limit = _cgroup("memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def _cgroup(name: str) -> str:
    path = CGROUP / name
    return path.read_text().strip() if path.is_file() else ""


def cpu_flags() -> set[str]:
    """Instruction-set flags of the first processor (empty where /proc/cpuinfo names none)."""
    return set(cpu_field("flags").split())


def cpu_field(name: str) -> str:
    """What /proc/cpuinfo says of the first processor; "" if it does not."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        field, _, value = line.partition(":")
        if field.strip() == name:
            return value.strip()
    return ""


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for bf16 matrix products; without, they take a hundred times longer."""
    return bool(cpu_flags() & {"amx_bf16", "avx512_bf16"})


@functools.cache
def gpus_listed() -> bool:
    """Whether the NVIDIA driver lists a GPU."""
    if not shutil.which("nvidia-smi"):
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


@functools.cache
def has_libaio() -> bool:
    """Whether a program that uses libaio compiles and links."""
    if not shutil.which("g++"):
        return False
    compile_and_link = ["g++", "-x", "c++", "-include", "libaio.h", "-", "-laio", "-o", os.devnull]
    return subprocess.run(compile_and_link, input=b"int main() {}", capture_output=True).returncode == 0
