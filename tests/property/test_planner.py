"""Whatever is asked of whatever device: advice that helps, no more of it than needed, and bounds that bind."""

import dataclasses
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from yuanmoe.plan.cost import PRECISIONS
from yuanmoe.plan.device import planner
from yuanmoe.plan.device.devices import DEVICES, Device
from yuanmoe.plan.device.planner import Workload
from yuanmoe.presets import preset
from yuanmoe.units import GIB

NEXT_BITS = {4: 8, 8: 16}

loads = st.builds(
    Workload,
    config=st.sampled_from(["yuan2-m32", "yuan2-2b", "yuan2-51b", "nano"]).map(preset),
    bits=st.sampled_from(sorted(PRECISIONS)),
    context=st.integers(1, 40_000),
    batch=st.integers(1, 64),
)
devices = st.builds(
    Device,
    name=st.just("some device"),
    kind=st.just("gpu"),
    memory_bytes=st.integers(1, 100 * GIB),
    bandwidth=st.floats(1e9, 1e13),
    bf16_flops=st.none() | st.floats(1e9, 1e15),
    source=st.just("drawn"),
)


def changed(load: Workload, options: str) -> tuple[Workload, str]:
    """The load under a remedy's options, and the option changed last."""
    changes = {name: int(value) for name, value in re.findall(r"--(\w+) (\d+)", options)}
    return dataclasses.replace(load, **changes), list(changes)[-1]


@settings(deadline=None, max_examples=50)
@given(loads, devices)
def test_remedies_help_and_are_no_larger_than_needed(load: Workload, device: Device) -> None:
    remedies = planner.device_remedies(load, device)
    assert not (remedies and planner.fits(load, device))
    for remedy in remedies:
        if remedy.options.startswith("--device"):
            assert planner.fits(load, DEVICES[remedy.options.removeprefix("--device ")])
            continue
        lighter, last = changed(load, remedy.options)
        value = getattr(lighter, last)
        heavier = dataclasses.replace(lighter, **{last: NEXT_BITS[value] if last == "bits" else value + 1})
        assert planner.fits(lighter, device)
        assert not planner.fits(heavier, device)
        assert remedy.total_bytes == planner.memory(lighter).total


@settings(deadline=None, max_examples=50)
@given(loads, devices)
def test_the_most_bits_that_fit(load: Workload, device: Device) -> None:
    bits = planner.highest_bits(load.config, device, context=load.context, batch=load.batch)
    fitting = [b for b in PRECISIONS if planner.fits(dataclasses.replace(load, bits=b), device)]
    assert bits == max(fitting, default=4)


@settings(deadline=None, max_examples=50)
@given(loads, devices)
def test_no_bound_beats_the_device(load: Workload, device: Device) -> None:
    speed = planner.decode_speed(load, device)
    passes_per_s = speed.bound / load.batch
    assert passes_per_s * speed.bytes_read <= device.bandwidth * (1 + 1e-9)
    slower = planner.decode_speed(load, dataclasses.replace(device, bandwidth=device.bandwidth / 2))
    assert slower.bound <= speed.bound
    assert slower.predicted < slower.bound
    assert planner.decode_speed(load, device, context=0).bound >= speed.bound
