"""Read torch's zip pickles (`.bin`, `.pt`) lazily and without executing anything of theirs.

A torch file is a zip whose `data.pkl` names storages, and whose `data/<key>` entries are their bytes, uncompressed
(torch/serialization.py). Pickles run code by naming functions to call; here every name resolves to an object of this
file or is refused. A tensor becomes a `LazyTensor` over the zip's bytes. Megatron's files also hold settings and
random states: those names resolve to inert records that never import or call what they are named after.
"""

import collections
import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from yuanmoe.checkpoint.files.lazy import LazyTensor, StoredTensor, TensorView, Weights
from yuanmoe.checkpoint.files.mapped import MappedBytes
from yuanmoe.checkpoint.files.safetensors_file import DTYPES
from yuanmoe.errors import CheckpointError, UnsafePickleError

MEGATRON_NAMES = ("megatron", "argparse.Namespace", "numpy", "_codecs.encode", "__builtin__.set", "builtins.set")
"""What a Megatron file names besides tensors: its enums and settings, and numpy arrays of random states."""

LOCAL_HEADER_BYTES = 30
MAX_PICKLE_BYTES = 256 << 20
"""M32's pickles have under 1 MB; the bytes of tensors are not in them."""


class _Storage(NamedTuple):
    """`numel` elements of `dtype` from byte `offset` on; tuples, which a pickle cannot change once they are made."""

    offset: int
    numel: int
    dtype: torch.dtype


class _Tensor(NamedTuple):
    """What a pickle says of a tensor, unchecked."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """Something that a pickle names and we only record: its `name`, what it was made of, the `state` it was given."""

    name: str
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **_: Any) -> "Inert":
        record = super().__new__(cls)
        record.args, record.state, record.items = args, None, []
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)


def open_pickle(path: Path) -> Weights:
    """The tensors of a state dict file. Raises UnsafePickleError when it asks for anything but tensors."""
    data, content = read_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(value, LazyTensor) for value in content.values()):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return Weights(content, (data,))


def read_pickle(path: Path, inert: tuple[str, ...] = ()) -> tuple[MappedBytes, Any]:
    """The object in a torch file, its tensors lazy; names below one of `inert` become `Inert` records."""
    data = MappedBytes(path)
    entries = _entries(path, data)
    prefix = next((name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")), None)
    if prefix is None:
        raise CheckpointError(f"{path} is a zip without data.pkl, not a torch file")
    start, stop = entries[prefix + "data.pkl"]
    if data.read(*entries.get(prefix + "byteorder", (0, 0))) not in (b"", b"little"):
        raise CheckpointError(f"{path} was written on a big-endian machine; save it again on a little-endian one")
    if stop - start > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path} has a pickle of {stop - start} bytes, above {MAX_PICKLE_BYTES}; it is damaged")
    pickled = data.read(start, stop)
    try:
        _check_operations(pickled)
        return data, _resolved(data, _TensorUnpickler(pickled, path, prefix, entries, inert).load())
    except CheckpointError:
        raise
    # The unpickler raises nearly anything on damaged input; all of it means the same.
    except Exception as error:
        raise CheckpointError(f"{path} has a damaged pickle ({error!r}); download it again") from error


def _entries(path: Path, data: MappedBytes) -> dict[str, tuple[int, int]]:
    """Where the bytes of each zip entry lie, [start, stop)."""
    if data.read(0, 4) != b"PK\x03\x04":
        raise CheckpointError(
            f"{path} is not a torch zip file; if it is in the format of torch before 1.6, save it again with "
            "torch.save(torch.load(path, weights_only=True), path)"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}), at {data.size} bytes; download it again"
        ) from error
    return {info.filename: _extent(path, data, info) for info in infos}


def _extent(path: Path, data: MappedBytes, info: zipfile.ZipInfo) -> tuple[int, int]:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise CheckpointError(f"{path}: entry {info.filename} is compressed or encrypted; torch writes neither")
    header = data.read(info.header_offset, info.header_offset + LOCAL_HEADER_BYTES)
    names_bytes = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = info.header_offset + LOCAL_HEADER_BYTES + names_bytes
    stop = start + info.file_size
    if info.header_offset < 0 or header[:4] != b"PK\x03\x04" or stop > data.size:
        raise CheckpointError(
            f"{path} is truncated or damaged: {info.filename} ends at byte {stop} of {data.size}; download it again"
        )
    return start, stop


def _check_operations(pickled: bytes) -> None:
    """Refuse what would spend memory or reach other code before any name is resolved."""
    memo_index = count = 0
    for operation, argument, _ in pickletools.genops(pickled):
        count += 1
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo_index = max(memo_index, int(argument or 0))
        if operation.name in ("EXT1", "EXT2", "EXT4"):
            raise ValueError("names by extension code")
    if memo_index > count:  # the C unpickler allocates memory up to the index
        raise ValueError(f"memo index {memo_index} in {count} operations")


class _TensorUnpickler(pickle.Unpickler):
    """Resolves names to the harmless objects below, and storages to extents of the file."""

    def __init__(
        self, pickled: bytes, path: Path, prefix: str, entries: dict[str, tuple[int, int]], inert: tuple[str, ...]
    ) -> None:
        super().__init__(io.BytesIO(pickled))
        self._path, self._prefix, self._entries, self._inert = path, prefix, entries, inert

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """What a name in the pickle stands for. Raises UnsafePickleError for all but tensors and `inert` names."""
        name = f"{module_name}.{global_name}"
        if name in _VALUES:
            return _VALUES[name]
        if name in _REBUILDERS:
            return _Rebuilder(name)
        if any(name == known or name.startswith(known + ".") for known in self._inert):
            return type("Inert", (Inert,), {"name": name})  # one for each file: a pickle can set attributes of it
        raise UnsafePickleError(
            f"{self._path} asks for {name}, which no tensor needs; nothing was executed. "
            "Get the weights as safetensors, or from a source that you trust"
        )

    def persistent_load(self, pid: Any, /) -> _Storage:
        """The storage that a tensor names: ("storage", dtype, key, location, count)."""
        _, dtype, key, _, count = pid
        if self._prefix + f"data/{key}" not in self._entries:
            raise CheckpointError(f"{self._path} lacks the bytes of storage {key}; download it again")
        start, stop = self._entries[self._prefix + f"data/{key}"]
        if not isinstance(dtype, torch.dtype) or not 0 <= count * dtype.itemsize <= stop - start:
            raise ValueError(f"storage {key} of {stop - start} bytes is to hold {count} x {dtype}")
        return _Storage(start, count, dtype)


class _Rebuilder:
    """A function that a pickle may call, by name; without attributes that a pickle could set on the function."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any) -> Any:
        return _REBUILDERS[self._name](*args)


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, stride: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_untyped(storage: _Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> _Tensor:
    dtype = rest[2]  # after requires_grad and hooks
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"tensor of {dtype} over {storage}")
    typed = _Storage(storage.offset, storage.numel // dtype.itemsize, dtype)
    return _Tensor(typed, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


_REBUILDERS = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_untyped,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}

_VALUES: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
} | {str(dtype): dtype for dtype in DTYPES.values()}


