"""What a job runs on: devices, nodes, links, and how much of each number on a data sheet is reached.

Three constants a family of devices are fitted, to the rows of `benchmarks/calibration.csv` that `m6 plan --validate`
lists; all else here is published, or said to be an assumption.
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


@dataclass(frozen=True)
class Family:
    """The fitted constants: shares that are reached of the peaks on the data sheet.

    matmul: of the matrix units' peak, in large products; memory: of the device memory's bandwidth, over all that is
    read and written besides; network: of the links between nodes, in collectives; update: of host memory's bandwidth,
    in the optimizer's step, and on a CPU by all that goes through whole weights.
    """

    matmul: float
    memory: float
    network: float
    fitted_by: str  # groups of rows
    update: float = HOST_SHARE


# An NVLink collective's share of the link's peak. Chosen by hand with MLM20 in view; large ones
# reach 0.8.
LINK_SHARE = 0.65

# What DeepEP's kernels reach of the links between nodes, where collectives reach the fitted share: its README reports
# 43 to 58 GB/s on links of 50.
ROUTED_SHARE = 0.9

OTHER_NETWORK = 0.4  # about the middle of the fitted ones
FAMILIES = {
    "V100": Family(0.63, 1.00, 0.42, "MLM20-V, ZINF, BSV"),
    "A100": Family(0.75, 0.57, 0.37, "MLM21, MLM20-A, KOR, AZ, BSA, DSMOE"),
    "H100": Family(0.55, 0.37, 0.42, "MCH100, MXTRL, Q235, BR-1, TT-2t, MLP-1, MLP-4, RUN-1"),
    "B200": Family(0.62, 0.23, 0.42, "BR-2, BR-3"),
    # Of rates that were measured, not of a data sheet. Between machines nothing was fitted.
    "CPU": Family(0.70, 0.106, OTHER_NETWORK, "benchmarks/plan_here.md", 0.153),
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

    @property
    def nodes(self) -> float:
        return self.devices / self.devices_per_node

    @property
    def busy_host_link(self) -> float:
        """A device's rate to the host while its neighbours copy too."""
        return min(self.host_link, self.host_links / self.devices_per_node)

    @property
    def stream_rate(self) -> float:
        """Bytes a second of weights and states, in large pieces; a CPU rank goes through them with all its threads."""
        if self.is_cpu:
            return self.family.update * self.host_bandwidth / self.devices_per_node
        return self.family.memory * self.device_bandwidth

    @property
    def host_share(self) -> float:
        """What large copies reach of the rates of host links, host memory and disks: all, where those were measured."""
        return 1.0 if self.is_cpu else HOST_SHARE

    @property
    def family(self) -> Family:
        return family(self.device)

    def peak(self, precision: str) -> float:
        """FLOP/s of a precision; of the next wider one where the device has none such. Raises UserError if none is."""
        wider = {"fp8": ("fp8", "bf16", "fp16"), "bf16": ("bf16", "fp16"), "fp16": ("fp16", "bf16")}
        for name in (*wider.get(precision, ()), "fp32"):
            if name in self.peak_flops:
                return self.peak_flops[name]
        key = f"device.peak_flops.{precision}"
        raise UserError(f"{key} is missing: the job computes in {precision}; say how fast that is")
