"""The dispatcher under every order of events that hypothesis can think of, checked by the ledger's books.

All devices are equally fast here, so that there is never a reason to let an idle lane wait.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ensemble_contract.wire import LiveInstance, State
from ensemble_gateway.batches import Batch
from ensemble_gateway.queues import Request
from tests.support.dispatch_ledger import Ledger
from tests.support.dispatch_world import Device, World, affine

MEMBERS = 3
WORKERS = 3
# Too long for several members to run as one batch, and brief enough.
ROWS_S = (0.002, 0.00001)
PICK = st.integers(0, 1 << 16)


class DispatcherMachine(RuleBasedStateMachine):
    """Workers, clients and the clock, each doing what it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(MEMBERS, slots=60)
        self.hosted: dict[str, dict[int, int]] = {}
        self.serial: dict[str, bool] = {}
        self.row_s = 0.0
        self.next_id = 1

    @initialize(serial=st.lists(st.booleans(), min_size=WORKERS, max_size=WORKERS), row_s=st.sampled_from(ROWS_S))
    def start(self, serial: list[bool], row_s: float) -> None:
        self.row_s = row_s
        self.serial = {f"w{index}": one for index, one in enumerate(serial)}

    @rule(
        worker=PICK, members=st.sets(st.integers(0, MEMBERS - 1)), size=st.sampled_from([1, 4, 16]), keep=st.booleans()
    )
    def state(self, worker: int, members: set[int], size: int, keep: bool) -> None:
        """A worker comes, changes what it hosts, or has nothing to host any more."""
        name = f"w{worker % WORKERS}"
        before = self.hosted.get(name, {}) if keep else {}
        ids = {}
        for member in sorted(members):
            ids[member] = before.get(member, self.next_id)
            self.next_id += 1
        self.hosted[name] = ids
        live = tuple(LiveInstance(ids[m], *self.ledger.members[m], size, size * self.row_s) for m in ids)
        self.ledger.update(State(name, 1, live, self.serial[name], 2))

    @rule(worker=PICK)
    def lose(self, worker: int) -> None:
        self.hosted.pop(f"w{worker % WORKERS}", None)
        self.ledger.lose(f"w{worker % WORKERS}")

    @rule(
        rows=st.sampled_from([1, 1, 1, 2, 5, 40]),
        wanted=st.sampled_from([7, 7, 7, 1, 2, 4, 5]),
        quorum=st.integers(1, 3),
        timeout_s=st.sampled_from([0.05, 1.0, 30.0]),
    )
    def admit(self, rows: int, wanted: int, quorum: int, timeout_s: float) -> None:
        quorum = min(quorum, wanted.bit_count())
        self.ledger.admit(rows, wanted=wanted, quorum=quorum, timeout_s=timeout_s)

    @rule(which=PICK)
    def cancel(self, which: int) -> None:
        if not self.ledger.open:
            return
        requests: list[Request] = sorted(self.ledger.open, key=lambda request: request.seq)
        self.ledger.cancel(requests[which % len(requests)])

    @rule()
    def assign(self) -> None:
        self.ledger.assign()
        for member in range(MEMBERS):
            if self.ledger.dispatcher.waiting_entries(member):
                assert not any(member in lane for lane in self._idle()), (
                    "nothing waits where an idle lane hosts its member"
                )

    def _idle(self) -> list[set[int]]:
        """The members of each idle lane."""
        busy_workers = {batch.lane.worker for batch in self.ledger.running.values()}
        busy_instances = {one.id for batch in self.ledger.running.values() for one in batch.instances}
        idle: list[set[int]] = []
        for name, ids in self.hosted.items():
            if not self.serial[name]:
                idle += [{member} for member, one in ids.items() if one not in busy_instances]
            elif name not in busy_workers:
                idle.append(set(ids))
        return idle

    def _answer(self, batch: Batch) -> None:
        self.ledger.answer(batch, *[batch.rows * self.row_s] * len(batch.instances))

    def _pick(self, which: int) -> Batch:
        batches = list(self.ledger.running.values())
        return batches[which % len(batches)]

    @rule(which=PICK)
    def answer(self, which: int) -> None:
        if not self.ledger.running:
            return
        batch = self._pick(which)
        self._answer(batch)

    @rule(which=PICK)
    def fail(self, which: int) -> None:
        if not self.ledger.running:
            return
        self.ledger.fail(self._pick(which), "no memory")

    @rule(which=PICK)
    def device_lost(self, which: int) -> None:
        if not self.ledger.running:
            return
        batch = self._pick(which)
        self.hosted.pop(batch.lane.worker)
        self.ledger.device_lost(batch)

    @rule(which=PICK)
    def unknown(self, which: int) -> None:
        if not self.ledger.running:
            return
        batch = self._pick(which)
        if len(batch.instances) == 1:
            # Of several it is not said which one is unknown: each is tried by itself.
            self.hosted[batch.lane.worker].pop(batch.instances[0].member, None)
        self.ledger.unknown(batch)

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.01, 0.1, 3.0]))
    def wait(self, seconds: float) -> None:
        self.ledger.now += seconds
        self.ledger.expire()

    @rule()
    def late_result(self) -> None:
        assert self.ledger.dispatcher.take(1 << 40, self.ledger.now) is None

    @invariant()
    def books_agree(self) -> None:
        ledger = self.ledger
        assert set(ledger.dispatcher.deadlines) == ledger.open
        for name in self.serial:
            running = sum(batch.lane.worker == name for batch in ledger.running.values())
            assert ledger.dispatcher.in_flight(name) == running
        for member in range(MEMBERS):
            alive = any(member in ids for ids in self.hosted.values())
            assert ledger.dispatcher.alive(member) == alive
        ledger.check_poison()

    def teardown(self) -> None:
        """With every member alive, all that is open ends by itself, long before its deadline."""
        for name in self.serial:
            self.state(int(name[1:]), set(range(MEMBERS)), 16, keep=True)
        for _ in range(400):
            self.assign()
            if not self.ledger.running:
                break
            self._answer(self._pick(0))
        assert not self.ledger.open, "nobody starves"
        assert self.ledger.allocator.free_slots == self.ledger.allocator.slots, "every slot is free again"


DispatcherMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestDispatcher = DispatcherMachine.TestCase


def chaos(seed: int) -> World:
    """A world of unequal devices in which batches fail, hang and kill, and clients leave."""
    dice = random.Random(seed)
    members = dice.randint(1, 6)
    devices = []
    for index in range(dice.randint(1, 5)):
        hosted = [member for member in range(members) if dice.random() < 0.7] or [dice.randrange(members)]
        scale, fixed_s = dice.choice([(1e-6, 1e-5), (1e-5, 5e-5), (0.0001, 0.0002), (0.001, 0.0002), (0.01, 0.0002)])
        seconds = {member: affine(fixed_s, dice.uniform(0.5, 2) * scale) for member in hosted}
        batch_size, serial = dice.choice([1, 4, 32]), dice.random() < 0.5
        credits_ = dice.choice([1, 2])
        devices.append(Device(f"w{index}", seconds, batch_size, serial, dice.choice("ab"), credits_))
    fates = (
        ["answer"] * 200 + ["fail"] * dice.randint(0, 3) + ["lose"] * dice.randint(0, 3) + ["hang"] * dice.randint(0, 1)
    )
    world = World(
        members,
        devices,
        message_s=dice.choice([0, 0.00012]),
        fate=lambda _: dice.choice(fates),
        max_delay_s=dice.choice([0, 0.002]),
        restart_s=0.5,
    )
    ledger = world.ledger

    def ask() -> None:
        wanted = ledger.everyone if dice.random() < 0.8 else 1 << dice.randrange(members)
        quorum = dice.randint(1, wanted.bit_count())
        rows, timeout_s = dice.choice([1, 1, 1, 2, 7, 100]), dice.choice([0.05, 1, 5])
        request = ledger.admit(rows, wanted=wanted, quorum=quorum, timeout_s=timeout_s)
        if request is not None and dice.random() < 0.1:
            world.after(dice.uniform(0, 0.05), lambda: ledger.cancel(request))

    for _ in range(dice.randint(1, 100)):
        world.after(dice.uniform(0, 1), ask)
    for _ in range(dice.randint(0, 3)):
        world.after(dice.uniform(0, 1), lambda: world.lose(dice.choice(devices).name))
    world.check_overdue()
    return world


def tiny(seed: int) -> World:
    """A world in which nearly all batches are of several members: brief ones on serial lanes, under many clients."""
    dice = random.Random(seed)
    members = dice.randint(2, 8)
    devices = [
        Device(
            f"w{index}", {m: affine(1e-5, dice.uniform(0.5, 2) * 1e-6) for m in range(members)}, dice.choice([4, 64])
        )
        for index in range(dice.randint(1, 3))
    ]
    fates = ["answer"] * 300 + ["fail"] * dice.randint(0, 3) + ["lose"] * dice.randint(0, 2)
    world = World(members, devices, message_s=dice.choice([0, 0.0001]), fate=lambda _: dice.choice(fates))
    ledger = world.ledger

    def ask() -> None:
        request = ledger.admit(dice.choice([1, 1, 1, 3, 70]), quorum=dice.randint(1, members), timeout_s=5)
        if request is not None and dice.random() < 0.1:
            world.after(dice.uniform(0, 0.001), lambda: ledger.cancel(request))

    for _ in range(300):
        world.after(dice.uniform(0, 0.03), ask)
    return world


@pytest.mark.parametrize("make", [chaos, tiny])
@pytest.mark.parametrize("seed", range(25))
def test_whatever_happens_every_request_ends_once_and_every_slot_is_freed(
    seed: int, make: Callable[[int], World]
) -> None:
    world = make(seed)
    world.run(for_s=60)
    world.ledger.check_poison()
    assert not world.ledger.open
    assert world.ledger.allocator.free_slots == world.ledger.allocator.slots
    assert world.ledger.ended
