"""What a job runs on: devices, nodes, links, and how much of each number on a data sheet is reached.

Three constants a family of GPUs are fitted, to the rows of `benchmarks/calibration.csv` that `m6 plan --validate`
lists; those of a CPU, to small trainings on that very machine (`launch/small_jobs.py`). All else here is published, or
said to be an assumption.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from training.errors import UserError

PRECISIONS = ("fp8", "bf16", "fp16", "fp32")
# Of its rated power, what a device draws when it waits for links and hosts, and when it multiplies. Assumed; a node's
# host share is what its measured draw leaves beside devices that multiply.
WAITING, MULTIPLYING = 0.4, 0.9

# Host links and host memory reach about as much of their peaks in large copies. Assumed.
HOST_SHARE = 0.8


# An NVLink collective's share of the link's peak. Chosen by hand with MLM20 in view; large ones
# reach 0.8.
LINK_SHARE = 0.65


@dataclass(frozen=True)
class Family:
    """The fitted constants: shares that are reached of the peaks on the data sheet.

    matmul: of the matrix units' peak, in large products; memory: of the device memory's bandwidth, over all that is
    read and written besides; network: of the links between nodes, in collectives; update: of host memory's bandwidth,
    in the optimizer's step; weights: likewise, where a CPU reads weights and sums their gradients; gathers: of the
    links inside a node, by ZeRO's collectives; layer_seconds: what the host takes for one layer in one pass, whatever
    its size, on a CPU beside all else, on a GPU while that computes; expert_seconds: likewise for an expert, on a CPU.
    """

    matmul: float
    memory: float
    network: float
    fitted_by: str  # groups of rows
    update: float = HOST_SHARE
    weights: float = HOST_SHARE
    gathers: float = LINK_SHARE
    layer_seconds: float = 0.5e-3  # assumed
    expert_seconds: float = 0.0


# What DeepEP's kernels reach of the links between nodes, where collectives reach the fitted share: its README reports
# 43 to 58 GB/s on links of 50.
ROUTED_SHARE = 0.9

OTHER_NETWORK = 0.4  # about the middle of the fitted ones
FAMILIES = {
    "V100": Family(0.63, 1.00, 0.42, "MLM20-V, ZINF, BSV"),
    "A100": Family(0.75, 0.57, 0.37, "MLM21, MLM20-A, KOR, AZ, BSA, DSMOE"),
    "H100": Family(0.55, 0.37, 0.42, "MCH100, MXTRL, Q235, BR-1, TT-2t, MLP-1, MLP-4, RUN-1"),
    "B200": Family(0.62, 0.23, 0.42, "BR-2, BR-3"),
    # Of rates that were measured, not of a data sheet; what `m6 doctor` expects of a CPU before it has tried it.
    "CPU": Family(0.9, 0.25, OTHER_NETWORK, "assumed", 0.5, 0.3, 0.8, 10e-3, 0.2e-3),
}
OTHER_FAMILY = Family(0.6, 0.6, OTHER_NETWORK, "")  # about the middle of the fitted ones


def family(device: str) -> Family:
    """The constants of a device by its name. H200 and H800 count as H100, GB200 and B300 as B200."""
    name = re.sub("H[28]00", "H100", device.upper()).replace("B300", "B200")
    return next((found for word, found in FAMILIES.items() if word in name), OTHER_FAMILY)


@dataclass(frozen=True)
class Hardware:
    """A cluster as the cost model sees it. Rates in bytes a second and one direction, powers in watts."""

    device: str
    devices: int
    devices_per_node: int
    device_bytes: float
    device_bandwidth: float
    peak_flops: Mapping[str, float]  # by precision, of dense products
    link: float  # a device's, inside its node
    network: float  # a node's, to other nodes
    host_link: float  # a device's, to the host
    host_links: float  # a node's, all devices copying at once
    host_bytes: float  # a node's
    host_bandwidth: float  # a node's memory
    disk_bytes: float  # a node's
    disk_read: float
    disk_write: float
    device_watts: float
    node_watts: float  # while training, host and devices
    switch_watts: float = 0.0  # a node's share of the switches
    is_cpu: bool = False  # a device is a rank's share of the host and of its memory
    process_bytes: float | None = None  # of a rank on its device beside all tensors, where it was measured
    reached: Family | None = None  # by this very machine, where it was measured

    @property
    def nodes(self) -> float:
        return self.devices / self.devices_per_node

    @property
    def busy_host_link(self) -> float:
        """A device's rate to the host while its neighbours copy too."""
        return min(self.host_link, self.host_links / self.devices_per_node)

    @property
    def weights_rate(self) -> float:
        """Bytes a second of weights and sums of gradients; a CPU rank goes through them with all its threads."""
        if self.is_cpu:
            return self.family.weights * self.host_bandwidth / self.devices_per_node
        return self.family.memory * self.device_bandwidth

    @property
    def states_rate(self) -> float:
        """Likewise of states on the device, in the optimizer's step."""
        if self.is_cpu:
            return self.family.update * self.host_bandwidth / self.devices_per_node
        return self.family.memory * self.device_bandwidth

    @property
    def host_share(self) -> float:
        """What large copies reach of the rates of host links, host memory and disks: all, where those were measured."""
        return 1.0 if self.is_cpu else HOST_SHARE

    @property
    def link_share(self) -> float:
        """What an all-to-all or an all-reduce reaches of the links inside a node."""
        return 1.0 if self.is_cpu else LINK_SHARE

    @property
    def family(self) -> Family:
        return self.reached or (FAMILIES["CPU"] if self.is_cpu else family(self.device))

    def peak(self, precision: str) -> float:
        """FLOP/s of a precision; of the next wider one where the device has none such. Raises UserError if none is."""
        wider = {"fp8": ("fp8", "bf16", "fp16"), "bf16": ("bf16", "fp16"), "fp16": ("fp16", "bf16")}
        for name in (*wider.get(precision, ()), "fp32"):
            if name in self.peak_flops:
                return self.peak_flops[name]
        key = f"device.peak_flops.{precision}"
        raise UserError(f"{key} is missing: the job computes in {precision}; say how fast that is")
