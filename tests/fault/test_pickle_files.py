"""Pickles that call, lie or break off: nothing of them is executed, and the error names the file."""

import argparse
import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from checkpoint_writers import (
    official_json,
    official_state,
    random_state,
    write_bin,
    write_megatron,
)
from small_models import small_config
from yuanmoe.checkpoint.files.pickle_file import open_pickle, read_pickle
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.errors import CheckpointError, UnsafePickleError

CONFIG = small_config(hidden_size=12, head_dim=12, intermediate_size=0, tie_word_embeddings=False)
NORM = "model.layers.1.input_layernorm.weight"


class Call:
    """Unpickles as a call of `function`."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def torch_zip(path: Path, pickled: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def pickled_tensor(shape: tuple, stride: tuple, offset: int = 0, count: int = 6, key: str = "0") -> bytes:
    """A state dict of one fp32 tensor `x` with these extents."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, key, "cpu", count) if obj == "the storage" else None

    out = io.BytesIO()
    rebuilt = Call(torch._utils._rebuild_tensor_v2, "the storage", offset, shape, stride, False, OrderedDict())
    Pickler(out, 2).dump({"x": rebuilt})
    return out.getvalue()


HOSTILE = {
    "a shell": (lambda marker: Call(__import__("os").system, f"touch {marker}"), r"posix\.system"),
    "eval": (lambda marker: Call(eval, f"open({marker!r}, 'w')"), r"builtin.*\.eval"),
    "open": (lambda marker: Call(open, marker, "w"), r"i?o?\.?open"),
    "getattr": (lambda marker: Call(getattr, OrderedDict, "__class__"), r"getattr"),
    "a module of torch": (lambda marker: Call(torch.load, marker), r"torch\.serialization\.load"),
    "settings": (lambda marker: argparse.Namespace(x=1), r"argparse\.Namespace"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_that_asks_for_more_than_tensors_is_refused_unexecuted(tmp_path, kind):
    marker = tmp_path / "was here"
    make, name = HOSTILE[kind]
    folder = write_bin(
        tmp_path / "m",
        official_json(CONFIG),
        official_state(CONFIG, random_state(CONFIG)) | {"evil": make(str(marker))},
    )
    with pytest.raises(UnsafePickleError, match=rf"pytorch_model\.bin asks for .*{name}.*nothing was executed"):
        open_checkpoint(folder)
    assert not marker.exists()


def test_a_megatron_file_may_name_settings_but_never_call_anything(tmp_path):
    config = CONFIG.replace(tie_word_embeddings=True, num_hidden_layers=2)
    marker = tmp_path / "was here"
    folder = write_megatron(
        tmp_path / "m", config, random_state(config), stages=1, evil=Call(__import__("os").system, f"touch {marker}")
    )
    with pytest.raises(UnsafePickleError, match=r"posix\.system"):
        open_checkpoint(folder)
    assert not marker.exists()


def test_inert_names_are_never_imported(tmp_path, monkeypatch):
    """A module of that name exists and would leave a trace when imported."""
    (tmp_path / "megatron.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    pickled = b"\x80\x02}X\x01\x00\x00\x00xcmegatron\nsystem\nX\x04\x00\x00\x00boom\x85Rs."
    _, content = read_pickle(torch_zip(tmp_path / "x.pt", pickled, {}), inert=("megatron",))
    assert content["x"].name == "megatron.system"
    assert content["x"].args == ("boom",)
    assert "megatron" not in sys.modules


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (pickled_tensor((2, 3), (3, 1)), None),
        (pickled_tensor((2, 4), (4, 1)), "in 6 elements"),
        (pickled_tensor((2, 3), (3, 1), offset=1), "in 6 elements"),
        (pickled_tensor((2, 3), (4, 1)), "in 6 elements"),
        (pickled_tensor((1000, 1000), (0, 0)), "in 6 elements"),
        (pickled_tensor((2**62, 2**62), (0, 0)), "in 6 elements"),
        (pickled_tensor((2, 3), (-3, 1), offset=3), "stride"),
        (pickled_tensor((2, 3), (3,)), "stride"),
        (pickled_tensor((2.0, 3), (3, 1)), "shape"),
        (pickled_tensor((2, 3), (3, 1), count=7), "24 bytes is to hold 7 x torch.float32"),
        (pickled_tensor((2, 3), (3, 1), key="1"), "lacks the bytes of storage 1"),
        (pickled_tensor((2, 3), (3, 1))[:-9], "damaged pickle"),
        # An ordered dictionary dressed as a storage beyond the file: {"x": rebuild(<offset 0, numel 10^9>, ...)}.
        (
            b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor\n(ccollections\nOrderedDict\n)R"
            b"}(X\x06\x00\x00\x00offsetK\x00X\x05\x00\x00\x00numelJ\x00\xca\x9a\x3bX\x05\x00\x00\x00dtypectorch\nfloat32\nub"
            b"K\x00K\x08\x85K\x01\x85tRs.",
            "over OrderedDict",
        ),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "memo index 2147483647 in 4 operations"),
        (b"\x80\x02\x82\x01.", "extension code"),
        (b"\x80\x02]}X\x01\x00\x00\x00xK\x01sa.", "holds a list"),
        (b"\x80\x02}X\x01\x00\x00\x00xK\x01s.", "not a dictionary of tensors"),
    ],
)
def test_tensors_stay_within_their_storage(tmp_path, pickled, message):
    path = torch_zip(tmp_path / "x.bin", pickled, {"0": torch.arange(6.0).numpy().tobytes()})
    if message is None:
        assert torch.equal(open_pickle(path).tensors["x"].read(), torch.arange(6.0).view(2, 3))
        return
    with pytest.raises(CheckpointError, match=message):
        open_pickle(path)


def test_other_pickle_files_are_refused_with_the_way_out(tmp_path):
    file = tmp_path / "x.bin"
    torch.save({"x": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6, save it again with torch\.save"):
        open_pickle(file)
    torch_zip(file, pickled_tensor((2, 3), (3, 1)), {"0": bytes(24)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"archive/data\.pkl is compressed"):
        open_pickle(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(CheckpointError, match=r"zip without data\.pkl"):
        open_pickle(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("a/byteorder", "big")
    with pytest.raises(CheckpointError, match="big-endian"):
        open_pickle(file)
