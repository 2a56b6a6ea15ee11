"""The operator's settings: read once from the environment, which a pod's manifest writes. Pure."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ensemble_operator.errors import EnsembleError

PREFIX = "ENSEMBLE_OPERATOR_"
ADMIN_FIELDS = frozenset({"ip", "pod", "namespace", "component"})
HOST_FIELDS = frozenset({"pod", "ip", "service", "namespace"})
LEASE_NAME = "ensemble-operator"
PULL_POLICIES = ("", "Always", "IfNotPresent", "Never")
LOG_FORMATS = ("json", "text")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

# Kubernetes writes such variables for each Service of the namespace, one named ensemble-operator among them.
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT\w*)$|_PORT(_\d+_(TCP|UDP)\w*)?$")


class InvalidSettings(EnsembleError):
    """Environment variables that cannot be believed; the text has a line for each."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Each is the environment variable ENSEMBLE_OPERATOR_NAME of the field's name in capitals.

    `namespace` is the one that is served, empty: all. `pod_namespace` has the lease `lease_name`, `pod_name` holds it;
    the lease has the name of the pod's Deployment, or the default one. `image_pull_secrets` are names for the pods of
    ensembles.
    `admin_url` and `worker_host` say how pods are reached: for tests, in which pods are local processes.
    """

    namespace: str = ""
    pod_namespace: str = "default"
    pod_name: str = ""
    lease_name: str = LEASE_NAME
    worker_image: str = ""
    gateway_image: str = ""
    image_pull_policy: str = ""
    image_pull_secrets: tuple[str, ...] = ()
    allow_overrides: bool = False
    admin_url: str = "http://{ip}:8081"
    worker_host: str = "{pod}.{service}.{namespace}.svc"
    metrics_port: int = 9090
    health_port: int = 8080
    log_format: str = "json"
    log_level: str = "INFO"
    workers: int = 16
    resync_s: float = 300.0

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> Settings:
        """Read the settings.

        Raises InvalidSettings with all that is wrong, and a variable of ours that is not known.
        """
        found: dict[str, Any] = {}
        problems: list[str] = []
        known = {f"{PREFIX}{field.name.upper()}": field.name for field in fields(Settings)}
        for variable, text in sorted(environment.items()):
            if not variable.startswith(PREFIX):
                continue
            name = known.get(variable)
            if name is None and _SERVICE_LINK.search(variable):
                continue
            if name is None:
                problems.append(f"{variable}: not a setting; known are {', '.join(sorted(known))}")
                continue
            if text == "" and name not in _MAY_BE_EMPTY:
                continue
            try:
                found[name] = _READ.get(name, str)(text)
            except ValueError as error:
                problems.append(f"{variable}: {error}")
        if problems:
            raise InvalidSettings("\n".join(problems))
        return Settings(**found)


def _port(text: str) -> int:
    return _whole(text, 0, 65_535)


def _workers(text: str) -> int:
    return _whole(text, 1, 256)


def _whole(text: str, low: int, high: int) -> int:
    if text.isdecimal() and low <= int(text) <= high:
        return int(text)
    raise ValueError(f"{text!r} is not a whole number in {low}..{high}")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if 1 <= seconds <= 86_400:
        return seconds
    raise ValueError(f"{text!r} is not a number of seconds in 1..86400")


def _switch(text: str) -> bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise ValueError(f"{text!r} is neither true nor false")


def _name(text: str) -> str:
    if text == "" or re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", text):
        return text
    raise ValueError(f"{text!r} is not a name of lower-case letters, digits, '-' and '.'")


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_name(name) for part in text.split(",") if (name := part.strip())))


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text in choices:
            return text
        raise ValueError(f"{text!r} is not one of {', '.join(choice for choice in choices if choice)}")

    return read


def _template(allowed: frozenset[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        try:
            named = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
        except ValueError as error:
            raise ValueError(f"{text!r} is not a template: {error}") from None
        if named <= allowed and named:
            return text
        raise ValueError(f"{text!r} must name some of {', '.join(f'{{{name}}}' for name in sorted(allowed))}, only")

    return read


_MAY_BE_EMPTY = frozenset({"namespace", "worker_image", "gateway_image", "image_pull_policy", "pod_name"})
_READ: dict[str, Callable[[str], Any]] = {
    "namespace": _name,
    "pod_namespace": _name,
    "pod_name": _name,
    "lease_name": _name,
    "image_pull_policy": _one_of(PULL_POLICIES),
    "image_pull_secrets": _names,
    "allow_overrides": _switch,
    "admin_url": _template(ADMIN_FIELDS),
    "worker_host": _template(HOST_FIELDS),
    "metrics_port": _port,
    "health_port": _port,
    "log_format": _one_of(LOG_FORMATS),
    "log_level": _one_of(LOG_LEVELS),
    "workers": _workers,
    "resync_s": _seconds,
}
