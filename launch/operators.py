"""DeepSpeed's compiled operators: which ones this machine needs, which are built, and building them ahead.

DeepSpeed compiles an operator when a rank first asks for it. Ninja then decides whether files are fresh, by
their times and by the full compile commands; those name this environment's own headers, so operators that
were built for another environment are compiled again. Imports neither torch nor deepspeed until it compiles.
"""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.processes import forwarding
from training.errors import UserError
from training.extensions import extension_root, prepare_extensions
from training.machine import gpus_listed, has_libaio


@dataclass(frozen=True)
class Operator:
    name: str
    builder: str
    purpose: str
    minutes: str  # on two cores


CPU_ADAM = Operator("cpu_adam", "CPUAdamBuilder", "the optimizer on the CPU", "about a minute")
ASYNC_IO = Operator("async_io", "AsyncIOBuilder", "NVMe offload", "two to four minutes")

COMPILER_BYTES = 2 * 10**9  # that compiling one file may take, and more

# An exception, unlike the signal's own effect, makes PyTorch take its lock away.
BUILD = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
import deepspeed.ops.op_builder as operators
operators.{}().load(verbose=True)
"""


def torch_version() -> dict:
    """What torch/version.py says (`__version__`, `cuda`, …), not importing torch; empty if it is missing."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return {}
    return runpy.run_path(str(Path(spec.submodule_search_locations[0]) / "version.py"))


def on_gpu() -> bool:
    """Whether DeepSpeed will compile for a GPU: torch was built for one, and one is there."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return False
    return bool(torch_version().get("cuda")) and gpus_listed()


def needed_operators() -> list[Operator]:
    """On a GPU they serve offload only: what stays there is stepped by torch's own AdamW."""
    return [CPU_ADAM, ASYNC_IO] if has_libaio() else [CPU_ADAM]


def is_built(operator: Operator) -> bool:
    """Whether the operator was compiled by, and for, this very environment."""
    folder = extension_root() / operator.name
    if not (folder / f"{operator.name}.so").is_file() or not (folder / "build.ninja").is_file():
        return False
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent) in (folder / "build.ninja").read_text(encoding="utf-8")


def _jobs() -> dict[str, str]:
    """How many files ninja may compile at once: without memory for two it would take hours, or fail."""
    return {"MAX_JOBS": "1"} if psutil.virtual_memory().available < 2 * COMPILER_BYTES else {}


def build(operator: Operator, log: Path) -> None:
    """Compile one operator. Raises UserError that names the log of the compiler's messages.

    A signal that stops us ends all compilers, and then the program with the usual code.
    """
    environment = {
        **_jobs(),
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",  # ninja is beside Python
        "DS_ACCELERATOR": "cuda" if on_gpu() else "cpu",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", BUILD.format(operator.builder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        with forwarding(process, to_root=True) as received:
            code = process.wait()
    if received:
        print("setup: stopped", file=sys.stderr)
        sys.exit(128 + received[0])
    if code:
        raise UserError(f"building {operator.name} failed: the compiler's messages are in {log}")


def main() -> None:
    """Build what is needed and missing, one line each; the logs go beside the environment's Python."""
    if on_gpu() and not (shutil.which("nvcc") or os.environ.get("CUDA_HOME")):
        print("setup: nvcc is missing, so offload is off: install torch's CUDA toolkit, or set CUDA_HOME")
        return
    prepare_extensions()
    for operator in needed_operators():
        if is_built(operator):
            continue
        print(f"setup: building {operator.name} ({operator.purpose}; {operator.minutes}, once)", flush=True)
        try:
            build(operator, Path(sys.prefix) / f"build-{operator.name}.log")
        except UserError as error:
            if not on_gpu():
                sys.exit(f"setup: {error}")
            print(f"setup: {error}; offload is off until it builds")


if __name__ == "__main__":
    main()
