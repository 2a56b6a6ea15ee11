"""Every V2 route as an aiohttp application: health, metadata, configuration, statistics, index, metrics and inference.

Most inferences never come here: the edge answers them at protocol level, and hands over what it does not read itself
(bodies in chunks, compressed ones, `Expect: 100-continue`). Every error is V2's `{"error": …}`.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

import msgspec
from aiohttp import web

from ensemble_contract.plan import GatewayPlan
from ensemble_gateway import description, v2
from ensemble_gateway.exposition import CONTENT_TYPE, exposition
from ensemble_gateway.metrics import Metrics, model_index
from ensemble_gateway.offloop import OFF_LOOP_BYTES, is_large, off_loop_if
from ensemble_gateway.request import Answer, InferHeader, Model, RequestError
from ensemble_gateway.served import find_model
from ensemble_gateway.statistics_v2 import model_statistics

LINGER_S = 2.0
"""How long the rest of a refused body is read and dropped, so that its sender gets to read the answer."""

# curl -d sends its JSON as a form unless told otherwise, and every V2 tutorial calls it so.
INFER_CONTENT_TYPES = frozenset(
    {"", "application/json", "application/octet-stream", "application/x-www-form-urlencoded"}
)

_LOG = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Pipeline(Protocol):
    """What the routes need of the gateway's pipeline."""

    @property
    def plan(self) -> GatewayPlan:
        """The plan that is served."""

    @property
    def models(self) -> dict[str, Model]:
        """The models that clients can name, the ensemble first."""

    @property
    def metrics(self) -> Metrics:
        """The counters, in the order of `models`."""

    @property
    def ready(self) -> bool:
        """Whether requests shall come here."""

    def member_live(self, index: int, /) -> bool:
        """Whether a worker reports an instance of this member live."""

    def max_rows(self, model: Model, /) -> int:
        """The most rows that one request for `model` can have."""

    def infer(self, header: InferHeader, binary: memoryview, /) -> Awaitable[Answer]:
        """The answer to one request, whose rows are taken at once; cancelled when the client leaves.

        Raises RequestError, now or when it is awaited.
        """


def make_app(pipeline: Callable[[], Pipeline], *, max_body_bytes: Callable[[], int]) -> web.Application:
    """The application over the pipeline that serves now, which raises RequestError while there is none.

    Bodies over `max_body_bytes`, compressed or not, are refused.
    """
    routes = _Routes(pipeline, max_body_bytes)
    app = web.Application(middlewares=[_errors_as_v2])
    app.add_routes([web.get(path, routes.server) for path in ("/v2", "/v2/")])
    app.router.add_get("/v2/health/live", routes.live)
    app.router.add_get("/v2/health/ready", routes.ready)
    app.router.add_get("/v2/models/stats", routes.all_statistics)
    app.router.add_post("/v2/repository/index", routes.index)
    app.router.add_get("/metrics", routes.metrics)
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        app.router.add_get(path, routes.metadata)
        app.router.add_get(f"{path}/ready", routes.model_ready)
        app.router.add_get(f"{path}/config", routes.config)
        app.router.add_get(f"{path}/stats", routes.statistics)
        app.router.add_post(f"{path}/infer", routes.infer, expect_handler=routes.expect)
    return app


def make_runner(app: web.Application, *, shutdown_timeout_s: float) -> web.AppRunner:
    """A runner of the application; after `await runner.setup()`, `runner.server()` makes a connection's protocol.

    Bodies stay as they were sent, for `v2.decompress` to bound and to check. A client that leaves cancels its handler.
    `runner.cleanup()` waits so long for requests that are being answered.
    """
    return web.AppRunner(
        app,
        auto_decompress=False,
        handler_cancellation=True,
        access_log=None,
        lingering_time=LINGER_S,
        shutdown_timeout=shutdown_timeout_s,
    )


