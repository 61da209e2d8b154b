"""From a client's request to pieces of its answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from grun.config.options import ServeConfig
from grun.loading.models import context_length
from grun.serving.bodies import ChatBody, CompletionBody, Grun
from grun.serving.edition import Served
from grun.serving.engine import Ask, Engine, Piece
from grun.serving.prompts import chat_ids, text_ids
from grun.serving.refusal import Refused
from grun.serving.replies import Reply
from grun.serving.sampling import Sampling


class Answers:
    """Answers requests of the API."""

    def __init__(self, served: Served, engine: Engine, config: ServeConfig) -> None:
        self._served, self._engine, self._config = served, engine, config
        self._context = context_length(served.base)
        embeddings: Any = served.base.get_input_embeddings()
        self._vocabulary = int(embeddings.weight.shape[0])
        self._encoding = asyncio.Lock()  # a tokenizer is for one thread at a time

    async def to(self, body: ChatBody | CompletionBody, request: Request) -> Response:
        """The response to a request, whole or as a stream; an answer that nobody waits for any more is given up."""
        self._served.refuse_other(body.model)
        if body.grun != Grun() and request.state.who != "owner":
            raise Refused(403, "the field grun is for the owner's key", "grun")
        async with self._encoding:
            prompts = await asyncio.to_thread(self._encoded, body)
        reply = Reply(body, self._served.tokenizer, prompts)
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        asks = self._asks(body, reply, pieces)
        self._engine.ask(asks)
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return StreamingResponse(_events(reply, asks, pieces, usage), media_type="text/event-stream")
        return await _unless_gone(request, _whole(reply, asks, pieces))

    def _encoded(self, body: ChatBody | CompletionBody) -> list[list[int]]:
        """Ids of each prompt; Refused where one does not fit."""
        tokenizer = self._served.tokenizer
        if isinstance(body, ChatBody):
            prompts = [chat_ids(body.messages, self._served.edition.template, tokenizer)]
        else:
            prompts = [text_ids(prompt, tokenizer, self._vocabulary) for prompt in body.prompts()]
        field = "messages" if isinstance(body, ChatBody) else "prompt"
        longest = min(self._config.max_prompt_tokens, self._context - 1)
        for prompt in prompts:
            if not prompt:
                raise Refused(400, f"{field}: there is no token in it", field)
            if len(prompt) > longest:
                text = f"{field}: {len(prompt)} tokens; at most {longest} are answered here"
                raise Refused(400, text, field, "context_length_exceeded")
        return prompts

    def _asks(
        self, body: ChatBody | CompletionBody, reply: Reply, pieces: asyncio.Queue[tuple[int, Piece]]
    ) -> list[Ask]:
        wanted, most = body.longest(), self._config.max_new_tokens
        if wanted is not None and wanted > most:
            raise Refused(400, f"max_tokens={wanted}; answers here have at most {most} tokens", "max_tokens")
        loop = asyncio.get_running_loop()
        seed = secrets.randbits(63) if body.seed is None else body.seed
        temperature = 1.0 if body.temperature is None else body.temperature
        top_p = 1.0 if body.top_p is None else body.top_p

        def tell(index: int, piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

        return [
            Ask(
                prompt=tuple(prompt),
                room=min(wanted or most, self._context - len(prompt)),
                sampling=Sampling(temperature, top_p, seed, index % reply.answers, body.top()),
                stops=body.stops(),
                tell=partial(tell, index),
                until=time.monotonic() + self._config.answer_seconds,
                grun=body.grun,
            )
            for index, prompt in enumerate(reply.prompts)
        ]


async def _each(asks: Sequence[Ask], pieces: asyncio.Queue[tuple[int, Piece]]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces as they come, until all answers are finished; where that is not waited for, the answers are given up."""
    left = len(asks)
    try:
        while left:
            index, piece = await pieces.get()
            if piece.error is not None:
                error = piece.error
                raise error if isinstance(error, Refused) else Refused(500, str(error))
            left -= piece.finish is not None
            yield index, piece
    finally:
        for ask in asks:
            ask.gone = True


async def _whole(reply: Reply, asks: Sequence[Ask], pieces: asyncio.Queue[tuple[int, Piece]]) -> Response:
    found: dict[int, list[Piece]] = {index: [] for index in range(len(asks))}
    async for index, piece in _each(asks, pieces):
        found[index].append(piece)
    return JSONResponse(reply.whole(found))


async def _events(
    reply: Reply, asks: Sequence[Ask], pieces: asyncio.Queue[tuple[int, Piece]], usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: a chunk for each piece, and the end."""
    begun: set[int] = set()
    try:
        async for index, piece in _each(asks, pieces):
            yield _event(reply.chunk(index, piece, first=index not in begun, usage=usage))
            begun.add(index)
    except Refused as error:
        yield _event(error.body())
        return
    if usage:
        yield _event(reply.last_chunk())
    yield "data: [DONE]\n\n"


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Request, answer: Any) -> Response:
    """What `answer` gives; it is cancelled where the client hangs up before."""
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_hangs_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return Response(status_code=499)  # nobody reads it
        found: Response = task.result()
        return found
    finally:
        for one in (task, gone):
            one.cancel()


async def _hangs_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
