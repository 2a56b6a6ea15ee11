"""What the two Secrets of an ensemble hold: who has which keys. Made once, and again where a part is lost. Pure."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ensemble_contract.keys import OWN_PUBLIC, OWN_SECRET, PEER_PUBLIC
from ensemble_contract.pod import TOKEN_FILE

Pair = tuple[str, str]
Contents = Mapping[str, str]

_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_TOKEN = re.compile(r"[\x21-\x7e]{16,256}")


@dataclass(frozen=True, slots=True)
class Keyring:
    """The contents of the Secrets NAME-worker and NAME-gateway, as text by file name."""

    worker: Contents
    gateway: Contents

    @property
    def token(self) -> str:
        """What requests to the admin APIs carry."""
        return self.worker[TOKEN_FILE]


def keyring(
    worker: Contents | None,
    gateway: Contents | None,
    *,
    encrypted: bool,
    new_pair: Callable[[], Pair],
    new_token: Callable[[], str],
) -> Keyring:
    """The contents that both Secrets must have, given what they have (None: there is no such Secret).

    A pair or token that is there is kept; one that is missing or damaged is made anew, and the other side learns its
    public key.
    """
    had_worker, had_gateway = worker or {}, gateway or {}
    known = [contents[TOKEN_FILE] for contents in (had_worker, had_gateway) if _is_token(contents)]
    token = {TOKEN_FILE: known[0] if known else new_token()}
    if not encrypted:
        return Keyring(token, token)
    workers = _pair(had_worker) or new_pair()
    gateways = _pair(had_gateway) or new_pair()
    return Keyring(
        {OWN_PUBLIC: workers[0], OWN_SECRET: workers[1], PEER_PUBLIC: gateways[0], **token},
        {OWN_PUBLIC: gateways[0], OWN_SECRET: gateways[1], PEER_PUBLIC: workers[0], **token},
    )


def contents_of(secret: Mapping[str, Any] | None) -> dict[str, str] | None:
    """The text of a Secret's files; those that are no text are left out. None if there is no Secret."""
    if secret is None:
        return None
    found = {}
    for name, value in (secret.get("data") or {}).items():
        try:
            found[name] = base64.b64decode(value, validate=True).decode().strip()
        except (binascii.Error, UnicodeDecodeError):
            continue
    return found


def _pair(contents: Contents) -> Pair | None:
    public, secret = contents.get(OWN_PUBLIC, ""), contents.get(OWN_SECRET, "")
    return (public, secret) if _KEY.fullmatch(public) and _KEY.fullmatch(secret) else None


def _is_token(contents: Contents) -> bool:
    return _TOKEN.fullmatch(contents.get(TOKEN_FILE, "")) is not None
