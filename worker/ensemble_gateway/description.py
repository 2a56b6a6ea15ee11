"""How models describe themselves: V2 metadata, Triton's model configuration and repository index. Pure.

Sources: KServe Open Inference Protocol V2 (REST, "Model Metadata"); Triton's extensions "model configuration" and
"model repository". In the configuration an ensemble's steps name its members, which is how Triton's tools find the
models whose statistics belong together.
"""

from __future__ import annotations

from typing import Any

from ensemble_contract.plan import GatewayPlan
from ensemble_contract.tensors import TensorSpec
from ensemble_gateway.request import Model
from ensemble_gateway.served import output_of_member

SERVER_NAME = "ensemble-operator"
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
)

_ENSEMBLE = ("ensemble", "")
_PLATFORM_AND_BACKEND = {
    "torch-export": ("pytorch", "pytorch"),
    "torchscript": ("pytorch_libtorch", "pytorch"),
    "onnx": ("onnxruntime_onnx", "onnxruntime"),
}
_LATEST = -1


def server_metadata(version: str) -> dict[str, Any]:
    """What GET /v2 answers."""
    return {"name": SERVER_NAME, "version": version, "extensions": EXTENSIONS}


def model_metadata(plan: GatewayPlan, model: Model) -> dict[str, Any]:
    """Name, version and tensors of a model; the first dimension of every shape is the rows: any number (-1)."""
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": _platform_and_backend(plan, model)[0],
        "inputs": [_tensor_metadata(spec) for spec in model.inputs],
        "outputs": [_tensor_metadata(spec) for spec in model.outputs],
    }


def model_config(plan: GatewayPlan, model: Model, max_rows: int) -> dict[str, Any]:
    """Triton's configuration of a model. `max_rows`, the most rows of one request, is its `max_batch_size`."""
    platform, backend = _platform_and_backend(plan, model)
    config: dict[str, Any] = {
        "name": model.name,
        "platform": platform,
        "backend": backend,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": max_rows,
        "input": [_tensor_config(spec) for spec in model.inputs],
        "output": [_tensor_config(spec) for spec in model.outputs],
    }
    if model.member is None:
        config["ensemble_scheduling"] = {"step": [_step(plan, member.name) for member in plan.members]}
        config["parameters"] = {"combination_rule": {"string_value": plan.rule}}
    else:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": round(plan.max_delay_s * 1e6)}
    return config


def index_entry(model: Model, ready: bool) -> dict[str, str]:
    """One entry of the repository index."""
    if ready:
        return {"name": model.name, "version": model.version, "state": "READY", "reason": ""}
    return {
        "name": model.name,
        "version": model.version,
        "state": "UNAVAILABLE",
        "reason": "too few members have a live instance" if model.member is None else "no live instance",
    }


def _platform_and_backend(plan: GatewayPlan, model: Model) -> tuple[str, str]:
    if model.member is None:
        return _ENSEMBLE
    return _PLATFORM_AND_BACKEND[plan.members[model.member].format]


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.shape]}


def _tensor_config(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": f"TYPE_{spec.datatype}", "dims": list(spec.shape)}


def _step(plan: GatewayPlan, member: str) -> dict[str, Any]:
    return {
        "model_name": f"{plan.ensemble}.{member}",
        "model_version": _LATEST,
        "input_map": {spec.name: spec.name for spec in plan.inputs},
        "output_map": {spec.name: output_of_member(member, spec.name) for spec in plan.outputs},
    }
