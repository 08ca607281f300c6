"""What would make training fit when no layout does: fewer wishes, more machines, shorter sequences, larger devices."""

import dataclasses
import math
from collections.abc import Iterator

from yuanmoe.errors import UsageError
from yuanmoe.plan.cluster.cluster import WIRES
from yuanmoe.plan.cluster.search import ClusterRequest, Plan
from yuanmoe.plan.device.devices import DEVICES
from yuanmoe.units import GIB

MOST_NODES = 64
"""Times as many nodes as asked for; more would be no remedy."""

SHORTEST_SEQUENCE = 256


def cluster_remedies(request: ClusterRequest, nearest: Plan) -> list[str]:
    """Options that, changed alone, let some layout fit; each as small a change as possible by doubling or halving."""
    kinds = (_fewer_wishes(request), _more_nodes(request), _shorter(request))
    found = (next((options for options, other in kind if _fits(other)), None) for kind in kinds)
    return [*(options for options in found if options is not None), *_larger_devices(request, nearest.peak_bytes)]


def _fewer_wishes(request: ClusterRequest) -> Iterator[tuple[str, ClusterRequest]]:
    if request.stages is not None:
        yield "without --stages", dataclasses.replace(request, stages=None)
    if request.words:
        yield "without --layout", dataclasses.replace(request, words=())
    if request.words and request.stages is not None:
        yield "without --layout and --stages", dataclasses.replace(request, words=(), stages=None)


def _more_nodes(request: ClusterRequest) -> Iterator[tuple[str, ClusterRequest]]:
    factor = 2
    while factor <= MOST_NODES:
        nodes = factor * request.cluster.nodes
        yield f"--nodes {nodes}", dataclasses.replace(request, cluster=request.cluster.with_nodes(nodes))
        factor *= 2


def _shorter(request: ClusterRequest) -> Iterator[tuple[str, ClusterRequest]]:
    length = request.training.sequence_length // 2
    while length >= SHORTEST_SEQUENCE:
        training = dataclasses.replace(request.training, sequence_length=length)
        yield f"--seq {length}", dataclasses.replace(request, training=training)
        length //= 2


def _larger_devices(request: ClusterRequest, needed_bytes: int) -> Iterator[str]:
    yield f"devices with {math.ceil(needed_bytes / GIB)} GiB"
    large_enough = [DEVICES[name] for name in WIRES if DEVICES[name].memory_bytes >= needed_bytes]
    if large_enough:
        smallest = min(large_enough, key=lambda device: device.memory_bytes)
        yield f"--cluster {request.cluster.devices_per_node}x{smallest.name}"


def _fits(request: ClusterRequest) -> bool:
    try:
        candidates = request.candidates()
    except UsageError:  # more devices may divide neither the batch nor a given layout
        return False
    return any(candidate.fits(request.stages) for candidate in sorted(candidates, key=lambda each: each.least_bytes()))
