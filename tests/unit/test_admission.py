"""Whose body may be read when."""

from hypothesis import given
from hypothesis import strategies as st

from ensemble_gateway.admission import SMALL_BYTES, BodyBudget, Limits

LIMIT = 100 * SMALL_BYTES


class Client:
    """Remembers whether it was called."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.resumed = 0

    def resume_body(self) -> None:
        self.resumed += 1


def test_small_bodies_always_come() -> None:
    budget: BodyBudget[Client] = BodyBudget(limit=1)
    assert all(budget.admit(Client(), SMALL_BYTES) for _ in range(100))


def test_a_body_over_the_limit_comes_alone() -> None:
    budget: BodyBudget[Client] = BodyBudget(LIMIT)
    first, second = Client(), Client()
    assert budget.admit(first, 10 * LIMIT)
    assert not budget.admit(second, 10 * LIMIT)
    budget.release(first)
    assert second.resumed == 1
    assert budget.admit(second, 10 * LIMIT)


def test_turns_come_in_order() -> None:
    """A later body that would fit does not overtake: an earlier large one would wait for ever."""
    budget: BodyBudget[Client] = BodyBudget(LIMIT)
    holder, large, fits = Client(), Client(), Client()
    assert budget.admit(holder, LIMIT // 2)
    assert not budget.admit(large, LIMIT)
    assert not budget.admit(fits, LIMIT // 4)
    assert not budget.admit(large, LIMIT)
    budget.release(holder)
    assert (large.resumed, fits.resumed) == (1, 0)
    budget.release(large)
    assert fits.resumed == 1


def test_who_leaves_while_waiting_is_passed_over() -> None:
    budget: BodyBudget[Client] = BodyBudget(LIMIT)
    holder, leaver, last = Client(), Client(), Client()
    budget.admit(holder, LIMIT)
    budget.admit(leaver, LIMIT)
    budget.admit(last, LIMIT)
    budget.release(leaver)
    assert (leaver.resumed, last.resumed) == (0, 0)
    budget.release(holder)
    assert (leaver.resumed, last.resumed) == (0, 1)


def test_who_leaves_before_a_large_one_lets_the_next_in() -> None:
    """The first in the queue was what the others waited for."""
    budget: BodyBudget[Client] = BodyBudget(LIMIT)
    holder, large, fits = Client(), Client(), Client()
    budget.admit(holder, LIMIT // 2)
    budget.admit(large, LIMIT)
    budget.admit(fits, LIMIT // 4)
    budget.release(large)
    assert fits.resumed == 1


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(SMALL_BYTES + 1, 2 * LIMIT)), max_size=60))
def test_the_limit_holds_and_nobody_starves(steps: list[tuple[int, int]]) -> None:
    """Whoever asks twice in a row is taken to have read its body. In the end everyone was let in."""
    budget: BodyBudget[Client] = BodyBudget(LIMIT)
    clients = [Client(str(i)) for i in range(10)]
    asked: dict[Client, int] = {}
    admitted: dict[Client, int] = {}

    def learn() -> None:
        for client in clients:
            if client.resumed:
                client.resumed = 0
                admitted[client] = asked[client]
        assert sum(admitted.values()) <= LIMIT or len(admitted) == 1

    for index, size in steps:
        client = clients[index]
        if client in asked:
            budget.release(client)
            asked.pop(client)
            admitted.pop(client, None)
        else:
            asked[client] = size
            if budget.admit(client, size):
                admitted[client] = size
        learn()
    while admitted:
        client = next(iter(admitted))
        budget.release(client)
        del admitted[client], asked[client]
        learn()
    assert not asked


def test_the_time_for_a_body_grows_with_it() -> None:
    limits = Limits(stall_s=10, slowest_bytes_per_s=1000)
    assert limits.body_s(5000) == 15
