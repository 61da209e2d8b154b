"""What stands before the app: keys, the size of a body, one line of log a request, and errors as OpenAI's clients read.

Nothing that a client wrote is logged: a line has the method, the route (not the path), the status and the time.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse

from grun.serving.metrics import Metrics
from grun.serving.refusal import Refused

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


OPEN = ("/", "/health", "/metrics")
"""Paths that need no key."""


@dataclass(frozen=True)
class Keys:
    """Who may do what."""

    client: str | None
    """For the API; None: it needs none."""
    owner: str
    """For requests, gates and switches; good for the API too."""

    def of(self, header: str) -> str | None:
        """owner or client, by a header `Authorization: Bearer KEY`; None: neither.

        Keys are compared in a time that does not tell how much of one is right.
        """
        kind, _, key = header.partition(" ")
        given = key.strip().encode() if kind.lower() == "bearer" else b""
        is_owner = hmac.compare_digest(given, self.owner.encode())
        is_client = self.client is not None and hmac.compare_digest(given, self.client.encode())
        return "owner" if is_owner else "client" if is_client else None


class Guard:
    """ASGI middleware; the app finds who asks in `scope["state"]["who"]`."""

    def __init__(self, app: Any, *, keys: Keys, largest: int, metrics: Metrics) -> None:
        """`largest`: bytes of a body."""
        self._app, self._keys, self._largest, self._metrics = app, keys, largest, metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        since, status = time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._admit(scope)
            await self._app(scope, await self._read(scope, receive), noting)
        except Refused as error:
            await _answer(error)(scope, receive, noting)
        except Exception as error:  # its message may quote what was asked
            log.error("a bug in the server (%s); please report it", type(error).__name__)
            if not status:
                await _answer(Refused(500, "the server failed; see its log"))(scope, receive, noting)
        route = getattr(scope.get("route"), "path", "unknown")
        self._metrics.requests.labels(route, str(status)).inc()
        log.info("%s %s %d %.0f ms", scope["method"], route, status, 1000 * (time.monotonic() - since))

    def _admit(self, scope: Message) -> None:
        """Refused with 401 where there is no key, and one is needed."""
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"").decode("latin-1")
        who = self._keys.of(given)
        scope.setdefault("state", {})["who"] = who
        if who is None and self._keys.client is not None and scope["path"] not in OPEN:
            raise Refused(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    async def _read(self, scope: Message, receive: Receive) -> Receive:
        """The whole body, which the app then gets; Refused with 413 where it is too large."""
        too_large = Refused(413, f"the body is larger than {self._largest} bytes", code="body_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length[:18]) > self._largest:
            raise too_large
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body += message.get("body", b"")
            if len(body) > self._largest:
                raise too_large
            more = message.get("more_body", False)
        read = False

        async def again() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return again


def _answer(error: Refused) -> JSONResponse:
    unread = {"Connection": "close"} if error.status == 413 else {}  # what is left of the body is not read
    return JSONResponse(error.body(), error.status, {**error.headers(), **unread})
