"""The last stage: what was found becomes conditions, a status and events; written only where something is new."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ensemble_contract.pod import HTTP_PORT
from ensemble_operator.api import API_VERSION, KIND
from ensemble_operator.control import conditions as c
from ensemble_operator.control.errors import ClusterError, LeadershipLost, NotFound
from ensemble_operator.control.failing import failing
from ensemble_operator.control.kinds import SERVICE
from ensemble_operator.control.onepass import Pass
from ensemble_operator.control.planning import wanted_sources
from ensemble_operator.control.status import (
    PODS_NOT_CREATED,
    WARNING,
    Event,
    Facts,
    WorkerRow,
    events,
    make_status,
    same_but_times,
)
from ensemble_operator.control.uncreated import gateways_not_created
from ensemble_operator.control.world import World
from ensemble_operator.fleet import GatewayState
from ensemble_operator.manifests import pool_name, selector_text

log = logging.getLogger(__name__)

# How long a worker may be away, as containers are that start again, before somebody is told.
AWAY_TOLD_S = 10.0
# Traffic is told over at least so long: a status that changes with every look would be written at every look.
MEASURE_S = 60.0
MAX_NAMED = 8
SHORTEST_PERIOD_S, LONGEST_PERIOD_S = 0.5, 30.0


class Reporter:
    """Tells what was found."""

    def __init__(self, world: World) -> None:
        self._world = world

    def judge(self, one: Pass) -> None:
        """Say whether the ensemble answers, and what is wrong with it."""
        states = _answering(one)
        served = list(dict.fromkeys(m.name for state in states for m in state.members))
        lacking = sorted({m.name for state in states for m in state.members if not m.live})
        total = len(one.spec.spec.members)
        if not states:
            silent = next((v for v in one.look.gateways if v.silence), None)
            message = f"no gateway answers yet ({silent.pod.name}: {silent.silence})" if silent else "no gateway yet"
            refused = gateways_not_created(one.look)
            reason = PODS_NOT_CREATED if refused else "NoGateway"
            one.found.say(c.READY, holds=False, reason=reason, message=refused or message)
        elif lacking or not all(state.members for state in states):
            shown = f"; missing: {', '.join(lacking[:MAX_NAMED])}" if lacking else ""
            message = f"{len(served) - len(lacking)} of {total} members answer{shown}"
            one.found.say(c.READY, holds=False, reason="MembersMissing", message=message)
        else:
            message = f"all {len(served)} members that are served answer at {self._url(one)}"
            one.found.say(c.READY, holds=True, reason="Ready", message=message)
        self._look_again(one)
        wanted = {name: source.digest for name, source in wanted_sources(one.spec).items()}
        one.memory.failing = failing(one.look.workers, one.members, wanted, one.memory.failing)
        wrong = list(_wrong(one))
        message = "; ".join(wrong) if wrong else "nothing is wrong"
        reason = ("MemberFailed" if one.memory.failing else "WorkerLost") if wrong else "AsWanted"
        one.found.say(c.DEGRADED, holds=bool(wrong), reason=reason, message=message)

    def _look_again(self, one: Pass) -> None:
        """Members come to live without an event of the cluster: look often at first, then less and less."""
        memory = one.memory
        if one.found.said[c.READY].status == c.TRUE or one.look.mirror.plan is None:
            memory.unready_since = None
            return
        memory.unready_since = one.now if memory.unready_since is None else memory.unready_since
        waited_s = one.now - memory.unready_since
        one.again(min(LONGEST_PERIOD_S, max(SHORTEST_PERIOD_S, waited_s / 4)))

    async def report(self, one: Pass) -> None:
        """Write the status and post the events, if there is news.

        Raises a ClusterError if the status cannot be written.
        """
        before = one.document.get("status") or {}
        after = make_status(before, one.found, self._facts(one), one.generation, one.now)
        news = [*events(before, after), *one.events, *self._member_events(one, before)]
        if not same_but_times(before, after):
            manifest = {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "metadata": {"name": one.key.name, "namespace": one.key.namespace},
                "status": after,
            }
            try:
                await self._world.cluster.apply_status(manifest)
            except NotFound:
                return
        for event in news:
            await self._post(one, event)

    async def _post(self, one: Pass, event: Event) -> None:
        log.log(logging.WARNING if event.type == WARNING else logging.INFO, "%s: %s", event.reason, event.message)
        try:
            await self._world.cluster.event(one.document, event.type, event.reason, event.message, event.action)
        except LeadershipLost:
            raise
        except ClusterError as error:
            log.warning("the event %s is lost: %s", event.reason, error)

    def _member_events(self, one: Pass, before: Mapping[str, object]) -> list[Event]:
        """An event for each member that has newly failed."""
        if one.seen is None:
            return []
        failed, told = one.memory.failing, one.memory.told
        if told is None:
            # Who was here before has told what the status says.
            text = str(before.get("conditions", ""))
            told = {version for version in failed if f"member {version[0]}: " in text}
        one.memory.told = set(failed)
        return [
            Event(WARNING, "MemberFailed", f"member {version[0]}: {cause}", "Load")
            for version, cause in failed.items()
            if version not in told
        ]

    def _facts(self, one: Pass) -> Facts:
        document = one.document.get("spec") or {}
        wanted = one.wanted or int((document.get("devices") or {}).get("count") or 1)
        members = len(document.get("members") or ())
        if one.ensemble is None or one.seen is None:
            return Facts(replicas=None, selector=selector_text(one.key.name), wanted=wanted, members=members)
        look = one.look
        first = look.stateful_sets.get(pool_name(one.key.name, 0)) or {}
        return Facts(
            replicas=int((first.get("status") or {}).get("replicas") or 0),
            selector=selector_text(one.key.name),
            wanted=wanted,
            held=len(one.held),
            plan=look.mirror.plan,
            target=one.target or look.mirror.target,
            rows=_rows(one),
            measured_rows_per_s=_measured(one),
            members=members,
            live=len(_live_members(one) & {member.name for member in one.spec.spec.members}),
            url=self._url(one),
        )

    def _url(self, one: Pass) -> str:
        """Where clients find the ensemble: the load balancer's address, else the Service's name."""
        service = self._world.store.child(SERVICE, one.key, one.key.name) or {}
        for entry in ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ():
            if host := entry.get("hostname") or entry.get("ip"):
                return f"http://{f'[{host}]' if ':' in host else host}:{HTTP_PORT}"
        return f"http://{one.key.name}.{one.key.namespace}.svc:{HTTP_PORT}"


def _answering(one: Pass) -> list[GatewayState]:
    """What the gateways say that have clients."""
    return [view.state for view in one.look.gateways if view.state is not None and not view.pod.leaving]


def _live_members(one: Pass) -> set[str]:
    """Members of which every gateway that answers has a live instance."""
    live = [{m.name for m in state.members if m.live} for state in _answering(one)]
    return set.intersection(*live) if live else set()


def _wrong(one: Pass) -> list[str]:
    found = []
    members = one.members
    for (name, _), cause in one.memory.failing.items():
        instead = ""
        if members is not None and name in members.kept:
            instead = " (its former version goes on)"
        elif members is not None and name in members.left_out:
            instead = " (the others are served without it)"
        found.append(f"member {name}: {cause}{instead}")
    plan = one.look.mirror.plan
    present = {view.name for view in one.look.workers}
    for worker, row in sorted((plan.rows if plan is not None else {}).items()):
        if row and worker not in present:
            found.append(f"worker {worker} is gone")
    for view in one.look.workers:
        placed = plan is not None and bool(plan.rows.get(view.name))
        away_s = one.now - view.pod.away_since if view.pod.away_since is not None else 0.0
        if placed and not view.pod.leaving and (view.pod.trouble or (not view.holds and away_s > AWAY_TOLD_S)):
            found.append(f"worker {view.name}: {view.pod.trouble or view.silence or 'it does not answer'}")
    refused = gateways_not_created(one.look)
    found += [refused] if refused and _answering(one) else []
    found += [f"gateway {v.pod.name}: {v.pod.trouble}" for v in one.look.gateways if v.pod.trouble]
    return found


def _rows(one: Pass) -> tuple[WorkerRow, ...]:
    plan = one.look.mirror.plan
    if plan is None:
        return ()
    nodes = {view.name: view.pod.node for view in one.look.workers}
    rows = []
    for worker, row in plan.rows.items():
        device = one.devices.get(worker)
        if device is None and one.look.mirror.target is not None:
            device = one.look.mirror.target.device(worker)
        device_class = device.device_class if device is not None else ""
        used = sum(one.needs.get((plan.sources[at].digest, device_class, size), 0) for at, size in row)
        rows.append(
            WorkerRow(
                worker=worker,
                node=nodes.get(worker, ""),
                device_class=device_class,
                used_bytes=int(used),
                capacity_bytes=device.usable_bytes if device is not None else 0,
                instances=tuple((plan.sources[at].name, size) for at, size in row),
            )
        )
    return tuple(sorted(rows, key=lambda row: row.worker))


def _measured(one: Pass) -> float | None:
    """Rows/s that gateways answered since they were looked at a while ago; None without traffic or too soon."""
    counts = {v.pod.life: v.state.rows for v in one.look.gateways if v.state is not None}
    before = one.memory.rows
    if before is None:
        one.memory.rows = (one.now, counts)
        return None
    elapsed_s = one.now - before[0]
    if elapsed_s < MEASURE_S:
        return None
    one.memory.rows = (one.now, counts)
    answered = sum(max(0, rows - before[1][life]) for life, rows in counts.items() if life in before[1])
    return answered / elapsed_s if answered else None
