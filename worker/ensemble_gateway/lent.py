"""The protocol of aiohttp for connections of the public port, as the edge needs it: V2 errors, no timers of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from aiohttp import web

from ensemble_gateway.request import RequestError
from ensemble_gateway.routes import LINGER_S, error_response

_LOG = logging.getLogger(__name__)

# The largest head of a request, in all.
MAX_HEAD_BYTES = 64 << 10
# A name, a colon, CR LF.
_MIN_FIELD_BYTES = 4
# For a timer of aiohttp that cannot be turned off.
_NEVER_S = 10 * 365 * 86_400.0


class LentProtocol(web.RequestHandler):
    """Answers what is no HTTP (a broken chunk, say) as V2 does.

    That a client has sent such, or has left, is nothing to log as an error.
    """

    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The answer to a request that has not come to a handler, or that a handler has failed."""
        if status >= 500:
            if not isinstance(exc, ConnectionError):
                _LOG.error("%s %s failed", request.method, request.path, exc_info=exc)
            response = error_response(RequestError(status, "internal error: the gateway's log has the cause"))
        else:
            cause = " ".join((message or str(exc)).partition(":\n")[0].split())
            response = error_response(RequestError(status, f"this is no HTTP request: {cause}"))
        response.force_close()
        return response


def lent_protocols(server: web.Server) -> Callable[[], asyncio.Protocol]:
    """What makes a protocol for each connection that is lent to `server`.

    Heads that the edge lets pass are not refused again, and idle connections are the edge's to close: aiohttp does not
    see the inferences on them.
    """
    loop = asyncio.get_running_loop()

    def make() -> asyncio.Protocol:
        return LentProtocol(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # turns it off
            auto_decompress=False,
            lingering_time=LINGER_S,
            keepalive_timeout=_NEVER_S,
            max_line_size=MAX_HEAD_BYTES,
            max_field_size=MAX_HEAD_BYTES,
            max_headers=MAX_HEAD_BYTES // _MIN_FIELD_BYTES,
        )

    return make
