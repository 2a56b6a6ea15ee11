"""Two operators on one API server: one acts, the other takes over, and never both."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemble_operator.control.kinds import LEASE, Manifest
from ensemble_operator.control.lease import EXIT_LOST, Terms
from ensemble_operator.control.times import unix_time
from tests.support.control_plane import ControlPlane, Refused
from tests.support.tiny_operator import TinyOperator, make_ensemble, tiny_operator, until

END_S = 60.0
TAKEN_OVER_S = 20.0

pytestmark = pytest.mark.timeout(300)


class Pair:
    """The one that leads, and the one that waits."""

    def __init__(self, plane: ControlPlane, namespace: str, leader: TinyOperator, standby: TinyOperator) -> None:
        self.plane, self.namespace, self.leader, self.standby = plane, namespace, leader, standby

    def lease(self) -> Manifest:
        found: Manifest = self.plane.ask("GET", LEASE.path(self.namespace, "ensemble-operator"))["spec"]
        return found

    def holder(self) -> str:
        return str(self.lease().get("holderIdentity"))

    def planned_by(self, name: str) -> str:
        """Who wrote an ensemble's plan; empty: nobody yet."""
        try:
            path = f"/api/v1/namespaces/{self.namespace}/configmaps/{name}-plan"
            return str(self.plane.ask("GET", path)["data"]["by"])
        except Refused:
            return ""

    def wait_until_acts(self, who: str) -> None:
        """Wait until this one has planned an ensemble that is made now."""
        make_ensemble(self.plane, self.namespace, "afterwards", "a")
        until(lambda: self.planned_by("afterwards") != "", "somebody to act")
        assert self.planned_by("afterwards") == who


@pytest.fixture
def pair(control_plane: ControlPlane, namespace: str, tmp_path: Path) -> Iterator[Pair]:
    settings = {"NAMESPACE": namespace, "POD_NAMESPACE": namespace}
    with tiny_operator(control_plane.kubeconfig, tmp_path, "first", **settings) as leader:
        leader.wait_said("first leads")
        with tiny_operator(control_plane.kubeconfig, tmp_path, "second", **settings) as standby:
            standby.wait_said("health on port")
            made = Pair(control_plane, namespace, leader, standby)
            make_ensemble(control_plane, namespace, "e", "a")
            until(lambda: made.planned_by("e") == "first", "the leader to act")
            yield made


def test_a_standby_is_healthy_and_does_nothing(pair: Pair) -> None:
    assert pair.standby.ask("/healthz")[0] == 200
    assert pair.standby.ask("/readyz")[0] == 200
    assert pair.standby.metric("ensemble_operator_leader") == 0
    assert pair.leader.metric("ensemble_operator_leader") == 1
    page = pair.standby.ask("/metrics")[1]
    assert 'resource="configmaps"' not in page
    assert not pair.standby.said("leads")


def test_asked_to_stop_it_gives_the_lease_up_at_once(pair: Pair) -> None:
    assert pair.leader.end() == 0
    ended = time.time()
    assert pair.holder() in ("", "second")
    pair.standby.wait_said("second leads")
    pair.wait_until_acts("second")
    assert pair.lease()["leaseTransitions"] == 1
    assert unix_time(pair.lease()["acquireTime"]) - ended < Terms().duration_s / 2


def test_killed_it_is_replaced_within_20_s(pair: Pair) -> None:
    """As the lease itself tells: what this test waits for besides depends on what else the machine does."""
    assert Terms().duration_s + 2 * Terms().retry_s < TAKEN_OVER_S
    pair.leader.end(signal.SIGKILL)
    killed = time.time()
    assert pair.holder() == "first"
    pair.wait_until_acts("second")
    assert 0 < unix_time(pair.lease()["acquireTime"]) - killed < TAKEN_OVER_S


def test_a_container_that_crashed_leads_again_at_once(pair: Pair, tmp_path: Path) -> None:
    """The same pod again has the same identity: nobody waits for its former self."""
    # A start may take longer than the lease lasts: the other one must not come first.
    pair.standby.process.send_signal(signal.SIGSTOP)
    pair.leader.end(signal.SIGKILL)
    settings = {"NAMESPACE": pair.namespace, "POD_NAMESPACE": pair.namespace}
    folder = tmp_path / "again"
    folder.mkdir()
    with tiny_operator(pair.plane.kubeconfig, folder, "first", **settings) as again:
        again.wait_said("first leads")
        pair.standby.process.send_signal(signal.SIGCONT)
        until(lambda: pair.standby.ask("/healthz")[0] == 200, "the standby to go on")
        assert not pair.standby.said("leads")
        assert pair.lease()["leaseTransitions"] == 0
        assert again.end() == 0


def test_one_that_was_frozen_ends_when_another_has_taken_over(pair: Pair) -> None:
    pair.leader.process.send_signal(signal.SIGSTOP)
    pair.standby.wait_said("second leads")
    make_ensemble(pair.plane, pair.namespace, "e", "a", "b")
    pair.leader.process.send_signal(signal.SIGCONT)
    assert pair.leader.process.wait(END_S) == EXIT_LOST
    assert pair.leader.said("leadership is lost")
    until(lambda: pair.planned_by("e") == "second", "the new leader to act")
    assert pair.holder() == "second"


def test_a_lease_taken_by_hand_ends_the_leader(pair: Pair) -> None:
    path = LEASE.path(pair.namespace, "ensemble-operator")
    pair.plane.ask("PATCH", path, {"spec": {"holderIdentity": "somebody"}}, "application/merge-patch+json")
    assert pair.leader.process.wait(END_S) == EXIT_LOST


def test_a_lease_deleted_by_hand_is_made_again_and_one_leads(pair: Pair) -> None:
    """Whoever comes first makes it; the leader goes on, or ends because it was not the first."""
    pair.plane.ask("DELETE", LEASE.path(pair.namespace, "ensemble-operator"))
    until(lambda: LEASE.name in str(leases(pair)), "the lease to return")
    if pair.holder() == "second":
        pair.standby.wait_said("second leads")
        assert pair.leader.process.wait(END_S) == EXIT_LOST
    else:
        pair.wait_until_acts("first")
        assert not pair.standby.said("leads")


def test_operators_with_leases_of_their_own_lead_side_by_side(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    """As two releases of one namespace have, each of which serves another one."""
    served = control_plane.new_namespace()
    one = {"NAMESPACE": namespace, "POD_NAMESPACE": namespace, "LEASE_NAME": "one"}
    two = {"NAMESPACE": served, "POD_NAMESPACE": namespace, "LEASE_NAME": "two"}
    with (
        tiny_operator(control_plane.kubeconfig, tmp_path, "first", **one) as first,
        tiny_operator(control_plane.kubeconfig, tmp_path, "second", **two) as second,
    ):
        first.wait_said("first leads")
        second.wait_said("second leads")
        for name, holder in (("one", "first"), ("two", "second")):
            assert control_plane.ask("GET", LEASE.path(namespace, name))["spec"]["holderIdentity"] == holder


def leases(pair: Pair) -> Manifest:
    found: Manifest = pair.plane.ask("GET", LEASE.path(pair.namespace))
    return {LEASE.name: found["items"]} if found["items"] else {}
