"""API keys: who may ask, and how much. Files hold hashes only, so that reading one gives nobody access.

A key is 32 random bytes, which no dictionary holds: one round of SHA-256 is as good as a slow hash, and checking stays
free. An entry is a line: `NAME HASH [requests_per_minute=60] [max_concurrency=4]`; `#` begins a comment.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from yuanmoe.errors import UsageError

PREFIX = "yuan-"
ENVIRONMENT = "YUANMOE_API_KEYS"
"""Entries, separated by newlines or semicolons."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Someone who asks, and the bounds of it."""

    name: str
    requests_per_minute: int | None = None
    max_concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: bytes
    client: Client


class ApiKeys:
    """The keys that are known."""

    def __init__(self, entries: Sequence[_Entry]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> list[str]:
        return [entry.client.name for entry in self._entries]

    def client(self, key: str) -> Client | None:
        """Whose key this is. Takes the same time for every wrong key."""
        digest = hashlib.sha256(key.encode(errors="replace")).digest()
        found = [entry.client for entry in self._entries if hmac.compare_digest(entry.digest, digest)]
        return found[0] if found else None


def new_key() -> str:
    """A key that nobody can guess."""
    return PREFIX + secrets.token_urlsafe(32)


def entry_line(name: str, key: str, *, requests_per_minute: int | None = None, concurrency: int | None = None) -> str:
    """The line of a key for a file of keys. Raises UsageError for a name that no line can hold."""
    if not re.fullmatch(r"[\w.@-]{1,64}", name):
        raise UsageError(f"the name {name!r} must be 1 to 64 letters, digits or any of . @ _ -")
    limits = {"requests_per_minute": requests_per_minute, "max_concurrency": concurrency}
    words = [f"{option}={value}" for option, value in limits.items() if value is not None]
    return " ".join([name, hashlib.sha256(key.encode()).hexdigest(), *words])


def read_keys(file: Path | None, variable: str | None) -> ApiKeys:
    """Keys of a file and of the environment variable's value. Raises UsageError for a line that is no entry."""
    entries: list[_Entry] = []
    if file is not None:
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the API keys of {file}: {error}") from error
        entries += _parse(str(file), text.splitlines())
        if not entries:
            raise UsageError(f"{file} holds no API key; make one with `yuanmoe api-key NAME --file {file}`")
    if variable:
        entries += _parse(ENVIRONMENT, re.split(r"[\n;]", variable))
    names = [entry.client.name for entry in entries]
    if len(set(names)) < len(names):
        raise UsageError(f"{len(names)} API keys have {len(set(names))} names; give each its own")
    return ApiKeys(entries)


def _parse(source: str, lines: Iterable[str]) -> list[_Entry]:
    entries = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if words:
            entries.append(_entry(f"{source}, entry {number}", words))
    return entries


def _entry(where: str, words: Sequence[str]) -> _Entry:
    if len(words) < 2 or not re.fullmatch(r"[0-9a-f]{64}", words[1]):
        raise UsageError(
            f"{where}: an API key is a line `NAME HASH` with 64 hexadecimal digits; `yuanmoe api-key` makes one"
        )
    limits: dict[str, int] = {}
    for word in words[2:]:
        option, _, value = word.partition("=")
        if option not in ("requests_per_minute", "max_concurrency") or not re.fullmatch(r"[1-9]\d{0,8}", value):
            raise UsageError(
                f"{where}: {word!r} is no limit; known are requests_per_minute=N and max_concurrency=N, N at least 1"
            )
        limits[option] = int(value)
    return _Entry(bytes.fromhex(words[1]), Client(name=words[0], **limits))
