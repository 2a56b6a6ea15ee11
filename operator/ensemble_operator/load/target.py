"""Finds the model behind a URL that a load is meant for, and what its rows look like, by the V2 protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import aiohttp

from ensemble_contract.errors import ContractError
from ensemble_contract.tensors import TensorSpec
from ensemble_operator.errors import EnsembleError

TIMEOUT_S = 10.0


class TargetUnusable(EnsembleError):
    """No load can be put on what was named; the message says where it fails, and what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """A model of a V2 server, and its inputs, without the batch."""

    host: str
    port: int
    model: str
    inputs: tuple[TensorSpec, ...]

    @property
    def url(self) -> str:
        """The model's address."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v2/models/{self.model}"


async def find_target(url: str, model: str | None) -> Target:
    """The model behind a URL such as http://127.0.0.1:8000 or http://127.0.0.1:8000/v2/models/NAME.

    Raises TargetUnusable.
    """
    host, port, named = _parts(url)
    base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
            name = model or named or _only_model(await _json(session, "POST", f"{base}/v2/repository/index"), base)
            metadata = await _json(session, "GET", f"{base}/v2/models/{name}")
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise TargetUnusable(f"{url}: {error or 'no answer in time'}; does the server run there?") from error
    return Target(host, port, name, inputs_of(metadata, f"{base}/v2/models/{name}"))


def inputs_of(metadata: Any, where: str) -> tuple[TensorSpec, ...]:
    """The inputs in a model's V2 metadata, without their first dimension, the batch.

    Raises TargetUnusable.
    """
    try:
        found = []
        for entry in metadata["inputs"]:
            name, datatype, shape = entry["name"], entry["datatype"], [int(d) for d in entry["shape"]]
            if shape[:1] != [-1] or -1 in shape[1:]:
                raise TargetUnusable(
                    f"{where}: input {name!r} has shape {shape}: only the first dimension, the batch, may vary (-1)"
                )
            found.append(TensorSpec(name, datatype, tuple(shape[1:])))
        if not found:
            raise TargetUnusable(f"{where}: has no inputs")
    except ContractError as error:
        raise TargetUnusable(f"{where}: no random rows can be made for it: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise TargetUnusable(f"{where}: did not answer with V2 metadata; is this a V2 server?") from error
    return tuple(found)


def _parts(url: str) -> tuple[str, int, str]:
    try:
        parts = urlsplit(url)
        port = parts.port or 80
    except ValueError as error:
        raise TargetUnusable(f"{url}: not a URL: {error}") from error
    if parts.scheme != "http" or not parts.hostname:
        raise TargetUnusable(f"{url}: an address like http://127.0.0.1:8000 is expected (http only)")
    path = parts.path.strip("/").split("/")
    if path == [""] or path == ["v2"]:
        return parts.hostname, port, ""
    if path[:2] == ["v2", "models"] and len(path) in (3, 4) and path[3:] in ([], ["infer"]):
        return parts.hostname, port, unquote(path[2])
    raise TargetUnusable(f"{url}: the path of a model is /v2/models/NAME")


def _only_model(index: Any, where: str) -> str:
    """The ensemble of a server; models named like its members (ENSEMBLE.MEMBER) are part of it."""
    names: list[str] = [
        entry["name"] for entry in index if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    ]
    whole = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    if len(whole) != 1:
        listed = ", ".join(whole[:10]) or "none"
        raise TargetUnusable(f"{where}: has {len(whole)} models ({listed}): choose one with --model")
    return whole[0]


async def _json(session: aiohttp.ClientSession, method: str, url: str) -> Any:
    async with session.request(method, url) as response:
        try:
            body = await response.json(content_type=None)
        except ValueError as error:
            raise TargetUnusable(f"{url}: answered {response.status} and no JSON; is this a V2 server?") from error
    if response.status != 200:
        said = body.get("error", "") if isinstance(body, dict) else ""
        raise TargetUnusable(f"{url}: answered {response.status}: {said}")
    return body
