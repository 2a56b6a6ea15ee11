"""Who may take the lease, by the clock of the one who looks; and what is written into it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from ensemble_operator.control.lease import Effects, Election, Leadership, Terms, is_pod_of

TERMS = Terms(duration_s=15, renew_within_s=10, retry_s=2)


class Leases:
    """As much of a cluster as leadership asks: leases by name."""

    def __init__(self, **held: dict[str, Any]) -> None:
        self.held = {name.replace("_", "-"): lease for name, lease in held.items()}

    async def read_lease(self, namespace: str, name: str, timeout_s: float) -> dict[str, Any] | None:
        return self.held.get(name)

    async def write_lease(self, lease: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self.held[lease["metadata"]["name"]] = lease
        return lease


def lease(holder: str, version: int, duration_s: int = 15) -> dict[str, Any]:
    spec = {"holderIdentity": holder, "renewTime": "2020-01-01T00:00:00.000000Z", "leaseDurationSeconds": duration_s}
    return {"metadata": {"name": "n", "namespace": "ns", "resourceVersion": str(version)}, "spec": spec}


def test_nobody_holds_it() -> None:
    election = Election("me", TERMS)
    assert election.wait_s(None, 0) == 0
    assert election.wait_s(lease("", 1), 0) == 0


def test_my_own_from_before_a_crash_is_taken_at_once() -> None:
    assert Election("me", TERMS).wait_s(lease("me", 1), 0) == 0


def test_anothers_is_waited_for_from_when_it_was_seen_whatever_its_clock_says() -> None:
    election = Election("me", TERMS)
    assert election.wait_s(lease("you", 1), 100) == 15
    assert election.wait_s(lease("you", 1), 110) == 5
    assert election.wait_s(lease("you", 1), 115) == 0


def test_a_renewal_starts_the_wait_anew() -> None:
    election = Election("me", TERMS)
    election.wait_s(lease("you", 1), 100)
    assert election.wait_s(lease("you", 2), 114) == 15
    assert election.wait_s(lease("you", 2), 128) == 1


def test_the_holders_duration_counts_not_mine() -> None:
    election = Election("me", TERMS)
    assert election.wait_s(lease("you", 1, duration_s=40), 0) == 40


def test_taking_counts_transitions_and_renewing_does_not() -> None:
    election = Election("me", TERMS)
    first = election.written(None, "ns", "n", 1_700_000_000.25, held=True)
    assert first["metadata"] == {"name": "n", "namespace": "ns"}
    assert first["spec"] == {
        "acquireTime": "2023-11-14T22:13:20.250000Z",
        "renewTime": "2023-11-14T22:13:20.250000Z",
        "leaseTransitions": 0,
        "holderIdentity": "me",
        "leaseDurationSeconds": 15,
    }
    taken = election.written(lease("you", 7), "ns", "n", 1_700_000_000, held=True)
    assert taken["spec"]["leaseTransitions"] == 1
    assert taken["metadata"]["resourceVersion"] == "7"
    renewed = election.written(taken, "ns", "n", 1_700_000_002, held=True)
    assert renewed["spec"]["acquireTime"] == taken["spec"]["acquireTime"]
    assert renewed["spec"]["renewTime"] != taken["spec"]["renewTime"]
    assert renewed["spec"]["leaseTransitions"] == 1


def test_given_up_it_is_anybodys_at_once() -> None:
    given_up = Election("me", TERMS).written(lease("me", 3), "ns", "n", 0, held=False)
    assert Election("you", TERMS).wait_s(given_up, 0) == 0


def test_suspension_comes_before_another_can_take_it() -> None:
    """Whoever acts without a renewal, a stuck loop included, ends before the lease does."""
    terms = Terms()
    assert terms.renew_within_s + terms.grace_s + terms.grace_s / 4 < terms.duration_s
    assert terms.retry_s < terms.renew_within_s / 2


@pytest.mark.parametrize(
    ("pod", "ours"),
    [
        ("one-ensemble-operator-6d4cf56db6-x7k2p", True),
        ("two-ensemble-operator-6d4cf56db6-x7k2p", False),
        ("one-ensemble-operator-two-6d4cf56db6-x7k2p", False),
        ("one-ensemble-operator", False),
        ("machine-4711", False),
        ("", False),
    ],
)
def test_pods_of_a_deployment_are_told_by_their_names(pod: str, ours: bool) -> None:
    assert is_pod_of("one-ensemble-operator", pod) is ours


async def leads_at_once(leases: Leases, name: str) -> bool:
    terms = Terms(retry_s=0.01)
    leadership = Leadership(leases, "ns", f"{name}-85c6f4d9b7-aaaaa", Effects(lost=print), terms, name)  # type: ignore[arg-type]
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(leadership.acquire(), 0.3)
    leads = leadership.leads
    await leadership.release()
    return leads


async def test_a_lease_of_its_own_waits_for_a_former_pod_that_leads_by_the_default_name() -> None:
    former = lease("one-6d4cf56db6-x7k2p", 1)
    leases = Leases(ensemble_operator=former)
    assert not await leads_at_once(leases, "one")
    assert "one" not in leases.held
    leases.held["ensemble-operator"] = Election("one-6d4cf56db6-x7k2p", TERMS).written(former, "", "", 0, held=False)
    assert await leads_at_once(leases, "one")


async def test_a_lease_of_its_own_waits_for_no_other_release() -> None:
    leases = Leases(ensemble_operator=lease("two-6d4cf56db6-x7k2p", 1))
    assert await leads_at_once(leases, "one")
    assert leases.held["ensemble-operator"]["spec"]["holderIdentity"] == "two-6d4cf56db6-x7k2p"
