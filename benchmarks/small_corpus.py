"""The text that the shipped model learned from: this Python's standard library and installed, permissively licensed
packages, as documents and a tokenizer, with a list of what is in it.

    make setup
    .venv/bin/python benchmarks/small_corpus.py small-run
    .venv/bin/yuanmoe data pack small-run/corpus.jsonl small-run/tokens --tokenizer small-run/tokenizer --heldout 0.01
    .venv/bin/yuanmoe train small --data small-run/tokens --out small-run/run

Writes corpus.jsonl, sources.json and tokenizer/. The same packages give the same bytes.
"""

import argparse
import hashlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yuanmoe.data.sources.packages import Package, installed_packages
from yuanmoe.data.sources.python_sources import Document, stdlib_documents
from yuanmoe.text.bpe import train_bpe

LEFT_OUT = "encodings/"
"""Tables of characters."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="Folder to write.")
    parser.add_argument("--package-mb", type=int, default=2, help="At most so many MB of a package.")
    parser.add_argument("--vocab-size", type=int, default=4096)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sources = write_corpus(options.out, options.package_mb * 10**6)
    (options.out / "sources.json").write_text(json.dumps(sources, indent=1) + "\n", encoding="utf-8")
    train_bpe(texts(options.out), options.vocab_size).save(options.out / "tokenizer")


def write_corpus(out: Path, package_bytes: int) -> dict[str, Any]:
    """corpus.jsonl, a different document a line, and what is in it."""
    seen: set[bytes] = set()
    packages = installed_packages()
    permissive = [package for package in packages if package.permissive and package.name != "yuanmoe"]
    rows = []
    with (out / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for source, documents in every_source(permissive, package_bytes):
            counts = {"documents": 0, "bytes": 0}
            for document in documents:
                digest = hashlib.blake2b(document.text.strip().encode()).digest()
                if digest in seen:
                    continue
                seen.add(digest)
                record = {"source": source["name"], "name": document.name, "text": document.text}
                file.write(json.dumps(record) + "\n")
                counts["documents"] += 1
                counts["bytes"] += len(document.text.encode())
            rows.append(source | counts)
    left_out = [
        {"name": package.name, "version": package.version, "licence": package.licence}
        for package in packages
        if not package.permissive
    ]
    return {"package_bytes": package_bytes, "sources": rows, "left_out": left_out}


def every_source(packages: list[Package], package_bytes: int) -> Iterator[tuple[dict[str, str], Iterator[Document]]]:
    library = (document for document in stdlib_documents() if not document.name.startswith(LEFT_OUT))
    yield {"name": "Python's standard library", "version": platform.python_version(), "licence": "PSF-2.0"}, library
    for package in packages:
        facts = {"name": package.name, "version": package.version, "licence": package.licence}
        yield facts, package.documents(max_bytes=package_bytes)


def texts(out: Path) -> Iterator[str]:
    with (out / "corpus.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


if __name__ == "__main__":
    main()
