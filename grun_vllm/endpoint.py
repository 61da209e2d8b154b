"""Routes for the owner: which requests are in force, and to read the store anew while it is served.

vLLM loads them where VLLM_PLUGINS names them: `VLLM_PLUGINS=grun,grun_admin`. Its `--api-key` does not cover them; they
need the owner's key, GRUN_OWNER_KEY in the environment, and are not there without it.
"""

from __future__ import annotations

import hmac
import logging
import os
from typing import Any

log = logging.getLogger("vllm.grun")

OWNER_KEY = "GRUN_OWNER_KEY"


class Endpoint:
    """vLLM's `EndpointPlugin`."""

    name = "grun_admin"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None
        self._model = ""
        self._key = os.environ.get(OWNER_KEY, "")

    def attach_router(self, app: Any) -> None:
        """Add the routes."""
        from fastapi import Request

        if not self._key:
            log.warning("GRUN: %s is not set, so there are no routes /grun/requests and /grun/reload", OWNER_KEY)
            return

        async def requests(request: Request) -> Any:
            return self._refused(request) or await self.requests()

        async def reload(request: Request, wait: bool = False) -> Any:
            return self._refused(request) or await self.reload(wait)

        for call in (requests, reload):
            call.__annotations__["request"] = Request  # FastAPI reads names of types from the module
        app.add_api_route("/grun/requests", requests, methods=["GET"], response_model=None)
        app.add_api_route("/grun/reload", reload, methods=["POST"], response_model=None)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep what reaches the engine."""
        if getattr(args, "load_format", None) == "grun":
            self._engine, self._model = engine_client, args.model

    async def requests(self) -> Any:
        """What is in force."""
        (told, *_) = await self._engine.collective_rpc("grun_requests")
        return {"model": self._model, **told}

    async def reload(self, wait: bool) -> Any:
        """Read the store anew. Answers in flight go on, computed again under it; with `wait`, they end before."""
        before = await self.requests()
        if before["kind"] != "store":
            return _error(409, "one adapter is served, no store: start the server anew to change it")
        prepared = await self._engine.collective_rpc("grun_prepare")
        for one in prepared:
            if "error" in one:
                return _error(409, f"what was in force stays so: {one['error']}")
        if len({one["digest"] for one in prepared}) > 1:
            return _error(409, "the store changed while it was read; what was in force stays so, ask again")
        await self._engine.pause_generation(mode="wait" if wait else "keep", clear_cache=True)
        try:
            await self._engine.collective_rpc("grun_switch")
        finally:
            await self._engine.resume_generation()
        return await self.requests()

    def _refused(self, request: Any) -> Any:
        """An answer with an error for who is not the owner, or if nothing is edited here; None: go on."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
            return _error(401, f"the owner's key is needed: Authorization: Bearer with the value of {OWNER_KEY}")
        if self._engine is None:
            return _error(409, "this server has no adapter of GRUN: start it with --load-format grun")
        return None


def _error(status: int, message: str) -> Any:
    from fastapi.responses import JSONResponse

    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": status}}
    return JSONResponse(body, status_code=status)
