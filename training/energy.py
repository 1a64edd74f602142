"""Energy: what the machine's own counters say was used, and rates over windows that are long enough to tell.

A modelled figure is said to be one, and what is not known is None: never a silent zero.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# GPUs refresh their counters each 20 to 100 ms (NVML's documentation): 1 % of ten seconds at the most.
WINDOW_SECONDS = 10.0
MODELLED, UNAVAILABLE = "modelled", "unavailable"
POWERCAP = Path("/sys/class/powercap")
RAPL_DOMAINS = (
    "package",
    "dram",
)  # psys holds both, core and uncore lie within a package: they would count twice


class Counter:
    """A hardware energy counter that only grows, but may wrap at `limit` joules or be reset to zero."""

    def __init__(self, read: Callable[[], float], limit: float = 0.0):
        self._read, self._limit = read, limit
        self._last = read()
        self._total = 0.0

    def joules(self) -> float:
        """Joules since construction; to be called more often than the counter wraps."""
        now = self._read()
        passed = now - self._last if now >= self._last else now + max(0.0, self._limit - self._last)
        self._last = now
        self._total += passed
        return self._total


class EnergyMeter:
    """Joules of this node since construction.

    `source` is "measured (nvml)": the GPUs that this process may see, each once; "measured (rapl)": processor packages
    and memory, from `powercap`; or UNAVAILABLE. Whole devices are counted, whoever uses them: one meter a node is
    enough.
    """

    def __init__(self, powercap: Path = POWERCAP):
        self.source, self._counters = "measured (nvml)", nvml_counters()
        if not self._counters:
            self.source, self._counters = "measured (rapl)", rapl_counters(powercap)
        if not self._counters:
            self.source = UNAVAILABLE

    def joules(self) -> float | None:
        """Joules since construction; None if nothing measures them, or no longer does."""
        try:
            return sum(counter.joules() for counter in self._counters) if self._counters else None
        except Exception:  # a driver that was unloaded, say, must not stop the training
            self.source, self._counters = UNAVAILABLE, []
            return None


class EnergyRates:
    """Watts, and joules a step and a token, of steps alone, over windows of at least WINDOW_SECONDS."""

    def __init__(self) -> None:
        self._clear()
        self._known: dict[str, float | None] = dict.fromkeys(
            ("energy/watts", "energy/joules_per_step", "energy/joules_per_token")
        )

    def step(self, joules: float | None, seconds: float, tokens: int) -> dict[str, float | None]:
        """The rates of the last whole window, after a step that took this much; None before the first."""
        if joules is None:  # a window with a gap tells nothing
            self._clear()
            return dict.fromkeys(self._known)
        self._joules += joules
        self._seconds += seconds
        self._tokens += tokens
        self._steps += 1
        if self._seconds >= WINDOW_SECONDS:
            of = (self._seconds, self._steps, max(self._tokens, 1))
            self._known = {key: self._joules / each for key, each in zip(self._known, of, strict=True)}
            self._clear()
        return self._known

    def _clear(self) -> None:
        self._joules = self._seconds = 0.0
        self._tokens = self._steps = 0


def nvml_counters() -> list[Counter]:
    """One counter a visible GPU (Volta and later); empty if the driver or a counter cannot be read."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [Counter(partial(_gpu_joules, pynvml, gpu)) for gpu in _visible_gpus(pynvml)]
    except Exception:  # no package, no driver, no GPU, or a GPU without a counter: each has its own class
        return []


def _gpu_joules(pynvml: Any, gpu: Any) -> float:
    return pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3  # it counts millijoules


def _visible_gpus(pynvml: Any) -> Iterator[Any]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = range(pynvml.nvmlDeviceGetCount()) if visible is None else dict.fromkeys(visible.split(","))
    for name in names:
        if str(name).strip().isdigit():
            yield pynvml.nvmlDeviceGetHandleByIndex(int(name))
        else:
            yield pynvml.nvmlDeviceGetHandleByUUID(str(name).strip())


def rapl_counters(powercap: Path) -> list[Counter]:
    """One counter a processor package and memory domain; empty if they are missing or not ours to read."""
    counters = []
    # intel-rapl-mmio, beside intel-rapl, shows the same packages again. AMD's are called intel-rapl as well.
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            if (zone / "name").read_text().strip().startswith(RAPL_DOMAINS):
                limit = int((zone / "max_energy_range_uj").read_text()) / 1e6
                counters.append(Counter(partial(_rapl_joules, zone / "energy_uj"), limit))
        except (OSError, ValueError):
            return []
    return counters


def _rapl_joules(counter: Path) -> float:
    return int(counter.read_text()) / 1e6  # it counts microjoules
