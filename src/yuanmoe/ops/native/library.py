"""The compiled kernels behind `yuanmoe.ops.native`: the C interface of `csrc/api.cpp`, called through ctypes.

ctypes because the library then knows neither Python nor torch: one build serves every version of both, and tensors
cross as pointers. As many threads work as `torch.set_num_threads` says (`csrc/machine/threads.cpp`).
Not here: checks of what users pass, and the choice between kernels and torch (`__init__.py`).
Legend: N tokens, O outputs, I inputs, E experts, F expert width, D hidden, K chosen, B sequences, P slots of a page,
M pages of a sequence, H heads, C head channels.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from yuanmoe.errors import ResourceError, UsageError
from yuanmoe.ops.native import structures as c
from yuanmoe.ops.native.structures import DTYPES, STORED
from yuanmoe.ops.quantize.groupwise import PackedTensor

VARIANTS: Final = ("portable", "avx2", "avx512vnni")
"""In the order of `csrc/api.cpp`, and of speed."""
LIBRARY: Final = Path(__file__).with_name("libyuanmoe.so")

_SIGNATURES: Final = {
    "yuanmoe_supports": (c_int32, (c_int32,)),
    "yuanmoe_linear": (c_int32, (c.Call, POINTER(c.QuantizedMatrix), c_void_p, c_int64, c_void_p)),
    "yuanmoe_linear_whole": (c_int32, (c.Call, POINTER(c.WholeMatrix), c_void_p, c_int64, c_void_p)),
    "yuanmoe_mixture": (
        c_int32,
        (
            c.Call,
            POINTER(c.QuantizedMatrix),
            POINTER(c.QuantizedMatrix),
            POINTER(c.RoutingPointers),
            c_void_p,
            c_void_p,
        ),
    ),
    "yuanmoe_mixture_whole": (
        c_int32,
        (c.Call, POINTER(c.WholeMatrix), POINTER(c.WholeMatrix), POINTER(c.RoutingPointers), c_void_p, c_void_p),
    ),
    "yuanmoe_attention": (
        c_int32,
        (c.Call, POINTER(c.KeyValues), c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    ),
    "yuanmoe_store": (c_int32, (c.Call, POINTER(c.SlotPointers), c_void_p, c_void_p, c_int64, c_void_p)),
    "yuanmoe_rms_norm": (c_int32, (c.Call, c_void_p, c_void_p, c_int64, c_int64, c_float, c_void_p)),
    "yuanmoe_rotate": (c_int32, (c.Call, POINTER(c.Heads), c_void_p, c_void_p, c_void_p, c_void_p)),
    "yuanmoe_relate": (c_int32, (c.Call, c_void_p, c_int64, c_int64, c_void_p)),
    "yuanmoe_choose": (c_int32, (c.Call, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p)),
    "yuanmoe_swiglu": (c_int32, (c.Call, c_void_p, c_int64, c_int64, c_void_p)),
    "yuanmoe_layers": (c_int32, (c.Call, c_void_p, c_void_p, c_void_p, c_int64, POINTER(c.LayerPass), c_void_p)),
    "yuanmoe_multiply_adds": (c_int64, (c.Call, c_int64)),
    "yuanmoe_read": (c_uint64, (c.Call, c_void_p, c_int64)),
}


def open_library(path: Path = LIBRARY) -> ctypes.CDLL:
    """The library with its functions declared. Raises OSError where it is missing or cannot be loaded."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Kernels:
    """One variant of the library.

    Unchecked: tensors are contiguous, on the CPU and fit; tokens are float32 or bfloat16, routing weights float32,
    expert ids int64.
    """

    def __init__(self, library: ctypes.CDLL, variant: str) -> None:
        self.variant: Final = variant
        self._library: Final = library
        self._index: Final = VARIANTS.index(variant)
        self._seen: Final[WeakKeyDictionary[PackedTensor, c.QuantizedMatrix]] = WeakKeyDictionary()

    def linear(self, x: Tensor, weight: PackedTensor | Tensor) -> Tensor:
        """`x` [..., I] times a weight [O, I], quantized, bfloat16 or float32."""
        matrix = self._stack(weight)
        function = self._library.yuanmoe_linear_whole if isinstance(weight, Tensor) else self._library.yuanmoe_linear
        lead = x.shape[:-1]
        out = torch.empty((*lead, matrix.rows), dtype=x.dtype)
        _check(function(self._call(x), matrix, x.data_ptr(), lead.numel(), out.data_ptr()), matrix)
        return out

    def mixture(
        self,
        x: Tensor,
        gate_up: PackedTensor | Tensor,
        down: PackedTensor | Tensor,
        weights: Tensor,
        experts: Tensor,
    ) -> Tensor:
        """The weighted sum of the chosen experts of each token of `x` [N, D]; `weights` and `experts` are [N, K]."""
        first, second = self._stack(gate_up), self._stack(down)
        function = self._library.yuanmoe_mixture_whole if isinstance(down, Tensor) else self._library.yuanmoe_mixture
        routing = c.RoutingPointers(*weights.shape, experts.data_ptr(), weights.data_ptr())
        out = torch.empty_like(x)
        _check(function(self._call(x), first, second, routing, x.data_ptr(), out.data_ptr()), second)
        return out

    def attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        scales: tuple[Tensor, Tensor] | None,
        past: Sequence[int],
        counts: Sequence[int],
        pages: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of the new tokens `q` [N, H, C], `counts[b]` of each sequence, to `keys` and `values`
        [pages, H, P, C], of which `past[b]` were there before; int8 ones have `scales` [pages, H, P]. `pages` [B, M]
        int32 is whose pages they are; without it a sequence is a page."""
        addresses = [scale.data_ptr() for scale in scales] if scales else [None, None]
        table, width = (None, 1) if pages is None else (pages.data_ptr(), pages.shape[1])
        stored = STORED[keys.dtype]
        cache = c.KeyValues(keys.data_ptr(), values.data_ptr(), *addresses, table, stored, *keys.shape, width)
        lengths = (c_int64 * len(past))(*past), (c_int64 * len(past))(*counts)
        out = torch.empty_like(q)
        call = self._call(q)
        _check_pages(
            self._library.yuanmoe_attention(call, cache, *lengths, len(past), q.data_ptr(), out.data_ptr()), keys
        )
        return out

    def store(self, x: Tensor, slots: Tensor, scales: Tensor | None, pages: Tensor, places: Tensor) -> None:
        """Puts `x` [N, H, C] into `slots` [pages, H, P, C], at slot `places[n]` of page `pages[n]`; both are int64."""
        to = c.slots(slots, scales)
        call, indices = self._call(x), (pages.data_ptr(), places.data_ptr())
        _check_pages(self._library.yuanmoe_store(call, to, *indices, len(x), x.data_ptr()), slots)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """x / sqrt(mean(x^2) + epsilon) * weight for tokens `x` [..., D] and a `weight` [D] of one dtype."""
        out, width = torch.empty_like(x), x.shape[-1]
        tokens = x.numel() // width
        call, places = self._call(x), (x.data_ptr(), weight.data_ptr())
        _check_memory(self._library.yuanmoe_rms_norm(call, *places, tokens, width, epsilon, out.data_ptr()))
        return out

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """`x` [N, H, C] with channels i and i + half turned by the angle i of the tables [N, half]."""
        out, shape = torch.empty_like(x), c.Heads(*x.shape, cosines.shape[1])
        cosines, sines = cosines.contiguous(), sines.contiguous()
        tables = cosines.data_ptr(), sines.data_ptr()
        _check_memory(self._library.yuanmoe_rotate(self._call(x), shape, x.data_ptr(), *tables, out.data_ptr()))
        return out

    def relate(self, x: Tensor) -> Tensor:
        """The Attention Router's scores [N, E] of `x` [N, 3E]."""
        experts = x.shape[1] // 3
        out = torch.empty(len(x), experts)
        _check_memory(self._library.yuanmoe_relate(self._call(x), x.data_ptr(), len(x), experts, out.data_ptr()))
        return out

    def choose(self, logits: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
        """The `chosen` largest logits of each row of [N, E]: their softmax, and their ids."""
        weights, ids = torch.empty(len(logits), chosen), torch.empty(len(logits), chosen, dtype=torch.int64)
        call, places = self._call(logits), (weights.data_ptr(), ids.data_ptr())
        _check_memory(self._library.yuanmoe_choose(call, logits.data_ptr(), *logits.shape, chosen, *places))
        return weights, ids

    def swiglu(self, x: Tensor) -> Tensor:
        """silu(first half) * second half of the last dimension."""
        width = x.shape[-1] // 2
        out = torch.empty((*x.shape[:-1], width), dtype=x.dtype)
        tokens = out.numel() // max(width, 1)
        _check_memory(self._library.yuanmoe_swiglu(self._call(x), x.data_ptr(), tokens, width, out.data_ptr()))
        return out

    def layers(self, weights: Any, states: Any, routed: Any, part: slice, run: c.LayerPass, x: Tensor) -> None:
        """Takes tokens `x` [N, D] through a part of the layers, in place; the three are arrays of structures."""
        addresses = (ctypes.addressof(array[part.start]) for array in (weights, states, routed))
        count = part.stop - part.start
        status = self._library.yuanmoe_layers(self._call(x), *addresses, count, run, x.data_ptr())
        if status == 1:
            raise UsageError("a page or slot of the new tokens does not exist in what is stored")
        _check_memory(status)

    def multiply_adds(self, rounds: int) -> int:
        """Does 8-bit multiply-adds in registers on all threads, and says how many; the portable variant does none."""
        return self._library.yuanmoe_multiply_adds(self._call(None), rounds)

    def read(self, data: Tensor) -> None:
        """Reads every byte of `data` once, with all threads."""
        self._library.yuanmoe_read(self._call(None), data.data_ptr(), data.nbytes)

    def _stack(self, weight: PackedTensor | Tensor) -> c.QuantizedMatrix | c.WholeMatrix:
        """Equal matrices [..., O, I] as the library sees them; kept for packed ones, a token passes hundreds."""
        if isinstance(weight, Tensor):
            return c.whole_matrix(weight)
        found = self._seen.get(weight)
        if found is None:
            found = self._seen[weight] = c.quantized_matrix(weight)
        return found

    def _call(self, x: Tensor | None) -> c.Call:
        dtype = 0 if x is None else DTYPES[x.dtype]
        return c.Call(self._index, torch.get_num_threads(), dtype)


def _check_pages(status: int, stored: Tensor) -> None:
    if status == 1:
        raise UsageError(f"a page or slot is outside 0..{len(stored) - 1} x 0..{stored.shape[2] - 1}, what is stored")
    _check_memory(status)


def _check(status: int, matrix: c.QuantizedMatrix | c.WholeMatrix) -> None:
    if status == 1:
        raise UsageError(f"an expert id is outside 0..{matrix.matrices - 1}, the experts of these weights")
    _check_memory(status)


def _check_memory(status: int) -> None:
    if status == 2:
        raise ResourceError("no memory left for the activations; use fewer tokens at a time")
