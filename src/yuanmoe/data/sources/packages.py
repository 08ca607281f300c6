"""Installed Python packages whose licence allows nearly everything, as documents to train on.

Licences are read from the packages' metadata (packaging.python.org, core metadata: License-Expression, License,
classifiers); a package whose metadata does not name a licence of `PERMISSIVE` is left out. Not here: the standard
library (`corpus.py`), tokens.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from yuanmoe.data.sources.python_sources import SKIPPED_FOLDERS, TEST_FOLDERS, Document, read_source

PERMISSIVE = frozenset(
    {
        *("mit", "mit-cmu", "isc", "0bsd", "bsd-2-clause", "bsd-3-clause", "apache-2.0", "psf-2.0", "python-2.0"),
        *("zlib", "bsl-1.0", "cc0-1.0", "llvm-exception"),
        # As License and classifiers spell them.
        *("mit license", "bsd", "bsd license", "new bsd", "3-clause bsd license", "bsd 2-clause license"),
        *("bsd 3-clause license", "apache", "apache 2.0", "apache 2.0 license", "apache software license"),
        *("apache license 2.0", "isc license", "isc license (iscl)", "python software foundation license"),
    }
)
"""SPDX identifiers and the older spellings of the same licences, in lower case."""

COPIES = frozenset({"_vendor", "_vendored", "vendored", "vendor"})
"""Folders with other people's packages under their own licences."""

GENERATED = ("_pb2.py", "_pb2_grpc.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One installed package."""

    name: str
    version: str
    licence: str
    """As its metadata names it; empty where it does not."""
    permissive: bool
    files: tuple[Path, ...]
    """Its Python sources, by path, without tests, copies of other packages and generated code."""
    root: Path
    """Where they are installed."""

    def documents(self, *, max_bytes: int, max_file_bytes: int = 2**18) -> Iterator[Document]:
        """Its sources up to `max_bytes` in all, chosen by their content: a sample rather than the first folders."""
        found = [(path, read_source(path, max_file_bytes)) for path in self.files]
        texts = {path: text for path, text in found if text.strip()}
        chosen: set[Path] = set()
        for path in sorted(texts, key=lambda path: hashlib.blake2b(texts[path].encode()).digest()):
            max_bytes -= len(texts[path].encode())
            if max_bytes < 0:
                break
            chosen.add(path)
        for path in self.files:
            if path in chosen:
                yield Document(name=path.relative_to(self.root).as_posix(), text=texts[path])


def installed_packages(found: Iterable[Distribution] | None = None) -> list[Package]:
    """The packages with Python sources that this interpreter can import, by name; an older copy on the path is left
    out."""
    packages: dict[str, Package] = {}
    for each in distributions() if found is None else found:
        package = _package(each)
        if package.files:
            packages.setdefault(package.name.lower(), package)
    return [packages[name] for name in sorted(packages)]


def is_permissive(licence: str) -> bool:
    """Whether every licence that an SPDX expression, or an older name, mentions is one of `PERMISSIVE`."""
    names = [part.strip().lower() for part in re.split(r"\s(?:AND|OR|WITH)\s", licence)]
    return all(name in PERMISSIVE or name.strip("()") in PERMISSIVE for name in names)


def _package(found: Distribution) -> Package:
    licence = _licence(found)
    root = Path(str(found.locate_file("")))
    names = sorted(str(name) for name in found.files or () if _is_wanted(Path(str(name))))
    paths = (root / name for name in names)
    return Package(
        name=found.metadata["Name"],
        version=found.version,
        licence=licence,
        permissive=is_permissive(licence),
        files=tuple(path for path in paths if path.is_file() and not path.is_symlink()),
        root=root,
    )


def _licence(found: Distribution) -> str:
    """The newest of the three places that metadata can name licences in. A License of more than a line is its text."""
    metadata = found.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classifiers = [value for value in metadata.get_all("Classifier") or [] if value.startswith("License ::")]
    names = [name for value in classifiers if (name := value.rpartition("::")[2].strip()) != "OSI Approved"]
    if names:
        return " AND ".join(names)
    lines = [line for value in metadata.get_all("License") or [] for line in value.strip().splitlines()]
    return lines[0] if len(lines) == 1 else ""


def _is_wanted(path: Path) -> bool:
    folders = set(path.parts[:-1])
    left_out = SKIPPED_FOLDERS | TEST_FOLDERS | COPIES | {"..", "testing"}
    return path.suffix.lower() == ".py" and not path.name.endswith(GENERATED) and not folders & left_out
