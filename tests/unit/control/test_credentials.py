"""Who we are and by which way we go: what the environment may say, and what it must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from aiohttp import web

from ensemble_operator.control.cluster import Cluster
from ensemble_operator.control.credentials import Connection
from ensemble_operator.control.kinds import CONFIG_MAP


def kubeconfig(folder: Path, server: str) -> Path:
    file = folder / "config"
    file.write_text(
        json.dumps(
            {
                "current-context": "c",
                "clusters": [{"name": "c", "cluster": {"server": server}}],
                "users": [{"name": "u", "user": {"token": "ours"}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            }
        )
    )
    return file


async def test_a_netrc_does_not_take_the_tokens_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    seen: list[str | None] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.json_response({"metadata": {"name": "c"}})

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        cluster = await Cluster.connect(kubeconfig(tmp_path, f"http://127.0.0.1:{runner.addresses[0][1]}"))
        assert await cluster.get(CONFIG_MAP, "n", "c") is not None
        await cluster.close()
    finally:
        await runner.cleanup()
    assert seen == ["Bearer ours"]


@pytest.mark.parametrize(
    ("environment", "proxy"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "http://proxy:3128"),
        ({"HTTP_PROXY": "http://proxy:3128"}, None),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "10.0.0.1,kube.example.com"}, None),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "*"}, None),
    ],
)
async def test_a_proxy_of_the_environment_is_for_all_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], proxy: str | None
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    connection = await Connection.open(kubeconfig(tmp_path, "https://kube.example.com:6443"), None)
    assert connection.options.get("proxy") == proxy
    assert (await connection.access()).proxy == proxy
