"""launch/setup.sh: repeats are quick, mistakes are one line. (CI runs it from nothing.)"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch import operators
from training.extensions import extension_root

ROOT = Path(__file__).resolve().parents[2]


def setup(cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    script = ROOT / "launch" / "setup.sh"
    return subprocess.run(
        ["bash", script], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_repeat_does_nothing_and_is_quick(tmp_path):
    assert (ROOT / ".venv" / "m6-setup").is_file(), "set up first: bash launch/setup.sh"
    begin = time.perf_counter()
    done = setup(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "installing" not in done.stdout and "building" not in done.stdout
    assert time.perf_counter() - begin < 10


def test_python_that_does_not_run_is_one_line(tmp_path):
    done = setup(tmp_path, M6_PYTHON="/nowhere/python")
    assert done.returncode == 1
    assert done.stderr == (
        "setup: /nowhere/python does not run: install Python 3.11 or newer, or name one with "
        "M6_PYTHON=/path/to/python\n"
    )


def test_old_python_is_one_line(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\ncase "$2" in *exit*) exit 1 ;; *) echo 3.9.1 ;; esac\n')
    old.chmod(0o755)
    done = setup(tmp_path, M6_PYTHON=str(old))
    assert done.returncode == 1
    assert "is Python 3.9.1, 3.11 or newer is needed" in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def other_operators(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / operators.CPU_ADAM.name
    folder.mkdir()
    (folder / "cpu_adam.so").touch()
    return folder


def test_operator_of_another_environment_does_not_count(other_operators):
    (other_operators / "build.ninja").write_text("-I/elsewhere/site-packages/deepspeed/ops/csrc/includes")
    assert not operators.is_built(operators.CPU_ADAM)


def test_operator_of_this_environment_counts(other_operators):
    import deepspeed

    sources = Path(deepspeed.__file__).parent
    (other_operators / "build.ninja").write_text(f"-I{sources}/ops/csrc/includes")
    assert operators.is_built(operators.CPU_ADAM)


def test_operators_are_looked_for_where_torch_builds_them():
    from torch.utils.cpp_extension import _get_build_directory

    assert extension_root() / "cpu_adam" == Path(_get_build_directory("cpu_adam", verbose=False))


def test_failed_build_names_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/compiler")
    log = tmp_path / "build.log"
    with pytest.raises(operators.UserError, match=f"building cpu_adam failed: .* in {log}"):
        operators.build(operators.CPU_ADAM, log)
    assert log.stat().st_size > 0


def test_a_stopped_build_leaves_no_compiler_and_no_lock(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from launch.operators import *; "
    program += f"build(CPU_ADAM, Path({str(tmp_path / 'log')!r}))"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    builder = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    family = wait_for_compiler(builder.pid)
    builder.send_signal(signal.SIGTERM)
    _, errors = builder.communicate(timeout=60)
    assert (builder.returncode, errors) == (128 + signal.SIGTERM, "setup: stopped\n")
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert not (tmp_path / "cpu_adam" / "lock").exists()


def wait_for_compiler(pid: int) -> list[psutil.Process]:
    """The process' whole family, once a compiler proper is in it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        family = psutil.Process(pid).children(recursive=True)
        if any(member.name() == "cc1plus" for member in family):
            return family
        time.sleep(0.1)
    raise TimeoutError("no compiler started")
