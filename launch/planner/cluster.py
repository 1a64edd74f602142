"""Cluster files, `launch/clusters/*.yaml`: what a plan needs to know of a cluster, typed and checked."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from launch.planner.hardware import MULTIPLYING, OTHER_NETWORK, PRECISIONS, Family, Hardware
from training.errors import UserError
from training.recipe import Section, one_of, parse_settings, read_mapping

FOLDER = Path(__file__).resolve().parent.parent / "clusters"

# Bounds that no machine comes near, so that nothing overflows.
Amount = Annotated[float, Field(ge=1, le=1e21)]  # bytes, bytes a second, FLOP/s
Watts = Annotated[float, Field(gt=0, le=1e9)]
Count = Annotated[int, Field(ge=1, le=10**6)]


Precision = Annotated[str, one_of(PRECISIONS)]
Share = Annotated[float, Field(ge=1e-6, le=1e3)]


class Part(Section):
    """Of a cluster file: `true` is no number there, nor is text."""

    model_config = ConfigDict(strict=True)


class Reached(Part):
    """What `m6 doctor` found that small trainings on a CPU reach of its other numbers, as shares of them."""

    precision: Precision  # that they trained in
    products: Share
    passes: Share  # of a thread's copies, by what layers do besides products
    weights: Share  # of all memory's copies, by what reads weights and sums their gradients
    states: Share  # likewise, by the optimizer's step
    gathers: Share  # of the all-to-all's rate, by ZeRO's collectives
    layer_seconds: Annotated[float, Field(ge=0, le=60)]  # of a layer in one pass, whatever its size
    expert_seconds: Annotated[float, Field(ge=0, le=60)]  # likewise of an expert

    @property
    def family(self) -> Family:
        shares = self.products, self.passes, OTHER_NETWORK, "m6 doctor", self.states, self.weights, self.gathers
        return Family(*shares, self.layer_seconds, self.expert_seconds)


class Device(Part):
    """`cpu`: a device is a rank's share of its host, and what is on it counts as the host's memory."""

    kind: Literal["gpu", "cpu"] = "gpu"
    name: str
    memory_bytes: Amount
    memory_bytes_per_second: Amount
    peak_flops: dict[Precision, Amount]  # of dense products
    process_bytes: Amount | None = None  # of a rank beside all tensors; assumed if not known
    reached: Reached | None = None  # of a CPU; assumed if not known

    @model_validator(mode="after")
    def _multiplies(self) -> Device:
        if not self.peak_flops.keys() & {"fp16", "bf16", "fp32"}:
            raise ValueError("peak_flops: must have bf16, fp16 or fp32")
        if self.reached and self.kind == "gpu":
            raise ValueError("reached: is of a CPU alone; what GPUs reach is fitted to published runs")
        return self


class Links(Part):
    """Bytes a second in one direction."""

    inside_node: Amount  # a device
    between_nodes: Amount  # a node
    host_to_device: Amount  # a device
    host_to_devices: Amount | None = None  # a node, all devices at once; as many times a device's if not known


class Host(Part):
    memory_bytes: Amount
    memory_bytes_per_second: Amount


class Disks(Part):
    """A node's, all together. A rate that is not known is assumed from the size."""

    bytes: Annotated[float, Field(ge=0, le=1e21)]
    read_bytes_per_second: Amount | None = None
    write_bytes_per_second: Amount | None = None


class Power(Part):
    device_watts: Watts
    node_watts: Watts  # while training, host and devices
    switch_watts: Annotated[float, Field(ge=0, le=1e9)] = 0.0  # a node's share of the switches

    @model_validator(mode="after")
    def _covers_its_devices(self) -> Power:
        if self.node_watts < self.device_watts:
            raise ValueError(f"node_watts={self.node_watts:g}: is less than one device's {self.device_watts:g}")
        return self


class Price(Part):
    per_device_hour: Annotated[float, Field(ge=0, le=1e9)]
    currency: str
    date: int | str | datetime.date


class Failures(Part):
    """Default: Llama 3's 419 unexpected interruptions in 54 days of 16,384 H100 (arXiv 2407.21783, section 3.3.4)."""

    per_device_day: Annotated[float, Field(ge=0, le=1)] = 4.7e-4
    restart_seconds: Annotated[float, Field(gt=0, le=1e9)] = 600.0  # until training goes on; assumed


class Cluster(Part):
    nodes: Count
    devices_per_node: Count
    device: Device
    links: Links
    host: Host
    disks: Disks
    power: Power
    price: Price
    pue: Annotated[float, Field(ge=1, le=5)]
    grid_g_co2e_per_kwh: Annotated[float, Field(ge=0, le=2000)]
    failures: Failures = Failures()

    @model_validator(mode="after")
    def _powers_its_devices(self) -> Cluster:
        least = MULTIPLYING * self.devices_per_node * self.power.device_watts
        if self.power.node_watts < least:
            raise ValueError(
                f"power.node_watts={self.power.node_watts:g}: its {self.devices_per_node} devices alone draw {least:g} "
                f"while they compute, {MULTIPLYING:g} of device_watts each"
            )
        return self

    @property
    def gpus_per_node(self) -> int:
        return 0 if self.device.kind == "cpu" else self.devices_per_node

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def hardware(self) -> Hardware:
        device, links, disks = self.device, self.links, self.disks
        read = disks.read_bytes_per_second or DISK_RATE * max(1.0, disks.bytes / DISK_BYTES)
        return Hardware(
            device.name, self.devices, self.devices_per_node, device.memory_bytes, device.memory_bytes_per_second,
            device.peak_flops, links.inside_node, links.between_nodes, links.host_to_device,
            links.host_to_devices or links.host_to_device * self.devices_per_node, self.host.memory_bytes,
            self.host.memory_bytes_per_second, disks.bytes, read, disks.write_bytes_per_second or read / 2,
            self.power.device_watts, self.power.node_watts, self.power.switch_watts, device.kind == "cpu",
            device.process_bytes, device.reached.family if device.reached else None,
        )  # fmt: skip

    @property
    def assumed(self) -> list[str]:
        """What the file leaves open, and what the plan takes it to be."""
        found, hardware = [], self.hardware
        if self.links.host_to_devices is None:
            found.append("links.host_to_devices is unknown: taken as all devices' own rates together")
        if self.disks.read_bytes_per_second is None:
            found.append(f"disks.read_bytes_per_second is unknown: taken as {hardware.disk_read:.3g}")
        if self.disks.write_bytes_per_second is None:
            found.append(
                f"disks.write_bytes_per_second is unknown: taken as {hardware.disk_write:.3g}, half of reading"
            )
        if hardware.is_cpu and not hardware.reached:
            found.append("device.reached is unknown: taken as of another CPU; m6 doctor --write-cluster measures it")
        if not device_known(hardware):
            found.append(f"device {self.device.name}: of no fitted family, its shares of peak are guessed")
        return found


DISK_BYTES, DISK_RATE = 3.84e12, 6e9  # of one NVMe disk of PCIe's fourth generation, bytes a second read; assumed


def device_known(hardware: Hardware) -> bool:
    return bool(hardware.family.fitted_by)


def load_cluster(name: str) -> Cluster:
    """A cluster file, by its path or by its name in `launch/clusters`. Raises UserError."""
    path = Path(name)
    if not path.suffix and not path.is_file():
        path = FOLDER / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
            raise UserError(f"--cluster {name}: no such cluster; known: {known}, or give a file")
    values: dict[str, Any] = read_mapping(path)
    return parse_settings(Cluster, values, [], str(path))
