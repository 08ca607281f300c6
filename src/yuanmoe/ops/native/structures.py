"""The structures of `csrc/operations.h` and `csrc/layers.h` as ctypes declares them: keep the two in step.

They hold addresses only: whoever makes one keeps its tensors alive. Null, which is what `None` becomes, is what is not
there.
Legend: N tokens, O outputs, I inputs, P slots of a page, H heads, C head channels.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Final

import torch
from torch import Tensor

from yuanmoe.ops.quantize.groupwise import PackedTensor

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1}
"""Tokens that the kernels read and write as they are, and whole weights."""
STORED: Final = {**DTYPES, torch.int8: 2}
"""Keys and values likewise."""


class Call(ctypes.Structure):
    _fields_ = (("variant", c_int32), ("threads", c_int32), ("dtype", c_int32))


class QuantizedMatrix(ctypes.Structure):
    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("matrices", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("bits", c_int32),
        ("group", c_int32),
    )


class WholeMatrix(ctypes.Structure):
    _fields_ = (
        ("values", c_void_p),
        ("matrices", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("dtype", c_int32),
    )


class RoutingPointers(ctypes.Structure):
    _fields_ = (("tokens", c_int64), ("chosen", c_int64), ("experts", c_void_p), ("weights", c_void_p))


class KeyValues(ctypes.Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("table", c_void_p),
        ("stored", c_int32),
        ("pages", c_int64),
        ("heads", c_int64),
        ("slots", c_int64),
        ("channels", c_int64),
        ("table_width", c_int64),
    )


class SlotPointers(ctypes.Structure):
    _fields_ = (
        ("values", c_void_p),
        ("scales", c_void_p),
        ("stored", c_int32),
        ("pages", c_int64),
        ("heads", c_int64),
        ("slots", c_int64),
        ("channels", c_int64),
    )


class Heads(ctypes.Structure):
    _fields_ = (("tokens", c_int64), ("heads", c_int64), ("channels", c_int64), ("half", c_int64))


class Matrix(ctypes.Structure):
    _fields_ = (("packed", QuantizedMatrix), ("whole", WholeMatrix), ("bias", c_void_p))


class LayerWeights(ctypes.Structure):
    _fields_ = (
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("filter_norm", c_void_p),
        ("conv1", Matrix),
        ("conv2", Matrix),
        ("q", Matrix),
        ("k", Matrix),
        ("v", Matrix),
        ("o", Matrix),
        ("router", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("dense_gate_up", Matrix),
        ("dense_down", Matrix),
        ("relates", c_int32),
    )


class LayerState(ctypes.Structure):
    _fields_ = (("keys", SlotPointers), ("values", SlotPointers), ("tails", c_void_p * 2))


class Routed(ctypes.Structure):
    _fields_ = (("weights", c_void_p), ("experts", c_void_p), ("logits", c_void_p))


class LayerPass(ctypes.Structure):
    _fields_ = (
        ("tokens", c_int64),
        ("sequences", c_int64),
        ("width", c_int64),
        ("half", c_int64),
        ("chosen", c_int64),
        ("epsilon", c_float),
        ("past", c_void_p),
        ("counts", c_void_p),
        ("table", c_void_p),
        ("table_width", c_int64),
        ("pages", c_void_p),
        ("slots", c_void_p),
        ("tails", c_void_p),
        ("kept", c_void_p),
        ("kept_in", c_void_p),
        ("num_kept", c_int64),
        ("cosines", c_void_p),
        ("sines", c_void_p),
    )


def quantized_matrix(weight: PackedTensor) -> QuantizedMatrix:
    """Equal matrices [..., O, I] in few bits."""
    return QuantizedMatrix(
        weight.codes.data_ptr(),
        weight.scales.data_ptr(),
        weight.codes.shape[:-3].numel(),
        weight.out_features,
        weight.in_features,
        weight.bits,
        weight.group_size,
    )


def whole_matrix(weight: Tensor) -> WholeMatrix:
    """Equal matrices [..., O, I] in bfloat16 or float32."""
    shape = weight.shape
    return WholeMatrix(weight.data_ptr(), shape[:-2].numel(), shape[-2], shape[-1], DTYPES[weight.dtype])


def matrix(weight: PackedTensor | Tensor, bias: Tensor | None = None) -> Matrix:
    """Either of them, with a bias."""
    address = None if bias is None else bias.data_ptr()
    if isinstance(weight, Tensor):
        return Matrix(QuantizedMatrix(), whole_matrix(weight), address)
    return Matrix(quantized_matrix(weight), WholeMatrix(), address)


def slots(values: Tensor, scales: Tensor | None) -> SlotPointers:
    """Vectors [pages, H, P, C], and their scales where they are codes."""
    return SlotPointers(
        values.data_ptr(), None if scales is None else scales.data_ptr(), STORED[values.dtype], *values.shape
    )
