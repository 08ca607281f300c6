"""What every request passes before anything is read or computed: who asks, how often, how much at once.

Plain ASGI, so that a stream costs nothing here but its first message. Headers that keep the page to itself are added to
every response: it loads nothing from elsewhere and runs no inline script, so what a model says cannot become code.
"""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yuanmoe.http.answers import error_response
from yuanmoe.http.errors import ApiError
from yuanmoe.http.host import names_this_machine
from yuanmoe.serve.core.keys import ApiKeys, Client

GUARDED = ("/v1/", "/metrics", "/tokenize", "/detokenize")
"""What needs a key. The rest holds no data: `/health`, the schema, the files of the page."""
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(slots=True)
class _Use:
    """What a client did lately."""

    tokens: float
    """Requests that may come at once now; refilled with time."""
    filled: float = field(default_factory=time.monotonic)
    at_once: int = 0


class Gate:
    """Lets requests through to `app`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        anyone: Client,
        local_only: bool,
        max_body_bytes: int,
        body_timeout_s: float,
        responded: Callable[[int], None],
    ) -> None:
        """`anyone` bounds all clients together where there are no keys, and each key that names no bounds.

        `local_only` says that only this machine can connect; without keys a request must then name it, or a web page
        of a stranger could reach the server through a name that points here.
        """
        self._app = app
        self._keys = keys
        self._anyone = anyone
        self._check_host = local_only and not len(keys)
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._responded = responded
        self._uses: dict[str, _Use] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "path": _plain(scope["path"])}
        if scope["method"] == "HEAD":  # as GET; the server behind leaves the body out
            scope["method"] = "GET"
        send = self._labelled(send)
        try:
            self._check_announced(scope)
            client = self._client(scope)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        if client is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        await self._counted(client, scope, self._bounded(receive), send)

    def _client(self, scope: Scope) -> Client | None:
        """Who asks; None where nobody needs to be known. Raises ApiError for strangers."""
        headers = Headers(scope=scope)
        if self._check_host and not names_this_machine(headers.get("host", "")):
            raise ApiError(
                403,
                f"the Host {headers.get('host', '')[:100]!r} is not this machine; a server without API keys answers to "
                "localhost only: start it with --api-keys, or let your proxy send its address as Host",
                code="unknown_host",
            )
        path = scope["path"]
        if not path.startswith(GUARDED):
            return None
        if not len(self._keys):
            return self._anyone
        # The second is how clients of Anthropic's API send it.
        sent = headers.get("authorization") or f"Bearer {headers.get('x-api-key', '')}"
        scheme, _, key = sent.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "no API key; send it as `Authorization: Bearer KEY`", code="missing_api_key")
        client = self._keys.client(key.strip())
        if client is None:
            raise ApiError(401, "the API key is not known here", code="invalid_api_key")
        return client

    def _check_announced(self, scope: Scope) -> None:
        """Raises ApiError, 413, for a body that is too large by its own header, before any of it is read."""
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self._max_body_bytes):
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than the {self._max_body_bytes:,} bytes that this server takes (--max-body)"
        )

    async def _counted(self, client: Client, scope: Scope, receive: Receive, send: Send) -> None:
        use = self._uses.setdefault(client.name, _Use(tokens=self._rate(client) or 0))
        try:
            self._admit(client, use)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        use.at_once += 1
        try:
            await self._app(scope, receive, send)
        finally:
            use.at_once -= 1

    def _rate(self, client: Client) -> int | None:
        return client.requests_per_minute or self._anyone.requests_per_minute

    def _admit(self, client: Client, use: _Use) -> None:
        """Raises ApiError, 429, beyond the client's bounds."""
        at_once = client.max_concurrency or self._anyone.max_concurrency
        if at_once is not None and use.at_once >= at_once:
            raise ApiError(
                429,
                f"{client.name} has {use.at_once} requests under way, its limit is {at_once} at once",
                code="too_many_at_once",
                retry_after_s=1,
            )
        rate = self._rate(client)
        if rate is None:
            return
        now = time.monotonic()
        use.tokens = min(rate, use.tokens + (now - use.filled) * rate / 60)
        use.filled = now
        if use.tokens < 1:
            raise ApiError(
                429,
                f"{client.name} has used up its {rate} requests a minute",
                code="rate_limit_exceeded",
                retry_after_s=(1 - use.tokens) * 60 / rate,
            )
        use.tokens -= 1

    def _bounded(self, receive: Receive) -> Receive:
        """Ends a request whose body is too large, or does not arrive."""
        size, whole = 0, False

        async def receive_some() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(self._body_timeout_s):
                    message = await receive()
            except TimeoutError:
                waited = f"the body did not arrive within {self._body_timeout_s:g} s"
                raise ApiError(408, waited, code="body_timeout") from None
            size += len(message.get("body", b""))
            if size > self._max_body_bytes:
                raise self._too_large()
            whole = not message.get("more_body", False)
            return message

        return receive_some

    def _labelled(self, send: Send) -> Send:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                self._responded(message["status"])
            await send(message)

        return send_with_headers


def _plain(path: str) -> str:
    """A path without doubled and final slashes, which clients make when they join an address and a path."""
    return re.sub("/+", "/", path).rstrip("/") or "/"
