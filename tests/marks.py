"""Marks that several tests share."""

import shutil

import pytest

from benchmarks.machines import lacking
from training.machine import has_libaio

NVME = pytest.mark.skipif(not has_libaio(), reason="libaio's headers are not installed: no NVMe offload")
MACHINES = pytest.mark.skipif(bool(lacking()), reason=f"no machines can be made: {lacking()}")
CHROMIUM = pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium: apt-get install chromium")
