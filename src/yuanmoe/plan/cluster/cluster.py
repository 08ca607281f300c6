"""Machines of several devices and how they talk, and a table of them with vendor numbers.

Every rate is bytes a second in one direction. Data ranks are neighbours: rank = stage x data + data rank, and nodes are
filled in that order. Not here: what a device computes (`devices.py`), what is sent (`parts.py`).
"""

import dataclasses
import math
import re
from dataclasses import dataclass

from yuanmoe.errors import UsageError
from yuanmoe.hints import did_you_mean
from yuanmoe.plan.device.devices import DEVICES, Device

LINK_SHARE = 0.85
NETWORK_SHARE = 195 / 200
"""What of its peak a wire carries inside a node and between nodes: as arXiv 2311.15786 reckons in its appendix D."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wires:
    """The connections between devices: peak rates in bytes a second."""

    link: float
    """Between two devices of a node."""
    card: float
    """One network card of a node."""
    shared: bool = False
    """Whether all devices of a node use one card, instead of one each."""
    link_source: str
    card_source: str


def _dgx(name: str, nvlink: float, infiniband: float) -> Wires:
    return Wires(
        link=nvlink / 2,  # told for both ways
        card=infiniband / 8,
        link_source=f"NVIDIA {name}: NVLink, {nvlink / 1e9:.0f} GB/s both ways",
        card_source=f"NVIDIA {name}: one of {infiniband / 1e9:.0f} Gb/s a GPU",
    )


def _pcie(generation: int, link: float) -> Wires:
    return Wires(
        link=link,
        card=12.5e9,
        shared=True,
        link_source=f"PCI Express {generation}.0 x16, no NVLink",
        card_source="100 Gb/s Ethernet for all GPUs of a node, assumed",
    )


WIRES = {
    "a100-80": _dgx("DGX A100", 600e9, 200e9),
    "h100-80": _dgx("DGX H100", 900e9, 400e9),
    "h200": _dgx("DGX H200", 900e9, 400e9),
    "l40s": _pcie(4, 32e9),
    "rtx-3090": _pcie(4, 32e9),
    "rtx-4090": _pcie(4, 32e9),
    "rtx-5090": _pcie(5, 64e9),
}
"""Of the GPUs that train in groups."""


def wires_of(device: Device) -> Wires:
    """The usual connections between devices of this kind."""
    return WIRES.get(device.name) or Wires(
        link=device.bandwidth / 2,
        card=1.25e9,
        shared=True,
        link_source="memory, which a copy reads and writes",
        card_source="10 Gb/s Ethernet, assumed",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A cluster of equal nodes, each with equal devices."""

    device: Device
    devices_per_node: int
    nodes: int
    wires: Wires
    matmul_share: float
    """Share of the device's matmul rate that a training step keeps up while it computes."""

    def __post_init__(self) -> None:
        for name in ("devices_per_node", "nodes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.matmul_share <= 1:
            raise UsageError(f"efficiency {self.matmul_share} is not a share above 0 and up to 1")

    @property
    def size(self) -> int:
        """Number of devices in the whole cluster."""
        return self.devices_per_node * self.nodes

    @property
    def flops_per_s(self) -> float:
        """FLOP/s that one device sustains in matrix products."""
        assert self.device.bf16_flops is not None, "parse_cluster knows no such device"
        return self.device.bf16_flops * self.matmul_share

    @property
    def link(self) -> float:
        """Bytes a second that a device sends to another device of its node."""
        return self.wires.link * LINK_SHARE

    def with_nodes(self, nodes: int) -> "Cluster":
        """This cluster with another number of nodes."""
        return dataclasses.replace(self, nodes=nodes)

    def neighbours(self, ranks: int) -> int:
        """How many of `ranks` consecutive devices surely share a node."""
        return math.gcd(ranks, self.devices_per_node)

    def ring(self, ranks: int, stride: int = 1) -> float:
        """What a device sends and gets in a ring over `ranks` devices, every stride-th, as others do at once."""
        span = ranks * stride
        if self.neighbours(span) == span:
            return self.link
        # A ring enters and leaves a node once, over the cards of all its devices there.
        inside = max(1, self.neighbours(span) // stride)
        return min(self.link, inside * self.network(self.devices_per_node))

    def network(self, senders: int) -> float:
        """What each of so many devices of a node sends to other nodes, all at once."""
        cards = 1 if self.wires.shared else self.devices_per_node
        return self.wires.card * NETWORK_SHARE * min(1, cards / senders)

    def all_to_all_s(self, sent: float, ranks: int) -> float:
        """Seconds in which each of `ranks` consecutive devices spreads `sent` bytes evenly over all of them."""
        inside = self.neighbours(ranks)
        near = sent * (inside - 1) / ranks / self.link
        far = sent * (ranks - inside) / ranks / self.network(self.devices_per_node)
        return max(near, far)  # over different wires at the same time

    def boundary(self, data: int, stages: int) -> float:
        """What a device sends to its counterpart in the next stage, over the slowest boundary."""
        if self.neighbours(data * stages) == data * stages:
            return self.link
        return min(self.link, self.network(min(data, self.devices_per_node)))


def parse_cluster(text: str) -> tuple[int, str]:
    """Devices of a node and the device's name in `8xh100-80` or `cpu`. Raises UsageError for an unknown name."""
    match = re.fullmatch(r"(?:(\d+)x)?(.+)", text.strip().lower())
    count, name = (int(match[1] or 1), match[2]) if match else (1, "")
    known = [*WIRES, *(device.name for device in DEVICES.values() if device.kind == "cpu"), "cpu"]
    if name not in known:
        hint = did_you_mean(name, known, otherwise=f"known: {', '.join(known)}")
        raise UsageError(f"unknown cluster {text!r}; write it like 8xh100-80 or cpu; {hint}")
    return count, name
