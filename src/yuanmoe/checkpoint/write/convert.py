"""Turn a checkpoint of any format into our layout or into the official one, without ever holding it.

Not here: the formats (`open.py`), writing and resuming (`writer.py`).
"""

from pathlib import Path
from typing import Literal, Unpack, get_args

import torch

from yuanmoe.checkpoint.formats.native_config import parse_dtype
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.checkpoint.write.save import save_native, save_official
from yuanmoe.checkpoint.write.writer import WriteOptions, Written
from yuanmoe.errors import UsageError
from yuanmoe.storage.folder import check_apart

Target = Literal["native", "official"]


def convert_checkpoint(
    src: Path | str,
    dst: Path | str,
    *,
    to: Target = "native",
    dtype: torch.dtype | str | None = None,
    rope_theta: float | None = None,
    ignore_unknown: bool = False,
    **options: Unpack[WriteOptions],
) -> Written:
    """Write the checkpoint in `src` to `dst`; run again after an interruption, it goes on where it was.

    `dtype` converts the weights, `rope_theta` corrects the base that the official files do not carry (spec 1.5).
    Raises what `open_checkpoint` and `writer.write_checkpoint` raise, and UsageError where `dst` holds `src`.
    """
    if to not in get_args(Target):
        raise UsageError(f"cannot convert to {to!r}; known: {', '.join(get_args(Target))}")
    check_apart(src, dst)
    source = open_checkpoint(src, ignore_unknown=ignore_unknown)
    dtype = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    config = source.config if rope_theta is None else source.config.replace(rope_theta=rope_theta)
    save = save_native if to == "native" else save_official
    return save(source, config, dst, dtype=dtype, **options)
