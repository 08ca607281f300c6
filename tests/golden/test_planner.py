"""M32 on known devices: what fits, how fast it can be, and what is said when it does not fit."""

import dataclasses

import pytest

from yuanmoe.errors import ResourceError, UsageError
from yuanmoe.plan.device import machine, planner
from yuanmoe.plan.device.devices import DEVICES, Device, find_device
from yuanmoe.plan.device.machine import Machine, Rate, as_device
from yuanmoe.plan.device.planner import Remedy, Workload
from yuanmoe.presets import preset
from yuanmoe.units import GIB, format_count, format_size, parse_size

M32 = preset("m32")
TWO_CORES = find_device("24GiB-2core")


def load(bits: int = 4, context: int = 4096, batch: int = 1) -> Workload:
    return Workload(config=M32, bits=bits, context=context, batch=batch)


def test_memory_of_m32_in_4_bits() -> None:
    assert planner.memory(load()) == planner.Memory(
        weights=21_465_837_568, kv_cache=4096 * 393_216, lfa_state=147_456, activations=252_198_400, runtime=GIB
    )


def test_m32_in_4_bits_fits_24_gib_and_not_16() -> None:
    assert planner.fits(load(), TWO_CORES)
    assert not planner.fits(load(bits=8), TWO_CORES)
    assert not planner.fits(load(), find_device("laptop-16"))
    assert planner.highest_bits(M32, TWO_CORES, context=4096) == 4
    assert planner.highest_bits(M32, find_device("h200"), context=4096) == 16
    assert planner.highest_bits(M32, find_device("laptop-16"), context=4096) == 4


def test_decode_is_bound_by_the_bytes_it_reads() -> None:
    speed = planner.decode_speed(load(), TWO_CORES, context=0)
    assert speed.bytes_read == 2_213_982_208 + 147_456
    assert speed.bound == pytest.approx(33e9 / speed.bytes_read)
    assert speed.limited_by == "bandwidth"
    assert 1 / speed.predicted == pytest.approx(1.25 / speed.bound + 24 * 0.5e-3)


def test_the_prediction_beside_a_measured_token() -> None:
    # docs/log.md: two layers without a head to speak of, 25.0 GB/s of read bandwidth, 30.9 ms (28.0 to 42.7).
    cores = dataclasses.replace(TWO_CORES, bandwidth=25e9)
    config = M32.replace(num_hidden_layers=2, vocab_size=1024, eod_token_id=0, sep_token_id=1, pad_token_id=2)
    speed = planner.decode_speed(Workload(config=config, bits=16, context=256), cores)
    assert 1e3 / speed.predicted == pytest.approx(30.9, rel=0.05)


def test_prefill_is_bound_by_flops() -> None:
    speed = planner.prefill_speed(load(context=512), TWO_CORES)
    assert speed is not None
    assert speed.limited_by == "compute"
    # 745 GOP/s of int8 over 7.4 - 0.55 GFLOP a token (the head works once) and the attention.
    assert speed.bound == pytest.approx(745e9 / (6.855e9 + 0.1e9), rel=0.01)


def test_prefill_is_unknown_without_a_matmul_rate() -> None:
    assert planner.prefill_speed(load(), find_device("mac-m4-pro-24")) is None


def test_a_batch_shares_what_it_reads() -> None:
    one, sixteen = (planner.decode_speed(load(batch=size), find_device("h100-80"), context=0).bound for size in (1, 16))
    assert one < sixteen < 16 * one


@pytest.mark.parametrize(
    ("asked", "device", "options"),
    [
        (load(), "rtx-4090", []),
        (load(bits=16), "l40s", ["--bits 8", "--device a100-80"]),
        (load(context=8192), "rtx-4090", ["--context 7573", "--device rtx-5090"]),
        (load(batch=4), "rtx-5090", []),
        (load(batch=8), "rtx-5090", ["--context 3675", "--batch 7", "--device mac-m4-pro-48"]),
        (
            load(bits=8, batch=3),
            "rtx-4090",
            ["--bits 4 --context 2523", "--bits 4 --batch 1", "--device mac-m4-pro-48"],
        ),
        (Workload(config=preset("102b"), bits=16, context=4096), "h200", ["--bits 8"]),
        (Workload(config=preset("102b"), bits=16, context=4096, batch=99), "laptop-16", []),
    ],
)
def test_remedies(asked: Workload, device: str, options: list[str]) -> None:
    assert [remedy.options for remedy in planner.device_remedies(asked, find_device(device))] == options


def test_a_remedy_says_what_it_takes() -> None:
    remedies = planner.device_remedies(load(bits=16), TWO_CORES)
    assert remedies[0] == Remedy(options="--bits 4", total_bytes=planner.memory(load()).total)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("context", 0, "context is 0; it must be at least 1"),
        ("batch", -1, "batch is -1; it must be at least 1"),
        ("bits", 3, "3 bits: weights are kept in 16, 8, 4 bits"),
    ],
)
def test_a_load_of_nothing_is_refused(field: str, value: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(load(), **{field: value})


def test_unknown_devices_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"unknown device 'rtx-490'; did you mean rtx-4090\?"):
        find_device("rtx-490")
    with pytest.raises(UsageError, match="unknown device 'abacus'; known devices: laptop-16, "):
        find_device("abacus")


