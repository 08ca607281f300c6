"""The HTTP application: paths, and nothing else but what binds them together.

Every error, whoever raised it, leaves in the shape of the OpenAI API (`errors`). FastAPI's own documentation pages are
off: they load scripts from elsewhere.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from yuanmoe import __version__
from yuanmoe.errors import YuanError
from yuanmoe.http.answers import error_response, ids_first, json_response
from yuanmoe.http.errors import MAX_PARAM_BYTES, ApiError, clipped
from yuanmoe.http.json_body import MAX_VALUES, bounded_route
from yuanmoe.serve.anthropic.messages import add_messages
from yuanmoe.serve.anthropic.schema import CountRequest, MessagesRequest
from yuanmoe.serve.core.gate import Gate
from yuanmoe.serve.core.info import model_card, model_info
from yuanmoe.serve.core.keys import ApiKeys, Client
from yuanmoe.serve.core.metrics import CONTENT_TYPE, Metrics
from yuanmoe.serve.core.routing import load_statistics
from yuanmoe.serve.core.service import Service, check_tokens, off_loop
from yuanmoe.serve.openai.chat import chat_completion, chat_ids
from yuanmoe.serve.openai.completions import completion
from yuanmoe.serve.openai.invalid import invalid_body
from yuanmoe.serve.openai.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from yuanmoe.serve.web.page import page_routes, read_page

JSON_BODIES = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
ANYONE = Client(name="anyone")
STOP_S = 10.0
"""How long the step may take that the engine is in when the server ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may ask, and how much."""

    keys: ApiKeys = field(default_factory=lambda: ApiKeys([]))
    anyone: Client = ANYONE
    """Bounds of all together where there are no keys, and of each key that names no bounds of its own."""
    local_only: bool = True
    """Whether the address is one of this machine alone."""
    cors_origins: Sequence[str] = ()
    """Pages of other servers that may call this one; `*` is any."""
    max_body_bytes: int = 4 * 2**20
    body_timeout_s: float = 30.0


def create_app(service: Service, metrics: Metrics, access: Access) -> FastAPI:
    """The application over a service whose worker is not started yet."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop(STOP_S)

    app = FastAPI(
        title="yuanmoe",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False},
        middleware=_middleware(access, metrics),
    )
    app.router.route_class = bounded_route(max(MAX_VALUES, 2 * service.max_prompt_tokens))
    _add_errors(app)
    _add_completions(app, service)
    add_messages(app, service)
    _add_tokens(app, service)
    _add_data(app, service, metrics)
    app.include_router(page_routes(read_page()))
    return app


def _middleware(access: Access, metrics: Metrics) -> list[Middleware]:
    gate = Middleware(
        Gate,
        keys=access.keys,
        anyone=access.anyone,
        local_only=access.local_only,
        max_body_bytes=access.max_body_bytes,
        body_timeout_s=access.body_timeout_s,
        responded=metrics.responded,
    )
    if not access.cors_origins:
        return [gate]
    # Outside, so that preflight requests, which carry no key, get their answer, and errors of the gate can be read.
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(access.cors_origins),
        allow_methods=["GET", "HEAD", "POST"],
        # Any: clients add their own, such as `x-stainless-lang`, and none of them opens anything here.
        allow_headers=["*"],
        expose_headers=["Retry-After", "X-Should-Retry"],
    )
    return [cors, gate]


def _add_errors(app: FastAPI) -> None:
    def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        model: type[BaseModel] | None = JSON_BODIES.get(request.url.path)
        fields = [] if model is None else [info.alias or name for name, info in model.model_fields.items()]
        return error_response(invalid_body(error.errors(), error.body, fields))

    def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, ApiError):  # of the gate, while the body was read
            return error_response(error.__cause__)
        asked = clipped(f"{request.method} {request.url.path}", MAX_PARAM_BYTES)
        message = f"{asked}: {error.detail}; /openapi.json lists what there is"
        if error.status_code == 400:
            message = f"the body cannot be read: {type(error.__cause__).__name__}: {error.__cause__}"
        answer = error_response(ApiError(error.status_code, message))
        answer.headers.update(error.headers or {})
        return answer

    def other(_: Request, error: Exception) -> Response:
        return error_response(error)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(YuanError, other)
    app.add_exception_handler(Exception, other)


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await chat_completion(service, body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts, or fill the hole between two."""
        return await completion(service, body, request)

    @app.get("/v1/models")
    async def models() -> Response:
        """The model that is served, and its adapters."""
        return json_response({"object": "list", "data": [model_card(service, name) for name in service.names]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """The model or adapter of that name."""
        service.check_model(model)
        return json_response(model_card(service, model))


def _add_tokens(app: FastAPI, service: Service) -> None:
    tokenizer = service.tokenizer

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """Ids of a text as `/v1/completions` reads it, or of a conversation as a chat does."""
        service.check_model(body.model)
        if body.messages is not None:
            ids = await chat_ids(service, body.messages)
        else:
            text = body.prompt or ""
            service.check_text(len(text))
            ids = await off_loop(lambda: tokenizer.encode(text), len(text))
        limit = service.config.max_position_embeddings
        named = {"count": len(ids), "max_model_len": limit}
        return Response(await off_loop(lambda: ids_first(ids, named), len(ids)), media_type="application/json")

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of ids."""
        service.check_model(body.model)
        check_tokens(tokenizer, body.tokens)
        return json_response({"prompt": await off_loop(lambda: tokenizer.decode(body.tokens), len(body.tokens))})


def _add_data(app: FastAPI, service: Service, metrics: Metrics) -> None:
    worker = service.worker

    @app.get("/health")
    async def health() -> Response:
        """200 while requests are taken; 503 with the reason otherwise."""
        if worker.failure is not None or worker.draining:
            worker.check()
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Numbers in Prometheus's text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/info")
    async def info() -> Response:
        """The model's sizes, what a token costs, and this server's limits."""
        return json_response(model_info(service))

    @app.get("/v1/routing/stats")
    async def routing_stats() -> Response:
        """Visits of every expert since the server started, with each layer's balance."""
        return json_response(load_statistics(service.config, worker.stats))
