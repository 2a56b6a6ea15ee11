"""Where the API server is and who we are there. The only file that imports kubernetes: for kubeconfigs and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import yaml
from kubernetes.aio import config as kube_config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject

from ensemble_operator.control.errors import NoCredentials

MAX_CONNECTIONS = 64


@dataclass(frozen=True, slots=True)
class Access:
    """Where the API server is and who we are there, for a client other than ours."""

    server: str
    ca_file: str | None
    verify: bool
    certificate_file: str | None
    key_file: str | None
    token: str | None
    proxy: str | None


class Connection:
    """A kubeconfig, or the service account of this pod. Its token is read again when it is old, or refused."""

    def __init__(self, configuration: Configuration, kubeconfig: Path | None, context: str | None) -> None:
        self._configuration = configuration
        self._kubeconfig, self._context = kubeconfig, context

    @staticmethod
    async def open(kubeconfig: Path | None, context: str | None) -> Connection:
        """Read it.

        Raises NoCredentials if that is not possible.
        """
        return Connection(await _load(kubeconfig, context), kubeconfig, context)

    @property
    def server(self) -> str:
        """The API server's URL."""
        return str(self._configuration.host)

    @property
    def proxy(self) -> str | None:
        """On the way to the server: the kubeconfig's, else the environment's."""
        return self._configuration.proxy or _proxy_of_environment(self.server)

    @property
    def options(self) -> dict[str, Any]:
        """What aiohttp needs for each request."""
        found = {"proxy": self.proxy, "server_hostname": self._configuration.tls_server_name}
        return {name: value for name, value in found.items() if value}

    def session(self) -> aiohttp.ClientSession:
        """A pool of connections with the right certificates."""
        self._configuration.connection_pool_maxsize = MAX_CONNECTIONS
        # Else aiohttp looks for ~/.netrc before every request, in a thread, and an entry of it takes our token's place.
        self._configuration.client_session_kwargs = {"trust_env": False}
        return RESTClientObject(self._configuration)._create_pool_manager()

    async def headers(self) -> Mapping[str, str]:
        """What every request carries."""
        settings: Any = await self._configuration.auth_settings()
        return {str(auth["key"]): str(auth["value"]) for auth in settings.values() if auth["value"]}

    async def renew(self) -> None:
        """Read the token again, or ask the plugin that makes it."""
        fresh = await _load(self._kubeconfig, self._context)
        self._configuration.api_key = fresh.api_key

    async def access(self) -> Access:
        """What another client needs to be who we are."""
        configuration = self._configuration
        authorization = (await self.headers()).get("authorization", "")
        return Access(
            server=self.server,
            ca_file=configuration.ssl_ca_cert,
            verify=configuration.verify_ssl,
            certificate_file=configuration.cert_file,
            key_file=configuration.key_file,
            token=authorization.split(" ", 1)[-1].strip() or None,
            proxy=self.proxy,
        )


def _proxy_of_environment(server: str) -> str | None:
    parts = urlsplit(server)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


async def _load(kubeconfig: Path | None, context: str | None) -> Configuration:
    configuration = Configuration()
    try:
        if kubeconfig is None:
            kube_config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            return configuration
        with kubeconfig.open("rb"):  # else a file that is not there is only a warning
            pass
        await kube_config.load_kube_config(  # type: ignore[no-untyped-call]
            str(kubeconfig), context=context, client_configuration=configuration, persist_config=False
        )
    except (kube_config.ConfigException, yaml.YAMLError, OSError, ValueError, TypeError, AttributeError) as error:
        if kubeconfig is None:
            raise NoCredentials(f"this pod's service account cannot be read: {error}") from error
        told = isinstance(error, (kube_config.ConfigException, yaml.YAMLError))
        why = error.strerror if isinstance(error, OSError) else str(error) if told else "not a kubeconfig"
        raise NoCredentials(f"{kubeconfig}: {why}; name another kubeconfig with --kubeconfig or KUBECONFIG") from error
    return configuration
