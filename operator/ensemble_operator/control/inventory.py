"""Which devices the cluster has free for a pool, and what stands in the way of others. Pure.

Only to explain: pods are created whatever this says, and the scheduler decides. GPUs are counted from what nodes offer
less what pods on them request, or from ResourceSlices less what ResourceClaims hold; their class and memory come from
the labels of GPU Feature Discovery (MiB) or from the ResourceSlices (quantities).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ensemble_operator.api import Devices
from ensemble_operator.quantities import parse_quantity

Manifest = Mapping[str, Any]
Amounts = Mapping[str, Fraction]

PRODUCT_LABEL = "nvidia.com/gpu.product"
MEMORY_LABEL = "nvidia.com/gpu.memory"
MIB = 1 << 20
NOTHING = Fraction(0)
_ENDED = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Objects of the whole cluster, as listed at one moment."""

    nodes: Sequence[Manifest]
    pods: Sequence[Manifest]
    slices: Sequence[Manifest] = ()
    claims: Sequence[Manifest] = ()


@dataclass(frozen=True, slots=True)
class Supply:
    """What there is for a pool: free and existing devices by class, and nodes that are left out, by why."""

    free: Mapping[str, int]
    total: int
    left_out: Mapping[str, int]

    @property
    def free_count(self) -> int:
        """Free devices of all classes."""
        return sum(self.free.values())

    def text(self, what: str) -> str:
        """The supply in words; `what` is the resource that is asked for."""
        if not self.total:
            said = f"no node that may be used offers {what}"
        elif not self.free_count:
            said = f"none of {self.total} {what} that may be used is free ({', '.join(self.free)})"
        else:
            listed = ", ".join(f"{count} x {name}" for name, count in self.free.items() if count)
            said = f"free: {listed} (of {self.total} {what})"
        if self.left_out:
            said += "; nodes left out: " + ", ".join(f"{n} {why}" for why, n in self.left_out.items())
        return said


def supply(view: ClusterView, pool: Devices) -> Supply:
    """The devices of a cluster that a pool could get."""
    if pool.device_class:
        return _published(view, pool)
    used = _used_by_node(view.pods)
    free: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    total = 0
    for node in view.nodes:
        offered = _amounts((node.get("status") or {}).get("allocatable"))
        here = _devices_in(offered, pool)
        if not here:
            continue
        obstacle = _obstacle(node, pool)
        if obstacle:
            left_out[obstacle] += 1
            continue
        total += here
        taken: Amounts = used.get(node["metadata"]["name"], {})
        left = {name: amount - taken.get(name, NOTHING) for name, amount in offered.items()}
        free[_class_of(node, pool)] += _devices_in(left, pool)
    return Supply(dict(free), total, dict(left_out))


def resource_of(pool: Devices) -> str:
    """What a pool asks for, in a word or two."""
    if pool.device_class:
        return f"devices of class {pool.device_class}"
    if pool.resource == "cpu":
        return f"CPU devices of {pool.cores:g} cores and {(pool.memory_bytes or 0) // MIB} MiB"
    return pool.resource


def shortage(pool: Devices, wanted: int, held: int, found: Supply | None, quoted: str) -> str:
    """Why there are fewer devices than wanted, and what to do. `quoted` is the scheduler's own message."""
    what = resource_of(pool)
    said = [f"{held} of {wanted} devices held"]
    if found is not None:
        said.append(found.text(what))
        missing = wanted - held - found.free_count
        if missing > 0:
            said.append(f"{missing} more {what} needed: add nodes, free some, or lower spec.devices.count")
    if quoted:
        said.append(f"the scheduler says: {quoted}")
    if found is None and not quoted:
        said.append(f"waiting for {what}")
    return "; ".join(said)


def _published(view: ClusterView, pool: Devices) -> Supply:
    """Devices of drivers whose name the class has or ends with: which of them it selects, only the scheduler knows."""
    nodes = {node["metadata"]["name"]: node for node in view.nodes}
    held = set(_held(view.claims))
    free: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    total = 0
    for one in view.slices:
        spec = one.get("spec") or {}
        driver = spec.get("driver", "")
        if pool.device_class != driver and not pool.device_class.endswith(f".{driver}"):
            continue
        node = nodes.get(spec.get("nodeName", ""))
        obstacle = _obstacle(node, pool) if node is not None else ""
        devices = spec.get("devices") or ()
        if obstacle and devices:
            left_out[obstacle] += 1
            continue
        pool_name = (spec.get("pool") or {}).get("name", "")
        for device in devices:
            total += 1
            free[_published_class(device)] += (driver, pool_name, device.get("name", "")) not in held
    return Supply(dict(free), total, dict(left_out))


