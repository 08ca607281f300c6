"""Files with a few wrong bytes either open as tensors within the file, or are refused by an error of ours."""

import io
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from checkpoint_writers import memory_folder
from yuanmoe.checkpoint.files.pickle_file import MEGATRON_NAMES, open_pickle, read_pickle
from yuanmoe.checkpoint.files.safetensors_file import open_safetensors
from yuanmoe.errors import CheckpointError

STATE = {"a.weight": torch.ones(4, 6), "b.weight": torch.ones(6, 4).T, "c.bias": torch.ones(3, dtype=torch.bfloat16)}


def pickled() -> bytes:
    out = io.BytesIO()
    torch.save(STATE, out)
    return out.getvalue()


PICKLED = pickled()
SAVED = save({name: tensor.contiguous() for name, tensor in STATE.items()})


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """A few bytes changed, or the file cut, or bytes put in."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(found) - 1))
        length = draw(st.integers(0, 4))
        found[at : at + length] = draw(st.binary(max_size=4))
    return bytes(found)


def opened(content: bytes, read) -> None:
    with memory_folder() as folder:
        path = Path(folder, "x.bin")
        path.write_bytes(content)
        refused, tensors = "", {}
        try:
            tensors = read(path)
        except CheckpointError as error:
            refused = str(error)
        assert "x.bin" in refused or not refused
        for tensor in tensors.values():
            assert tensor.read().shape == tensor.shape
            assert tensor.nbytes <= len(content)


@settings(max_examples=300)
@given(content=damaged(PICKLED))
def test_damaged_pickles(content):
    opened(content, lambda path: open_pickle(path).tensors)


@settings(max_examples=100)
@given(content=damaged(PICKLED))
def test_damaged_megatron_files(content):
    def read(path: Path) -> dict:
        _, found = read_pickle(path, inert=MEGATRON_NAMES)
        return {name: value for name, value in found.items() if hasattr(value, "read")} if type(found) is dict else {}

    opened(content, read)


@settings(max_examples=300)
@given(content=damaged(SAVED[:400]).map(lambda header: header + SAVED[400:]))
def test_damaged_safetensors(content):
    opened(content, lambda path: open_safetensors(path).tensors)