def check_content_type(value: str) -> None:
    """Whether a `Content-Type` can be that of an infer request.

    Raises RequestError (415) if it says that the body is something else than JSON or bytes.
    """
    media_type = value.partition(";")[0].strip().lower()
    if media_type not in INFER_CONTENT_TYPES and not media_type.endswith("+json"):
        raise RequestError(
            415,
            f"Content-Type {value[:80]!r} is not served: send application/json, or application/octet-stream with "
            "Inference-Header-Content-Length",
        )


class _Routes:
    """The handlers. Each asks for the pipeline once: a new plan may replace it while a body comes."""

    def __init__(self, pipeline: Callable[[], Pipeline], max_body_bytes: Callable[[], int]) -> None:
        self._pipeline = pipeline
        self._max_body_bytes = max_body_bytes
        self._version = _version()

    async def live(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def ready(self, _request: web.Request) -> web.Response:
        if not self._pipeline().ready:
            raise RequestError(503, "not ready: too few members have been live yet, or the server is shutting down")
        return web.Response()

    async def server(self, _request: web.Request) -> web.Response:
        self._pipeline()
        return _json(description.server_metadata(self._version))

    async def metadata(self, request: web.Request) -> web.Response:
        pipeline = self._pipeline()
        return _json(description.model_metadata(pipeline.plan, _model(pipeline, request)))

    async def config(self, request: web.Request) -> web.Response:
        pipeline = self._pipeline()
        model = _model(pipeline, request)
        return _json(description.model_config(pipeline.plan, model, pipeline.max_rows(model)))

    async def model_ready(self, request: web.Request) -> web.Response:
        pipeline = self._pipeline()
        model = _model(pipeline, request)
        if not _is_ready(pipeline, model):
            reason = description.index_entry(model, ready=False)["reason"]
            raise RequestError(503, f"model {model.name!r} is not ready: {reason}")
        return web.Response()

    async def statistics(self, request: web.Request) -> web.Response:
        pipeline = self._pipeline()
        index = model_index(_model(pipeline, request))
        return _json({"model_stats": [model_statistics(pipeline.metrics, index)]})

    async def all_statistics(self, _request: web.Request) -> web.Response:
        metrics = self._pipeline().metrics
        return _json({"model_stats": [model_statistics(metrics, index) for index in range(len(metrics.models))]})

    async def index(self, request: web.Request) -> web.Response:
        pipeline = self._pipeline()
        wish = _index_wish(await self._body(request, pipeline.plan.timeout_s))
        entries = [(model, _is_ready(pipeline, model)) for model in pipeline.models.values()]
        return _json([description.index_entry(model, ready) for model, ready in entries if ready or not wish.ready])

    async def metrics(self, _request: web.Request) -> web.Response:
        return web.Response(text=exposition(self._pipeline().metrics), headers={"Content-Type": CONTENT_TYPE})

    async def expect(self, request: web.Request) -> web.StreamResponse | None:
        """Say `100 Continue`, unless the body is refused anyway (RFC 9110, section 10.1.1)."""
        try:
            self._check_infer(request)
            if request.headers["Expect"].lower() != "100-continue":
                raise RequestError(417, f"Expect {request.headers['Expect'][:80]!r} is not served: only 100-continue")
        except RequestError as error:
            return error_response(error)
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return None

    async def infer(self, request: web.Request) -> web.Response:
        self._check_infer(request)
        header, waiting = await self._submitted(request)
        answer = await waiting
        encoded = await off_loop_if(is_large(header, answer), v2.encode_answer, header, answer)
        headers = {"Content-Type": "application/json"}
        if encoded.header_length is not None:
            headers = {
                "Content-Type": "application/octet-stream",
                "Inference-Header-Content-Length": str(encoded.header_length),
            }
        payload = b"".join((encoded.json, *encoded.binary))
        accepted = request.headers.get("Accept-Encoding", "")
        payload, encoding = await off_loop_if(len(payload) > OFF_LOOP_BYTES, v2.compress, payload, accepted)
        if encoding is not None:
            headers["Content-Encoding"] = encoding
        return web.Response(body=payload, headers=headers)

    async def _submitted(self, request: web.Request) -> tuple[InferHeader, Awaitable[Answer]]:
        """What was asked, without its rows, and the answer to come: the body is not kept while it is awaited."""
        body = await self._body(request, self._pipeline().plan.timeout_s)
        body = await self._decompressed(body, request.headers.get("Content-Encoding", ""))
        pipeline = self._pipeline()
        model = _model(pipeline, request)
        text, binary = v2.split_body(body, request.headers.get("Inference-Header-Content-Length"))
        parse = functools.partial(v2.parse_header, max_rows=pipeline.max_rows(model))
        header = await off_loop_if(len(text) > OFF_LOOP_BYTES, parse, model, text, len(binary))
        return replace(header, inputs=()), pipeline.infer(header, binary)

    def _check_infer(self, request: web.Request) -> None:
        """Refuse what can be refused before the body has come."""
        _model(self._pipeline(), request)
        check_content_type(request.headers.get("Content-Type", ""))
        if request.content_length is not None and request.content_length > self._max_body_bytes():
            raise self._too_large(f"of {request.content_length} bytes")

    async def _body(self, request: web.Request, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                # aiohttp's own `read` would keep the body with the request.
                body = bytearray()
                async for part in request.content.iter_any():
                    body += part
                    if len(body) > self._max_body_bytes():
                        raise self._too_large("sent in chunks")
                return bytes(body)
        except TimeoutError:
            raise RequestError(408, f"the body did not arrive within {timeout_s:g} s") from None

    def _too_large(self, what: str) -> RequestError:
        return RequestError(
            413, f"a body {what} is over the limit of {self._max_body_bytes()} bytes: send fewer rows at once"
        )

    async def _decompressed(self, body: bytes, encoding: str) -> bytes:
        if not encoding:
            return body
        # The compressed size says little about the work: a thread, always.
        return await asyncio.to_thread(v2.decompress, body, encoding, self._max_body_bytes())


def _model(pipeline: Pipeline, request: web.Request) -> Model:
    return find_model(pipeline.models, request.match_info["model"], request.match_info.get("version"))


def _is_ready(pipeline: Pipeline, model: Model) -> bool:
    if model.member is not None:
        return pipeline.member_live(model.member)
    members = len(pipeline.plan.members)
    live = sum(pipeline.member_live(index) for index in range(members))
    return pipeline.ready and live >= (pipeline.plan.quorum or members)


class _IndexWish(msgspec.Struct):
    ready: bool = False


def _index_wish(body: bytes) -> _IndexWish:
    try:
        return msgspec.json.decode(body, type=_IndexWish) if body else _IndexWish()
    except msgspec.DecodeError as error:
        raise RequestError(400, f'the body must be empty or {{"ready": true}}: {error}') from None


@web.middleware
async def _errors_as_v2(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as error:
        return error_response(error)
    except web.RequestPayloadError as error:
        return error_response(RequestError(400, f"the body cannot be read: {error}"))
    except web.HTTPNotFound:
        return error_response(
            RequestError(404, f"no such path {request.path[:80]!r}: try /v2, /v2/models/NAME, /v2/models/NAME/infer")
        )
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        response = error_response(
            RequestError(405, f"{request.method} is not for {request.path[:80]!r}: use {allowed}")
        )
        response.headers["Allow"] = allowed
        return response
    except web.HTTPException as error:
        return error_response(RequestError(error.status, error.reason))
    except Exception:
        _LOG.exception("%s %s failed", request.method, request.path)
        return error_response(RequestError(500, "internal error: the gateway's log has the cause"))


def error_response(error: RequestError) -> web.Response:
    """V2's error object with the error's status."""
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else None
    response = web.Response(
        status=error.status, body=v2.error_body(str(error)), content_type="application/json", headers=headers
    )
    if error.status in (408, 413, 417):
        # The rest of the body may still be on its way, and nobody will read it.
        response.force_close()
    return response


def _json(content: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), content_type="application/json")


def _version() -> str:
    try:
        return importlib.metadata.version(description.SERVER_NAME)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