def test_every_device_names_its_source() -> None:
    assert all(device.source and device.memory_bytes >= 16 * GIB for device in DEVICES.values())


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("1.5tib", 3 * 2**39), ("512 b", 512)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "24 GiBs", "-1GiB", "1e3 GB", ""])
def test_sizes_need_a_number_and_a_unit(text: str) -> None:
    with pytest.raises(UsageError, match="is not a number with a unit; write it like 24GiB or 80GB"):
        parse_size(text)


def test_a_size_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="size '0 GB' is nothing; give at least one byte"):
        parse_size("0 GB")


def test_numbers_for_people() -> None:
    assert [format_size(size) for size in (0, 1023, 1024, 24 * GIB, 1.5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "24.0 GiB",
        "1.50 TiB",
    ]
    assert [format_count(7_408_111_616, "FLOP"), format_count(14.9), format_count(2e15, "FLOP/s")] == [
        "7.41 GFLOP",
        "14.9",
        "2.00 PFLOP/s",
    ]


def a_machine(**changes: object) -> Machine:
    known = {
        "cpu": "some CPU",
        "cores": 2,
        "features": (),
        "memory_bytes": 24 * GIB,
        "available_bytes": None,
        "load": 0,
    }
    return Machine(**(known | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("features", "bf16", "quantized"),
    [
        ((), 1, 1),
        (("avx2", "fma"), 1, 2),
        (("avx2", "avx512_vnni"), 1, 4),
        (("avx512_vnni", "avx512_bf16"), 2, 4),
        (("avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"), 16, 32),
        (("asimd", "asimddp", "i8mm", "bf16"), 4, 8),
    ],
)
def test_cpu_units_raise_the_measured_rate(features: tuple[str, ...], bf16: int, quantized: int) -> None:
    rate = Rate(median=1e11, low=0.9e11, high=1.1e11)
    device = as_device(a_machine(features=features), rate, rate)
    assert (device.peak_flops(16), device.peak_flops(8), device.peak_flops(4)) == (
        bf16 * 1e11,
        quantized * 1e11,
        quantized * 1e11,
    )
    assert device.source == "measured on 2 cores of some CPU: bandwidth within 20%, matmul within 20%"


def test_rates_of_a_busy_machine_say_so() -> None:
    rate = Rate(median=1e11, low=1e11, high=1e11)
    assert as_device(a_machine(load=1.2), rate, rate).source.endswith(", while other programs were busy (load 1.2)")


def test_unknown_memory_must_be_said() -> None:
    rate = Rate(median=1e11, low=1e11, high=1e11)
    with pytest.raises(
        ResourceError, match=r"cannot read how much memory this machine has .*; say it with --ram 24GiB"
    ):
        as_device(a_machine(memory_bytes=None), rate, rate)
    assert as_device(a_machine(memory_bytes=None), rate, rate, 8 * GIB).memory_bytes == 8 * GIB


PROC = {
    "/proc/cpuinfo": "processor : 0\nmodel name : Xeon\nflags : fpu avx2 avx512_vnni amx_int8\n\nprocessor : 1\n",
    "/proc/meminfo": "MemTotal:  1048576 kB\nMemFree: 4 kB\nMemAvailable: 524288 kB\nHugePages_Total: 0\n",
}


@pytest.mark.parametrize("limit_file", ["memory.max", "memory/memory.limit_in_bytes"])
def test_this_machine_is_read_from_proc_and_the_container(monkeypatch: pytest.MonkeyPatch, limit_file: str) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: PROC.get(path, ""))
    found = machine.read_machine()
    assert (found.cpu, found.features) == ("Xeon", ("avx2", "avx512_vnni", "amx_int8"))
    assert (found.memory_bytes, found.available_bytes) == (GIB, GIB // 2)
    limits = {f"/sys/fs/cgroup/{limit_file}": "268435456\n"}
    monkeypatch.setattr(machine, "_read", lambda path: (PROC | limits).get(path, ""))
    assert machine.read_machine().memory_bytes == GIB // 4


def test_rates_are_medians_with_their_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 1.0, 4.0, 2.0])
    monkeypatch.setattr(machine, "_seconds", lambda action: next(seconds))
    calls = []
    rate = machine.measure_rate(lambda: calls.append(1), work=8, rounds=3)
    assert rate == Rate(median=8 / 4.0, low=8 / 9.0, high=8.0)
    assert rate.spread == pytest.approx((8 - 8 / 9) / 2)


def test_measured_bandwidth_and_matmul_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_buffer_bytes", lambda machine: (1 << 20) + 1)
    for rate in (machine.measure_bandwidth(rounds=2), machine.measure_matmul(rounds=2, size=64)):
        assert 0 < rate.low <= rate.median <= rate.high


def test_buffers_are_larger_than_the_caches_and_leave_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_last_level_bytes", lambda: GIB)
    assert machine._buffer_bytes(a_machine()) == 4 * GIB
    assert machine._buffer_bytes(a_machine(available_bytes=GIB)) == GIB // 4
    monkeypatch.setattr(machine, "_last_level_bytes", lambda: 0)
    assert machine._buffer_bytes(a_machine()) == GIB // 4


def test_a_device_keeps_its_rates_with_other_memory() -> None:
    assert TWO_CORES.with_memory(GIB) == Device(
        name="24gib-2core",
        kind="cpu",
        memory_bytes=GIB,
        bandwidth=33e9,
        bf16_flops=372e9,
        quantized_flops=745e9,
        source=TWO_CORES.source,
    )
