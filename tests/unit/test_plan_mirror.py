"""The mirror of a whole plan: whatever it places, each worker's row of it is a plan of its own."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ensemble_contract.plan import (
    EnsemblePlan,
    ModelSource,
    ServedMember,
    WorkerPlan,
    decode_plan,
    encode_plan,
    source_of,
)
from tests.unit.test_plan_contract import GATEWAY

NAMES = st.sampled_from(["a", "b", "c"])
DIGESTS = st.sampled_from(["d1", "d2"])


@st.composite
def ensembles(draw: st.DrawFn) -> EnsemblePlan:
    """Mirrors with one to three members in up to two versions, on up to four workers."""
    versions = draw(st.lists(st.tuples(NAMES, DIGESTS), min_size=1, unique=True))
    sources = tuple(ModelSource(name, digest, f"file:///{name}-{digest}", "onnx") for name, digest in versions)
    served = tuple(ServedMember(name, digest) for name, digest in dict(versions).items())
    cell = st.tuples(st.integers(0, len(sources) - 1), st.integers(1, 65_536))
    rows = draw(st.dictionaries(st.sampled_from("wxyz"), st.lists(cell, max_size=6, unique=True).map(tuple)))
    gateway = msgspec.structs.replace(
        GATEWAY, members=served, rule="mean", generation=draw(st.integers(0, (1 << 63) - 1))
    )
    return EnsemblePlan(gateway, sources, rows, draw(st.integers(0, 1 << 40)))


@given(ensembles())
def test_every_row_of_a_mirror_is_a_plan_of_just_its_cells(plan: EnsemblePlan) -> None:
    assert decode_plan(encode_plan(plan), EnsemblePlan) == plan
    for worker, row in plan.rows.items():
        found = plan.row(worker)
        assert decode_plan(encode_plan(found), WorkerPlan) == found
        cells = [(source_of(found.members, one), one.batch_size) for one in found.instances]
        assert cells == [(plan.sources[index], size) for index, size in row]
        assert set(found.members) == {source for source, _ in cells}
        assert (found.generation, found.row_cache_bytes) == (plan.generation, plan.row_cache_bytes)
