"""Sizes in bytes and rates as people write and read them: `24GiB`, `80 GB`, `400Gb/s`.

Binary units (KiB, MiB, GiB, TiB) are powers of 1024, decimal ones (KB, MB, GB, TB) of 1000.
"""

import re

from yuanmoe.errors import UsageError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_UNITS = {"b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_size(text: str) -> int:
    """Bytes in a size such as `24GiB`, `80GB` or `1.5 TiB`. Raises UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, re.IGNORECASE)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"size {text!r} is not a number with a unit; write it like 24GiB or 80GB")
    size = round(float(match[1]) * unit)
    if size < 1:
        raise UsageError(f"size {text!r} is nothing; give at least one byte")
    return size


def parse_rate(text: str) -> float:
    """Bytes a second in a rate such as `450GB/s`, or `400Gb/s` in bits. Raises UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)([bB])/s\s*", text)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"rate {text!r} is not a number with a unit; write it like 450GB/s, or 400Gb/s in bits")
    scale = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}[match[2].lower()]
    return float(match[1]) * scale / (8 if match[3] == "b" else 1)


def format_size(size: float) -> str:
    """A size in bytes as text: three significant digits and a binary unit, `23.0 GiB`; exact below one KiB."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= unit:
            value = size / unit
            return f"{value:.{_decimals(value)}f} {name}"
    return f"{size:.0f} B"


def format_count(count: float, unit: str = "") -> str:
    """A count or rate as text: three significant digits and a decimal prefix, such as 39.9 G, 7.41 GFLOP, 33.0 GB/s."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= factor:
            value = count / factor
            return f"{value:.{_decimals(value)}f} {prefix}{unit}"
    return f"{count:.{_decimals(count)}f} {unit}".rstrip()


def _decimals(value: float) -> int:
    return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
