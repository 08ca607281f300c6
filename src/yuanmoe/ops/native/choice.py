"""Which variant of the kernels runs here, and why no faster one.

The CPU decides once a process; `YUANMOE_NATIVE` forces a variant (portable, avx2, avx512vnni) or `off`, which leaves
everything to torch. A missing library is no error: it is said once, when the first product has to do without.
"""

import functools
import os
import warnings
from pathlib import Path

from yuanmoe.errors import UsageError
from yuanmoe.ops.native.library import LIBRARY, VARIANTS, Kernels, open_library

SWITCH = "YUANMOE_NATIVE"


def available() -> bool:
    """Whether the compiled kernels are used here."""
    return isinstance(_find(), Kernels)


def variant() -> str:
    """`avx512vnni`, `avx2` or `portable`; `torch` where the library is not used."""
    found = _find()
    return found.variant if isinstance(found, Kernels) else "torch"


def reason() -> str:
    """Why products are slower here than they could be, with the way out; empty where they are not."""
    found = _find()
    if isinstance(found, str):
        return found
    if found.variant == "portable":
        return "this CPU has no AVX2 (or YUANMOE_NATIVE asks for portable), so the compiled kernels run in plain C++"
    return ""


def kernels(name: str, path: Path = LIBRARY) -> Kernels:
    """One variant of the library. Raises UsageError if this CPU, or this installation, does not have it."""
    if name not in VARIANTS:
        raise UsageError(f"{SWITCH} {name!r} names no kernels; it must be off, {', '.join(VARIANTS)}, or unset")
    try:
        library = open_library(path)
    except OSError as error:
        raise UsageError(load_failure(path, error)) from error
    if not library.yuanmoe_supports(VARIANTS.index(name)):
        raise UsageError(f"this CPU cannot run the {name} kernels; unset {SWITCH} to use the best that it can")
    return Kernels(library, name)


def chosen() -> Kernels | None:
    """The kernels to use; None, and a warning the first time, where there are none or only slow ones."""
    _warn_once()
    found = _find()
    return found if isinstance(found, Kernels) else None


def load_failure(path: Path, error: OSError) -> str:
    """What to tell a user whose library does not load."""
    if path.exists():
        return f"the compiled kernels {path.name} do not load ({error}); install yuanmoe again on this machine"
    return (
        f"the compiled kernels {path.name} were not built, most likely for want of a C++ compiler; "
        "install g++ and then yuanmoe again"
    )


@functools.cache
def _find() -> Kernels | str:
    """The kernels to use, or why there are none."""
    forced = os.environ.get(SWITCH, "")
    if forced == "off":
        return f"{SWITCH}=off keeps the compiled kernels out; unset it to use them"
    if forced:
        return kernels(forced)
    try:
        library = open_library()
    except OSError as error:
        return load_failure(LIBRARY, error)
    best = [name for index, name in enumerate(VARIANTS) if library.yuanmoe_supports(index)][-1]
    return Kernels(library, best)


@functools.cache
def _warn_once() -> None:
    if message := reason():
        warnings.warn(
            f"{message}. Products of quantized and bfloat16 weights are slow so.", RuntimeWarning, stacklevel=2
        )
