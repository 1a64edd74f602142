"""Marks that several tests share."""

import pytest

from training.machine import has_libaio

NVME = pytest.mark.skipif(not has_libaio(), reason="libaio's headers are not installed: no NVMe offload")
