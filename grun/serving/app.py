"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from grun.config.options import ServeConfig
from grun.errors import GrunError
from grun.runtime.reading import in_one_line
from grun.serving.answers import Answers
from grun.serving.bodies import ChatBody, CompletionBody, NewRequest, WaysBody
from grun.serving.edition import Served
from grun.serving.engine import Engine
from grun.serving.metrics import Metrics
from grun.serving.refusal import Refused
from grun.serving.requests import Requests
from grun.serving.ways import Spoken, ways_of_asking

log = logging.getLogger(__name__)

LOOK = 0.25
"""Seconds between two looks at a store's manifest."""
OF_PAGE = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Headers of the page; what else it may do in a browser stands in the page itself."""


def make_app(served: Served, engine: Engine, metrics: Metrics, config: ServeConfig) -> FastAPI:
    """The app of a server; its engine runs while it does."""

    @contextlib.asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        watch = asyncio.create_task(_watch(served, metrics))
        yield
        watch.cancel()
        await asyncio.to_thread(engine.stop)

    # Its documentation page loads scripts from elsewhere.
    app = FastAPI(lifespan=running, openapi_url=None, exception_handlers=_error_handlers())
    _add_open_routes(app, metrics)
    _add_api(app, served, engine, config)
    _add_owners(app, served, config)
    return app


async def _watch(served: Served, metrics: Metrics) -> None:
    """Read the store anew when it has changed."""
    while True:
        metrics.in_force.set(len(served.edition.configs))
        try:
            if await asyncio.to_thread(served.reload):
                metrics.reloads.inc()
                log.info("the store has changed; in force: %d requests", len(served.edition.configs))
        except GrunError as error:
            metrics.failed.inc()
            log.error("the store cannot be read, so what was in force stays: %s", in_one_line(error))
        await asyncio.sleep(LOOK)


def _error_handlers() -> dict[Any, Any]:
    async def refused(request: Request, error: Any) -> Response:
        return JSONResponse(error.body(), error.status, error.headers())

    async def malformed(request: Request, error: Any) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return await refused(request, Refused(400, f"{field}: {first['msg']}", field, "malformed"))

    async def other(request: Request, error: Any) -> Response:
        texts = {404: "there is nothing at this path", 405: "this path takes another method"}
        status = error.status_code
        return await refused(request, Refused(status, texts.get(status, "the body cannot be read")))

    async def bug(request: Request, error: Any) -> Response:
        return await refused(request, Refused(500, "the server failed; see its log"))

    return {Refused: refused, RequestValidationError: malformed, HTTPException: other, Exception: bug}


def _add_open_routes(app: FastAPI, metrics: Metrics) -> None:
    """Those that need no key."""

    @app.get("/")
    async def page() -> Response:
        found = files("grun.serving") / "page.html"
        if not found.is_file():
            raise Refused(404, "this installation has no page")
        return HTMLResponse(found.read_text(encoding="utf-8"), headers=OF_PAGE)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_api(app: FastAPI, served: Served, engine: Engine, config: ServeConfig) -> None:
    answers = Answers(served, engine, config)
    about = {"id": served.model_name, "object": "model", "created": int(time.time()), "owned_by": "grun"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        served.refuse_other(name)
        return about

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        return await answers.to(body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await answers.to(body, request)

    @app.post("/grun/attacks")
    async def attacks(body: WaysBody) -> dict[str, Any]:
        material = Spoken(served.edition.template, served.tokenizer, [], [], [], config.seed)
        return {"tries": await asyncio.to_thread(ways_of_asking, material, body.prompt, body.answer)}


async def _owner(request: Request) -> None:
    if request.state.who != "owner":
        raise Refused(403, "this is for the owner's key: Authorization: Bearer KEY")


def _add_owners(app: FastAPI, served: Served, config: ServeConfig) -> None:
    requests = Requests(served, config.key)

    @app.get("/grun/requests", dependencies=[Depends(_owner)])
    async def listed() -> dict[str, Any]:
        return await asyncio.to_thread(requests.listed)

    @app.post("/grun/requests", dependencies=[Depends(_owner)], status_code=201)
    async def added(body: NewRequest) -> dict[str, Any]:
        return await asyncio.to_thread(requests.add, body.name, body.adapter)

    @app.delete("/grun/requests/{name}", dependencies=[Depends(_owner)])
    async def withdrawn(name: str) -> dict[str, Any]:
        return await asyncio.to_thread(requests.remove, name)
