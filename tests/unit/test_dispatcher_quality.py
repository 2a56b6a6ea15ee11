"""How good the dispatcher's decisions are, in a simulated world: makespans against the ideal, and lanes kept busy."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from ensemble_gateway import assignment, batches
from ensemble_gateway.queues import Request
from tests.support.dispatch_world import Device, World, affine

ROUND_TRIP_S = 0.00025
MESSAGE_S = 0.00012
Seconds = dict[int, Callable[[int], float]]


def devices(number: int, seconds: Seconds, batch_size: int = 128) -> list[Device]:
    return [Device(f"w{index}", seconds, batch_size) for index in range(number)]


def gpu(seconds: Seconds) -> Device:
    return Device("gpu", seconds, 64, serial=False, device_class="gpu")


def makespan_s(world: World, rows: int, warm: int = 4) -> float:
    """Of one request, when nothing else is there, after a few like it."""
    began = 0.0
    for _ in range(warm + 1):
        began = world.ledger.now
        assert world.ledger.admit(rows) is not None
        world.after(0, lambda: None)
        world.run()
    return world.ledger.now - began


class Clients:
    """So many clients, each asking for one row again as soon as it is answered."""

    def __init__(self, number: int, members: int, all_devices: list[Device], message_s: float = 0.0) -> None:
        self.waits_s: list[float] = []
        self.world = World(members, all_devices, round_trip_s=ROUND_TRIP_S, message_s=message_s, on_end=self._answered)
        for index in range(number):
            self.world.after(index * 1e-5, self._ask)

    def busy(self, warm_s: float, for_s: float) -> tuple[dict[str, float], float]:
        """The share of time that each device computed, and the rows per second, after a while."""
        self.world.run(for_s=warm_s)
        before = {name: device.busy_s for name, device in self.world.devices.items()}
        self.waits_s.clear()
        self.world.run(for_s=for_s)
        shares = {name: (device.busy_s - before[name]) / for_s for name, device in self.world.devices.items()}
        return shares, len(self.waits_s) / for_s

    def _ask(self) -> None:
        assert self.world.ledger.admit(1) is not None

    def _answered(self, request: Request) -> None:
        self.waits_s.append(self.world.ledger.now - request.admitted_at)
        self.world.after(ROUND_TRIP_S, self._ask)


def test_one_row_of_three_members_on_two_lanes_starts_with_the_longest() -> None:
    world = World(3, devices(2, {0: affine(0.045), 1: affine(0.030), 2: affine(0.025)}))
    assert makespan_s(world, 1) == pytest.approx(0.055, abs=2 * ROUND_TRIP_S)


def test_one_row_of_members_that_scatter_comes_close_to_the_best_order() -> None:
    dice = random.Random(1)

    def scattered(seconds: float) -> Callable[[int], float]:
        return lambda rows: rows * seconds * dice.uniform(0.9, 1.1)

    world = World(3, devices(2, {0: scattered(0.045), 1: scattered(0.030), 2: scattered(0.025)}))
    assert sum(makespan_s(world, 1, warm=0) for _ in range(50)) / 50 < 0.055 * 1.04


@pytest.mark.parametrize("batch_size", [32, 128])
@pytest.mark.parametrize("rows_s", [(0.001, 0.0006, 0.0004, 0.0003), (0.003, 0.002, 0.001, 0.0005), (2e-5,) * 4])
def test_many_rows_of_unequal_members_end_on_both_lanes_together(rows_s: tuple[float, ...], batch_size: int) -> None:
    fixed_s = 0.0003
    world = World(4, devices(2, {m: affine(fixed_s, row_s) for m, row_s in enumerate(rows_s)}, batch_size))
    took_s = makespan_s(world, 128)
    batches = 4 * -(-128 // batch_size) / 2
    ideal_s = sum(rows_s) * 128 / 2 + batches * fixed_s + ROUND_TRIP_S
    assert took_s < ideal_s * 1.01 + fixed_s
    busy = sorted(device.busy_s for device in world.devices.values())
    assert busy[1] - busy[0] < 0.02 * busy[1] + 5 * fixed_s


@pytest.mark.parametrize(
    "rows_s", [(0.001, 0.0006, 0.0004, 0.0003), (0.0001, 6e-5, 4e-5, 3e-5), (5e-5, 5e-5, 5e-5, 5e-5)]
)
def test_sixty_four_clients_keep_both_lanes_busy(rows_s: tuple[float, ...]) -> None:
    seconds = {member: affine(0.0003, row_s) for member, row_s in enumerate(rows_s)}
    shares, rate = Clients(64, 4, devices(2, seconds)).busy(0.3, 1.0)
    assert min(shares.values()) > 0.97
    assert rate > 0.75 * 2 / sum(rows_s)


def test_eight_clients_keep_both_lanes_busy_too() -> None:
    seconds = {member: affine(0.0003, row_s) for member, row_s in enumerate((0.001, 0.0006, 0.0004, 0.0003))}
    shares, _ = Clients(8, 4, devices(2, seconds)).busy(0.3, 1.0)
    assert min(shares.values()) > 0.97


def test_a_lane_waits_for_no_network_although_nothing_happens_while_its_batch_runs() -> None:
    seconds = {0: affine(0.008)}
    shares, _ = Clients(4, 1, devices(1, seconds, batch_size=1)).busy(0.1, 1.0)
    assert shares["w0"] > 0.999


@pytest.mark.parametrize(
    ("rows", "cpu_row_s"), [(1, 0.05), (16, 0.05), (128, 0.05), (1024, 0.05), (1024, 0.003), (300, 0.01)]
)
def test_a_slow_cpu_beside_a_gpu_is_used_only_where_that_is_no_slower(rows: int, cpu_row_s: float) -> None:
    on_gpu = {member: affine(0.002, 0.0001) for member in range(4)}
    alone_s = makespan_s(World(4, [gpu(on_gpu)]), rows)
    cpu = Device("cpu", {member: affine(0, cpu_row_s) for member in range(4)}, 8)
    both_s = makespan_s(World(4, [cpu, gpu(on_gpu)]), rows)
    assert both_s < alone_s * 1.02


def test_a_cpu_beside_a_gpu_shortens_what_is_long() -> None:
    on_gpu = {0: affine(0.0, 0.001)}
    cpu = Device("cpu", {0: affine(0.0, 0.003)}, 64)
    both_s = makespan_s(World(1, [cpu, gpu(on_gpu)]), 1000)
    assert both_s < 1.0 * 0.75 * 1.05, "together they do four rows where the GPU alone does three"


def test_clients_of_single_rows_are_not_sent_to_a_cpu_that_would_keep_them_waiting() -> None:
    on_gpu = {member: affine(0.002, 0.0001) for member in range(4)}
    cpu = Device("cpu", {member: affine(0, 0.05) for member in range(4)}, 8)
    clients = Clients(64, 4, [cpu, gpu(on_gpu)])
    shares, _ = clients.busy(0.3, 0.5)
    assert shares["cpu"] == 0
    assert max(clients.waits_s) < 0.03


@pytest.mark.parametrize("rows", [1, 8, 128, 512])
@pytest.mark.parametrize("slow_first", [False, True])
def test_a_lane_three_times_slower_gets_a_quarter(rows: int, slow_first: bool) -> None:
    fast = Device("fast", {member: affine(0, 0.001) for member in range(4)})
    slow = Device("slow", {member: affine(0, 0.003) for member in range(4)})
    world = World(4, [slow, fast] if slow_first else [fast, slow])
    assert makespan_s(world, rows) < rows * 4 * 0.00075 * 1.01 + ROUND_TRIP_S


def test_sixty_four_clients_on_unequal_lanes_lose_little() -> None:
    fast = Device("fast", {member: affine(0, 0.001) for member in range(4)})
    slow = Device("slow", {member: affine(0, 0.003) for member in range(4)})
    _, rate = Clients(64, 4, [slow, fast]).busy(0.5, 2.0)
    assert rate > 0.93 * (1000 + 333) / 4


def rate(clients: int, member_s: float) -> float:
    """Rows per second of four equal members on two lanes, where a batch keeps the gateway busy for 0.12 ms."""
    _, rows_per_s = Clients(clients, 4, devices(2, dict.fromkeys(range(4), affine(member_s))), MESSAGE_S).busy(0.1, 0.2)
    return rows_per_s


@pytest.mark.parametrize(
    ("member_s", "messages", "computing_s"),
    [(0.00002, 1, 0.00008), (0.00005, 1, 0.0002), (0.00008, 2, 0.00016), (0.00012, 2, 0.00024), (0.0002, 2, 0.0004)],
)
def test_one_row_goes_in_as_few_messages_as_its_lanes_are_worth(
    member_s: float, messages: int, computing_s: float
) -> None:
    world = World(4, devices(2, dict.fromkeys(range(4), affine(member_s))), message_s=MESSAGE_S)
    makespan_s(world, 1)
    before = world.batches
    took_s = makespan_s(world, 1, warm=0)
    assert world.batches - before == messages
    assert took_s < ROUND_TRIP_S + computing_s + messages * MESSAGE_S + 1e-9


@pytest.mark.parametrize(("clients", "factor"), [(1, 1.15), (8, 1.4), (64, 1.4)])
def test_tiny_members_are_served_faster_together_than_apart(
    clients: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = rate(clients, 0.00002)
    monkeypatch.setattr(assignment, "FUSE_S", 0.0)
    apart = rate(clients, 0.00002)
    assert together > factor * apart


@pytest.mark.parametrize(("clients", "factor"), [(1, 1.15), (8, 0.95), (64, 0.95)])
def test_lanes_that_share_brief_members_serve_one_client_faster_and_many_as_fast(
    clients: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = rate(clients, 0.00012)
    monkeypatch.setattr(batches, "SHARE_S", 1.0)
    assert shared > factor * rate(clients, 0.00012)


@pytest.mark.parametrize("shared", [True, False])
def test_a_thousand_lanes_share_what_there_is(shared: bool) -> None:
    members, lanes = 8, 1000
    seconds = {member: affine(0.001, 0.001) for member in range(members)}
    all_devices = [
        Device(f"w{index}", seconds if shared else {index % members: seconds[0]}, 32, serial=shared)
        for index in range(lanes)
    ]
    world = World(members, all_devices)
    took_s = makespan_s(world, 2000, warm=1)
    ideal_s = 0.001 * 2000 * members / lanes
    assert took_s < ideal_s * 1.6 + 0.002