def _resolved(data: MappedBytes, value: Any) -> Any:
    """`value` with the tensors in its dictionaries checked and lazy; after unpickling, when nothing changes them."""
    if isinstance(value, _Tensor):
        return _lazy(data, value)
    if isinstance(value, dict):
        # dict.items: an OrderedDict's own attribute may have been set by the pickle.
        return {str(name): _resolved(data, entry) for name, entry in dict.items(value)}
    return value


def _lazy(data: MappedBytes, tensor: _Tensor) -> LazyTensor:
    """The tensor within its storage, which must hold all of it."""
    storage, offset, shape, stride = tensor
    # Anything may stand where a storage belongs: an ordered dictionary can be given the same attributes.
    sound = isinstance(storage, _Storage) and len(shape) == len(stride)
    if not sound or any(type(number) is not int or number < 0 for number in (offset, *shape, *stride)):
        raise ValueError(f"tensor of shape {shape}, stride {stride}, offset {offset} over {storage}")
    numel = last = 1
    contiguous = True
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        contiguous &= size == 1 or step == numel
        numel *= size
        last += (size - 1) * step
    if numel > storage.numel or (numel and offset + last > storage.numel):
        raise ValueError(f"shape {shape}, stride {stride}, offset {offset} in {storage.numel} elements")
    start = storage.offset + offset * storage.dtype.itemsize
    if contiguous or not numel:
        return StoredTensor(shape=shape, dtype=storage.dtype, data=data, offset=start)
    return TensorView.of(data.tensor(start, storage.dtype, last).as_strided(shape, stride))
