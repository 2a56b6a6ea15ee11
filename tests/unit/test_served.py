"""Which models a plan offers, with which outputs and labels."""

from __future__ import annotations

import pytest

from ensemble_contract.plan import GatewayPlan, ServedMember
from ensemble_contract.tensors import TensorSpec
from ensemble_gateway.request import RequestError
from ensemble_gateway.served import find_model, served_models

IMAGE = TensorSpec("image", "UINT8", (32, 32, 3))
CLASS = TensorSpec("class", "FP32", (2,))
DEPTH = TensorSpec("depth", "FP16", ())


def plan(rule: str) -> GatewayPlan:
    return GatewayPlan(
        generation=1,
        ensemble="pets",
        inputs=(IMAGE,),
        outputs=(CLASS, DEPTH),
        members=(ServedMember("small", "d1"), ServedMember("big", "d2", version="7")),
        workers=(),
        rule=rule,
        labels={"class": ("cat", "dog")},
        version="3",
    )


def test_the_ensemble_comes_first_and_members_carry_their_index_and_version() -> None:
    models = served_models(plan("mean"))
    assert list(models) == ["pets", "pets.small", "pets.big"]
    assert [(m.member, m.version) for m in models.values()] == [(None, "3"), (0, "1"), (1, "7")]
    for model in models.values():
        assert model.inputs == (IMAGE,)
        assert model.outputs == (CLASS, DEPTH)
        assert model.labels == {"class": ("cat", "dog")}


def test_without_a_rule_the_ensemble_answers_each_members_outputs() -> None:
    models = served_models(plan("none"))
    assert [(o.name, o.datatype, o.shape) for o in models["pets"].outputs] == [
        ("small.class", "FP32", (2,)),
        ("small.depth", "FP16", ()),
        ("big.class", "FP32", (2,)),
        ("big.depth", "FP16", ()),
    ]
    assert models["pets"].labels == {"small.class": ("cat", "dog"), "big.class": ("cat", "dog")}
    assert models["pets.big"].outputs == (CLASS, DEPTH)


def test_a_model_is_found_by_name_and_version() -> None:
    models = served_models(plan("mean"))
    assert find_model(models, "pets.big", None) is find_model(models, "pets.big", "7") is models["pets.big"]
    with pytest.raises(RequestError, match=r"version '8' of model 'pets.big' .* its version is '7'") as error:
        find_model(models, "pets.big", "8")
    assert error.value.status == 404


def test_an_unknown_model_names_a_bounded_number_of_those_served() -> None:
    models = served_models(
        GatewayPlan(1, "pets", (IMAGE,), (CLASS,), tuple(ServedMember(f"m{i}", "d") for i in range(64)), ())
    )
    with pytest.raises(RequestError) as error:
        find_model(models, "c" * 10_000, None)
    assert error.value.status == 404
    assert "ask for pets, pets.m0, pets.m1" in str(error.value)
    assert str(error.value).endswith("pets.m6 and 57 more")
    assert len(str(error.value)) < 300
