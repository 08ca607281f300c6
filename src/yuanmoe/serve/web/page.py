"""The page's files as they leave the server: each under a path that names the digest of all of them.

Browsers keep what lies under `/v/DIGEST/` for good, so a second visit asks for one file, the document at `/`. After an
update the document names another digest: no visit mixes files of two versions, and an old path is 404.
"""

import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

KINDS = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""Files of the page by suffix, with their media type; the folder also holds this module."""
DOCUMENT = "index.html"
DIGITS = 16
FOREVER = "public, max-age=31536000, immutable"
LINK = re.compile(r'(href|src)="(?!#)([\w./-]+\.(?:css|js|svg))')
"""A file of the page that the document names."""


@dataclass(frozen=True, slots=True)
class PageFiles:
    """The page in memory."""

    digest: str
    document: bytes
    files: dict[str, bytes]
    """By path below `/v/DIGEST/`."""


def read_page() -> PageFiles:
    """Reads the page's files and lets the document name them by their digest."""
    found = _below(files("yuanmoe.serve") / "web", "")
    digest = hashlib.sha256()
    for path, content in sorted(found.items()):
        digest.update(f"{path} {len(content)}\n".encode() + content)
    name = digest.hexdigest()[:DIGITS]
    text = found.pop(DOCUMENT).decode()
    # All modules are asked for at once, not import by import.
    modules = "".join(f'  <link rel="modulepreload" href="{path}">\n' for path in sorted(found) if path.endswith(".js"))
    text = text.replace("</head>", f"{modules}</head>", 1)
    return PageFiles(name, LINK.sub(rf'\1="v/{name}/\2', text).encode(), found)


def page_routes(page: PageFiles) -> APIRouter:
    """The routes of the page: its document, and its files for good."""
    routes = APIRouter(include_in_schema=False)
    tag = f'"{page.digest}"'

    @routes.api_route("/", methods=["GET", "HEAD"])
    @routes.api_route(f"/{DOCUMENT}", methods=["GET", "HEAD"])
    async def document(request: Request) -> Response:
        headers = {"Cache-Control": "no-cache", "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(page.document, media_type="text/html", headers=headers)

    @routes.api_route("/v/{digest}/{path:path}", methods=["GET", "HEAD"])
    async def file(digest: str, path: str) -> Response:
        if digest != page.digest or path not in page.files:
            raise HTTPException(404, "not a file of this version of the page; load the page again")
        kind = KINDS["." + path.rpartition(".")[2]]
        return Response(page.files[path], media_type=kind, headers={"Cache-Control": FOREVER})

    return routes


def _below(folder: Traversable, prefix: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            found |= _below(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(tuple(KINDS)):
            found[prefix + entry.name] = entry.read_bytes()
    return found
