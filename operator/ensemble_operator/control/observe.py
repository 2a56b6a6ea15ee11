"""One look at an ensemble: its children from the store, and what its workers and gateways say, asked side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from ensemble_operator.control.book import Book, kept_book
from ensemble_operator.control.kinds import CONFIG_MAP, DEPLOYMENT, POD, STATEFUL_SET, Key, Manifest
from ensemble_operator.control.pods import Pod, read_pods
from ensemble_operator.control.settings import Settings
from ensemble_operator.control.store import Store
from ensemble_operator.control.target import Mirror, read_mirror
from ensemble_operator.fleet import DeviceReport, Fleet, GatewayState, ProfileReport, Refused, Unreachable, WorkerReport
from ensemble_operator.manifests import GATEWAY, PLAN, PROFILES, WORKER, child_name

NONE = "none"


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker's pod and what it says; `silence` is why it says nothing, `refused` whether for our token."""

    pod: Pod
    device: DeviceReport | None = None
    report: WorkerReport | None = None
    silence: str = ""
    refused: bool = False

    @property
    def name(self) -> str:
        """The worker's name, its pod's."""
        return self.pod.name

    @property
    def holds(self) -> bool:
        """Whether it owns a device and says so."""
        return self.device is not None and self.device.kind != NONE and self.report is not None


@dataclass(frozen=True, slots=True)
class GatewayView:
    """A gateway's pod and what it says; `silence` is why it says nothing, `refused` whether for our token."""

    pod: Pod
    state: GatewayState | None = None
    silence: str = ""
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything that a reconcile decides by, as it was at one moment. `book` is None where no ConfigMap tells."""

    workers: tuple[WorkerView, ...]
    gateways: tuple[GatewayView, ...]
    mirror: Mirror
    book: Book | None
    stateful_sets: dict[str, Manifest]
    deployments: dict[str, Manifest]

    @property
    def highest_generation(self) -> int:
        """The highest generation seen anywhere."""
        plan = self.mirror.plan
        seen = [plan.generation if plan else 0]
        seen += [w.report.generation for w in self.workers if w.report is not None]
        seen += [max(g.state.generation, g.state.newest) for g in self.gateways if g.state is not None]
        return max(seen)


class Observer:
    """Looks at ensembles. What a worker's device is, is asked once in its life."""

    def __init__(self, store: Store, fleet: Fleet, settings: Settings) -> None:
        self._store, self._fleet, self._settings = store, fleet, settings
        self._devices: dict[str, tuple[str, DeviceReport]] = {}

    def children(self, key: Key) -> Observed:
        """What the store knows, without asking anybody."""
        store, pods = self._store, self._store.children(POD, key)
        return Observed(
            workers=tuple(WorkerView(pod) for pod in read_pods(pods, WORKER)),
            gateways=tuple(GatewayView(pod) for pod in read_pods(pods, GATEWAY)),
            mirror=read_mirror(store.child(CONFIG_MAP, key, child_name(key.name, PLAN))),
            book=kept_book(store.child(CONFIG_MAP, key, child_name(key.name, PROFILES))),
            stateful_sets={m["metadata"]["name"]: m for m in store.children(STATEFUL_SET, key)},
            deployments={m["metadata"]["name"]: m for m in store.children(DEPLOYMENT, key)},
        )

    async def ask(self, key: Key, seen: Observed, token: str) -> Observed:
        """The same, with what the pods say."""
        workers = asyncio.gather(*(self._worker(key, view.pod, token) for view in seen.workers))
        gateways = asyncio.gather(*(self._gateway(key, view.pod, token) for view in seen.gateways))
        found_workers, found_gateways = await asyncio.gather(workers, gateways)
        return Observed(
            tuple(found_workers),
            tuple(found_gateways),
            seen.mirror,
            seen.book,
            seen.stateful_sets,
            seen.deployments,
        )

    async def profiles(self, key: Key, workers: Iterable[WorkerView], token: str) -> dict[str, ProfileReport]:
        """What workers measure or have measured; who does not answer is left out."""

        async def one(view: WorkerView) -> ProfileReport | None:
            try:
                return await self._fleet.profile(self.address(key, view.pod), token)
            except Unreachable:
                return None

        asked = list(workers)
        answers = await asyncio.gather(*(one(view) for view in asked))
        return {view.name: report for view, report in zip(asked, answers, strict=True) if report is not None}

    def address(self, key: Key, pod: Pod) -> str:
        """Where a pod's admin API is."""
        return self._settings.admin_url.format(
            ip=pod.host, pod=pod.name, namespace=key.namespace, component=pod.component
        )

    def data_address(self, key: Key, pod: Pod, port: int) -> str:
        """Where gateways find a worker."""
        service = child_name(key.name, WORKER)
        host = self._settings.worker_host.format(pod=pod.name, ip=pod.host, service=service, namespace=key.namespace)
        return f"tcp://{host}:{port}"

    def forget(self, key: Key) -> None:
        """The ensemble is gone."""
        prefix = f"{key}/"
        for name in [name for name in self._devices if name.startswith(prefix)]:
            del self._devices[name]

    async def _worker(self, key: Key, pod: Pod, token: str) -> WorkerView:
        if not pod.ip:
            return WorkerView(pod, silence=pod.trouble or pod.unschedulable or "it has not started yet")
        address = self.address(key, pod)
        try:
            device = await self._device(f"{key}/{pod.name}", pod, address, token)
            report = await self._fleet.worker(address, token)
        except Unreachable as error:
            return WorkerView(pod, silence=pod.trouble or str(error), refused=_is_refusal(error))
        return WorkerView(pod, device, report)

    async def _device(self, name: str, pod: Pod, address: str, token: str) -> DeviceReport:
        known = self._devices.get(name)
        if known is not None and known[0] == pod.life:
            return known[1]
        device = await self._fleet.device(address, token)
        if device.kind != NONE:
            self._devices[name] = (pod.life, device)
        return device

    async def _gateway(self, key: Key, pod: Pod, token: str) -> GatewayView:
        if not pod.ip:
            return GatewayView(pod, silence=pod.trouble or pod.unschedulable or "it has not started yet")
        try:
            return GatewayView(pod, await self._fleet.gateway(self.address(key, pod), token))
        except Unreachable as error:
            return GatewayView(pod, silence=pod.trouble or str(error), refused=_is_refusal(error))


def _is_refusal(error: Unreachable) -> bool:
    return isinstance(error, Refused) and error.status == 401
