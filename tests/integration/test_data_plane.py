"""The data plane from socket to socket: answers are the combination, rows stay with their request, errors apart."""

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec
import numpy as np
import pytest
import tritonclient.http.aio as triton
from tritonclient.utils import InferenceServerException

from ensemble_contract.plan import RULES, GatewayPlan
from ensemble_gateway.gateway import Gateway, StalePlan
from tests.support.data_plane import GatewayProcess, LocalGateway, Workers, gateway_process, serving
from tests.support.http_client import Array, Client, get, infer, infer_json, post, rows
from tests.support.plane_members import MLPS, TIMES, UNLUCKY, mlp_outputs

WEIGHTS = np.array([0.5, 1.0, 2.0], np.float32)


def normalised(values: Array) -> Array:
    scaled: Array = values / values.sum(-1, keepdims=True)
    return scaled


def shares(outputs: Array, weights: Array) -> Array:
    """What part of the votes each class has."""
    votes: Array = np.zeros(outputs.shape[1:], np.float32)
    for output, weight in zip(outputs, weights, strict=True):
        votes[np.arange(len(votes)), output.argmax(-1)] += weight
    votes /= weights.sum()
    return votes


EXPECTED: dict[str, Callable[[Array], Array]] = {
    "mean": lambda o: o.mean(0),
    "weightedMean": lambda o: np.tensordot(WEIGHTS, o, 1) / WEIGHTS.sum(),
    "geometricMean": lambda o: normalised(np.exp(np.log(o).mean(0))),
    "median": lambda o: normalised(np.median(o, 0)),
    "max": lambda o: normalised(o.max(0)),
    "min": lambda o: normalised(o.min(0)),
    "vote": lambda o: shares(o, np.ones(3, np.float32)),
    "weightedVote": lambda o: shares(o, WEIGHTS),
}


async def ask_in_chunks(local: LocalGateway, x: Array, clients: int, chunk: int) -> Array:
    """The answers to `x`, cut into requests that several clients send at the same time."""
    parts = [x[at : at + chunk] for at in range(0, len(x), chunk)]
    answers: dict[int, Array] = {}
    waiting = iter(enumerate(parts))

    async def client() -> None:
        async with await local.connect() as connection:
            for index, part in waiting:
                answers[index] = (await connection.ask(infer(part))).y()

    await asyncio.gather(*(client() for _ in range(clients)))
    return np.concatenate([answers[index] for index in range(len(parts))])


def weighted(workers: Workers, rule: str) -> GatewayPlan:
    plan = workers.plan(*MLPS, rule=rule)
    if not rule.startswith("weighted"):
        return plan
    members = [msgspec.structs.replace(m, weight=float(w)) for m, w in zip(plan.members, WEIGHTS, strict=True)]
    return msgspec.structs.replace(plan, members=tuple(members))


@pytest.mark.parametrize("rule", sorted(EXPECTED))
async def test_answers_are_the_combination(workers: Workers, rule: str) -> None:
    x = rows(160, 3)
    expected = EXPECTED[rule](mlp_outputs(x))
    async with serving(weighted(workers, rule)) as local:
        for clients in (1, 8):
            for chunk in (1, 7, 33, 160):
                np.testing.assert_allclose(
                    await ask_in_chunks(local, x, clients, chunk), expected, rtol=1e-4, atol=1e-6
                )
        async with await local.connect() as client:
            np.testing.assert_allclose((await client.ask(post(infer_json(x)))).y(), expected, rtol=1e-4, atol=1e-6)
            reply = await client.ask(infer(x, parameters={"members": True}))
            for member, output in zip(MLPS, mlp_outputs(x), strict=True):
                np.testing.assert_allclose(reply.y(f"{member}.y"), output, rtol=1e-4, atol=1e-6)


