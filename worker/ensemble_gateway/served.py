"""Which models clients can name under a plan: the ensemble, and each member as `<ensemble>.<member>`. Pure."""

from __future__ import annotations

from ensemble_contract.plan import GatewayPlan, ServedMember
from ensemble_contract.tensors import TensorSpec
from ensemble_gateway.request import Model, RequestError

NAMED_MODELS = 8


def served_models(plan: GatewayPlan) -> dict[str, Model]:
    """The models by name: the ensemble first, then its members in the plan's order."""
    models = [_ensemble(plan), *(_member(plan, index, member) for index, member in enumerate(plan.members))]
    return {model.name: model for model in models}


def find_model(models: dict[str, Model], name: str, version: str | None) -> Model:
    """The model of this name and, if given, version.

    Raises RequestError (404) naming what is served.
    """
    model = models.get(name)
    if model is None:
        served = ", ".join(list(models)[:NAMED_MODELS])
        more = f" and {len(models) - NAMED_MODELS} more" if len(models) > NAMED_MODELS else ""
        raise RequestError(404, f"model {name[:80]!r} is not served here: ask for {served}{more}")
    if version is not None and version != model.version:
        raise RequestError(
            404, f"version {version[:80]!r} of model {name!r} is not served here: its version is {model.version!r}"
        )
    return model


def output_of_member(member: str, output: str) -> str:
    """The name under which an answer of the ensemble holds one member's output."""
    return f"{member}.{output}"


def _ensemble(plan: GatewayPlan) -> Model:
    outputs, labels = plan.outputs, plan.labels
    if plan.rule == "none":
        members = [member.name for member in plan.members]
        outputs = tuple(
            TensorSpec(output_of_member(member, o.name), o.datatype, o.shape)
            for member in members
            for o in plan.outputs
        )
        labels = {
            output_of_member(member, output): names for member in members for output, names in plan.labels.items()
        }
    return Model(plan.ensemble, plan.version, plan.inputs, outputs, labels)


def _member(plan: GatewayPlan, index: int, member: ServedMember) -> Model:
    return Model(f"{plan.ensemble}.{member.name}", member.version, plan.inputs, plan.outputs, plan.labels, member=index)