def _held(claims: Iterable[Manifest]) -> Iterator[tuple[str, str, str]]:
    """The devices that claims hold, by driver, pool and name."""
    for claim in claims:
        allocation = (claim.get("status") or {}).get("allocation") or {}
        for result in (allocation.get("devices") or {}).get("results") or ():
            yield result.get("driver", ""), result.get("pool", ""), result.get("device", "")


def _published_class(device: Manifest) -> str:
    body = device.get("basic") or device
    product = ((body.get("attributes") or {}).get("productName") or {}).get("string", "device")
    memory = ((body.get("capacity") or {}).get("memory") or {}).get("value")
    try:
        return f"{product} ({int(parse_quantity(memory)) // MIB} MiB)" if memory else str(product)
    except ValueError:
        return str(product)


def _class_of(node: Manifest, pool: Devices) -> str:
    if pool.resource == "cpu":
        return "CPU device"
    labels = node["metadata"].get("labels") or {}
    product, memory = labels.get(PRODUCT_LABEL, pool.resource), labels.get(MEMORY_LABEL)
    return f"{product} ({memory} MiB)" if memory else product


def _devices_in(amounts: Amounts, pool: Devices) -> int:
    """How many devices of a pool are in these amounts."""
    if pool.resource != "cpu":
        return max(0, int(amounts.get(pool.resource, 0)))
    cores, memory = Fraction(str(pool.cores or 1)), pool.memory_bytes or 1
    return max(0, min(int(amounts.get("cpu", NOTHING) / cores), int(amounts.get("memory", 0) / memory)))


def _obstacle(node: Manifest, pool: Devices) -> str:
    """Why a pool's pods cannot run on a node; empty if they can."""
    spec, labels = node.get("spec") or {}, node["metadata"].get("labels") or {}
    if spec.get("unschedulable"):
        return "cordoned"
    conditions = {c["type"]: c["status"] for c in (node.get("status") or {}).get("conditions") or ()}
    if conditions.get("Ready", "True") != "True":
        return "not ready"
    if any(labels.get(key) != value for key, value in pool.node_selector.items()):
        return "not selected by spec.devices.nodeSelector"
    for taint in spec.get("taints") or ():
        if taint.get("effect") != "PreferNoSchedule" and not _tolerated(taint, pool.tolerations):
            return f"with taint {taint.get('key')}"
    return ""


def _tolerated(taint: Manifest, tolerations: Iterable[Manifest]) -> bool:
    for one in tolerations:
        same_effect = not one.get("effect") or one["effect"] == taint.get("effect")
        if one.get("operator", "Equal") == "Exists":
            same = not one.get("key") or one["key"] == taint.get("key")
        else:
            same = one.get("key") == taint.get("key") and one.get("value", "") == (taint.get("value") or "")
        if same and same_effect:
            return True
    return False


def _used_by_node(pods: Iterable[Manifest]) -> Mapping[str, Amounts]:
    used: dict[str, dict[str, Fraction]] = {}
    for pod in pods:
        spec = pod.get("spec") or {}
        node = spec.get("nodeName")
        if not node or (pod.get("status") or {}).get("phase") in _ENDED:
            continue
        together: dict[str, Fraction] = {}
        for container in spec.get("containers") or ():
            for name, amount in _requests(container).items():
                together[name] = together.get(name, NOTHING) + amount
        for container in spec.get("initContainers") or ():
            for name, amount in _requests(container).items():
                together[name] = max(together.get(name, NOTHING), amount)
        on_node = used.setdefault(node, {})
        for name, amount in together.items():
            on_node[name] = on_node.get(name, NOTHING) + amount
    return used


def _requests(container: Manifest) -> dict[str, Fraction]:
    resources = container.get("resources") or {}
    return _amounts({**(resources.get("limits") or {}), **(resources.get("requests") or {})})


def _amounts(quantities: Mapping[str, str] | None) -> dict[str, Fraction]:
    found = {}
    for name, text in (quantities or {}).items():
        try:
            found[name] = parse_quantity(str(text))
        except ValueError:
            continue
    return found