async def test_without_a_rule_every_members_output_is_answered(workers: Workers) -> None:
    assert set(EXPECTED) | {"none"} == set(RULES)
    x = rows(70)
    async with serving(workers.plan(*MLPS, rule="none")) as local, await local.connect() as client:
        reply = await client.ask(infer(x))
        for member, output in zip(MLPS, mlp_outputs(x), strict=True):
            np.testing.assert_allclose(reply.y(f"{member}.y"), output, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
async def test_rows_never_swap(workers: Workers) -> None:
    """Thousands of requests: of the ensemble and of members, some of clients that leave; every row is its own."""
    async with serving(workers.plan(*TIMES)) as local:
        await asyncio.gather(*(_ask_recognisably(local, seed, 50) for seed in range(48)))


async def _ask_recognisably(local: LocalGateway, seed: int, requests: int) -> None:
    chance = random.Random(seed)
    client = await local.connect()
    asked = 0
    while asked < requests:
        # No row is within 0.25 of another.
        x = np.arange(8, dtype=np.float32) + (seed * 1000 + asked) * 8 + np.zeros((chance.randint(1, 40), 1))
        x = (x + 0.25 * np.arange(len(x))[:, None]).astype(np.float32)
        model, factor = chance.choice((("echo", 2), ("echo", 2), ("echo.times3", 3), ("echo.times1", 1)))
        client.send(infer(x, model=model))
        if chance.random() < 0.02:
            client.close()
            client = await local.connect()
            continue
        np.testing.assert_allclose((await client.reply()).y(), factor * x, rtol=0, atol=0.1)
        asked += 1


async def test_a_member_that_fails_on_some_rows_fails_only_their_requests(workers: Workers) -> None:
    good, bad = rows(3), rows(3)
    bad[1, 0] = UNLUCKY
    async with serving(workers.plan("times1", "touchy", quorum=2)) as local:
        clients = [await local.connect() for _ in range(24)]
        for _ in range(4):
            replies = await asyncio.gather(*(c.ask(infer(bad if i % 6 == 0 else good)) for i, c in enumerate(clients)))
            for i, reply in enumerate(replies):
                if i % 6:
                    np.testing.assert_array_equal(reply.y(), good)
                else:
                    assert reply.status == 500
                    for part in ("member touchy", "worker w", "index out of range in self"):
                        assert part in reply.error
        # With a quorum of one, the other member's answer is enough.
        reply = await clients[0].ask(infer(bad, parameters={"quorum": 1}))
        np.testing.assert_array_equal(reply.y(), bad)
        assert json.loads(reply.body[: int(reply.headers["inference-header-content-length"])])["parameters"] == {
            "members_used": "times1",
            "members_missing": "touchy",
        }


@pytest.fixture(scope="module")
def gateway(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway process for stock clients."""
    plan = workers.plan(*MLPS, labels={"y": tuple(f"class{i}" for i in range(8))})
    with gateway_process(tmp_path_factory.mktemp("stock"), plan) as found:
        yield found


async def test_tritonclient_aio_works_unmodified(gateway: GatewayProcess) -> None:
    """Through the edge: inferences that it answers itself and those that it lends, on the same connections."""
    x = rows(5)
    expected = mlp_outputs(x).mean(0)
    async with triton.InferenceServerClient(f"127.0.0.1:{gateway.number}", conn_limit=2) as client:
        for binary_in in (True, False):
            tensor = triton.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x, binary_data=binary_in)
            for binary_out in (True, False):
                for encoding in (None, "gzip", "deflate"):
                    assert (await client.get_model_metadata("echo"))["platform"] == "ensemble"
                    result = await client.infer(
                        "echo",
                        [tensor],
                        outputs=[triton.InferRequestedOutput("y", binary_data=binary_out)],
                        request_compression_algorithm=encoding,
                        response_compression_algorithm=encoding,
                    )
                    np.testing.assert_allclose(result.as_numpy("y"), expected, rtol=1e-4, atol=1e-6)
        result = await client.infer("echo", [tensor], outputs=[triton.InferRequestedOutput("y", class_count=1)])
        assert result.as_numpy("y")[0][0].decode().endswith(f":class{int(expected[0].argmax())}")
        wrong = triton.InferInput("x", [1, 8], "FP64").set_data_from_numpy(np.zeros((1, 8)))
        with pytest.raises(InferenceServerException, match="does not match FP32") as error:
            await client.infer("echo", [wrong])
        assert error.value.status() == "400"
        statistics = await client.get_inference_statistics("echo.mlp1")
        assert statistics["model_stats"][0]["inference_stats"]["compute_infer"]["ns"] > 0


SYNC_CLIENT = """
import json, sys
import numpy as np
import tritonclient.http as triton
client = triton.InferenceServerClient(sys.argv[1], concurrency=4, connection_timeout=20, network_timeout=20)
x = np.array(json.loads(sys.argv[2]), dtype=np.float32)
answers = []
for binary in (True, False):
    tensor = triton.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x, binary_data=binary)
    answers += [client.infer("echo", [tensor]).as_numpy("y") for _ in range(3)]
    outputs = [triton.InferRequestedOutput("y", binary_data=binary)]
    answers.append(client.infer("echo", [tensor], outputs=outputs, request_compression_algorithm="gzip",
                                response_compression_algorithm="deflate").as_numpy("y"))
    answers += [r.get_result().as_numpy("y") for r in [client.async_infer("echo", [tensor]) for _ in range(8)]]
try:
    client.infer("nobody", [tensor])
except triton.InferenceServerException as error:
    refusal = [error.status(), error.message()]
print(json.dumps({
    "answers": [a.tolist() for a in answers],
    "refusal": refusal,
    "ready": [client.is_server_live(), client.is_server_ready(), client.is_model_ready("echo")],
    "config": client.get_model_config("echo")["platform"],
    "count": client.get_inference_statistics("echo")["model_stats"][0]["execution_count"],
}))
"""


async def test_tritonclient_sync_works_unmodified(gateway: GatewayProcess) -> None:
    x = rows(4)
    command = ["-c", SYNC_CLIENT, f"127.0.0.1:{gateway.number}", json.dumps(x.tolist())]
    child = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await asyncio.wait_for(child.communicate(), 40)
    finally:
        if child.returncode is None:
            child.kill()
    said = json.loads(output)
    assert len(said["answers"]) == 24
    for answer in said["answers"]:
        np.testing.assert_allclose(answer, mlp_outputs(x).mean(0), rtol=1e-4, atol=1e-6)
    assert said["refusal"][0] == "404"
    assert "model 'nobody' is not served here" in said["refusal"][1]
    assert said["ready"] == [True, True, True]
    assert said["config"] == "ensemble"
    assert said["count"] >= 24


@pytest.mark.slow
async def test_plans_change_without_a_failed_request(workers: Workers) -> None:
    """A newer plan serves as soon as it can; older ones are refused; what is in flight is answered by its own plan."""
    plan = workers.plan(*TIMES)
    stop = asyncio.Event()
    async with serving(plan) as local:

        async def ask_on() -> set[float]:
            seen = set()
            async with await local.connect() as client:
                while not stop.is_set():
                    seen.add(float((await client.ask(infer(np.ones((2, 8), np.float32)))).y()[0, 0]))
            return seen

        tasks = [asyncio.create_task(ask_on()) for _ in range(8)]
        await _follow(local.gateway, plan, ("max", "min", "mean", "max"))
        stop.set()
        seen = await asyncio.gather(*tasks)
    assert set.union(*seen) == {1.0, 2.0, 3.0}


async def _follow(gateway: Gateway, plan: GatewayPlan, rules: tuple[str, ...]) -> None:
    for generation, rule in enumerate(rules, start=2):
        following = msgspec.structs.replace(plan, generation=generation, rule=rule)
        gateway.adopt(following)
        gateway.adopt(following)
        async with asyncio.timeout(10):
            while gateway.pipeline.plan != following:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
    with pytest.raises(StalePlan, match="generation 1 is older than 5"):
        gateway.adopt(plan)
    async with asyncio.timeout(10):
        while gateway.retiring:
            await asyncio.sleep(0.01)


@pytest.fixture
async def client(gateway: GatewayProcess) -> AsyncIterator[Client]:
    async with await gateway.connect() as found:
        yield found


async def test_the_admin_api(gateway: GatewayProcess, client: Client) -> None:
    state = gateway.state()
    assert state["ready"]
    assert [member["name"] for member in state["members"]] == list(MLPS)
    assert all(member["live"] and member["instances"] == 2 for member in state["members"])
    assert [worker["connected"] for worker in state["workers"]] == [True, True]
    before = state["rows"]
    assert (await client.ask(infer(rows(7)))).status == 200
    assert gateway.state()["rows"] == before + 7
    assert b"nv_inference_count" in (await client.ask(get("/metrics"))).body
