"""Random pairs of plans: each state on the way is safe, the way ends where it should, and is found if there is one."""

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ensemble_operator.rollout.placement import Blocked, Done, Running, Step, Waiting
from ensemble_operator.rollout.steps import next_step, steps
from tests.unit.rollout.worlds import Reality, World, check, finished, reachable, worlds

PATIENCE = 400
often = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
rarely = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def walk(world: World) -> None:
    """Step after step, each finished before the next, until it is done."""
    running = world.running
    check(world, running)
    for _ in range(PATIENCE):
        found = next_step(running, world.wanted, world.memory)
        if isinstance(found, Done):
            assert (running.planned, running.service) == (world.wanted.placement, world.wanted.service)
            return
        assert isinstance(found, Step), found
        between = replace(
            running,
            planned=found.placement,
            live=running.live & found.placement,
            lingering=running.planned - found.placement,
        )
        check(world, between)
        running = finished(running, found)
        check(world, running)
    raise AssertionError("it does not end")


@often
@given(worlds(slack=4))
def test_every_state_is_safe_and_the_last_is_what_is_wanted(world: World) -> None:
    sequence, blocked = steps(world.running, world.wanted, world.memory)
    if blocked is None:
        walk(world)
        placement = sequence[-1].placement if sequence else world.running.planned
        assert placement == world.wanted.placement
    else:
        assert isinstance(next_step(world.running, world.wanted, world.memory), Blocked)
        assert blocked.missing_bytes > 0


@often
@given(worlds(slack=5), st.integers(0, 1 << 30))
def test_in_any_order_of_events_it_is_safe_and_ends(world: World, seed: int) -> None:
    """Whoever asks may be restarted at any time: the next step depends on what is observed alone."""
    if steps(world.running, world.wanted, world.memory)[1] is not None:
        return
    reality = Reality(world, seed)
    for _ in range(PATIENCE):
        found = next_step(reality.running, world.wanted, world.memory)
        if isinstance(found, Done):
            assert reality.running == Running(world.wanted.placement, world.wanted.placement, world.wanted.service)
            return
        if isinstance(found, Step):
            reality.plan(found)
        else:
            assert isinstance(found, Waiting), found
            assert reality.pass_time()
        reality.pass_time()
    raise AssertionError("it does not end")


@often
@given(worlds(most_devices=2, most_members=2, slack=1))
def test_blocked_only_if_no_order_exists(world: World) -> None:
    blocked = steps(world.running, world.wanted, world.memory)[1]
    assert (blocked is None) == reachable(world)


@rarely
@given(worlds(most_devices=3, most_members=2, slack=1))
def test_blocked_only_if_no_order_exists_on_three_devices(world: World) -> None:
    blocked = steps(world.running, world.wanted, world.memory)[1]
    if blocked is not None:
        assert not reachable(world)


@often
@given(worlds(slack=0))
def test_with_pause_there_is_always_a_way(world: World) -> None:
    patient = replace(world, wanted=replace(world.wanted, pause=True))
    walk(patient)


@often
@given(worlds(slack=4))
def test_without_need_nothing_is_held(world: World) -> None:
    sequence, blocked = steps(world.running, replace(world.wanted, pause=True), world.memory)
    assert blocked is None
    without = steps(world.running, world.wanted, world.memory)[1]
    assert any(step.service.hold for step in sequence) == (without is not None)
