"""All children of an ensemble, in the order in which they are to be applied: what pods need before the pods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ensemble_operator.manifests.contents import plan_config_map, profiles_config_map, secret, service_account
from ensemble_operator.manifests.gateway import gateway_deployment
from ensemble_operator.manifests.inputs import Children
from ensemble_operator.manifests.keeping import keep_running
from ensemble_operator.manifests.names import GATEWAY, WORKER, Manifest
from ensemble_operator.manifests.network import (
    disruption_budget,
    gateway_policy,
    gateway_service,
    worker_policy,
    worker_service,
)
from ensemble_operator.manifests.worker import claim_template, worker_stateful_set


def children(
    inputs: Children, running: Mapping[tuple[str, str], Mapping[str, Any]] | None = None
) -> tuple[Manifest, ...]:
    """The manifests to apply. `running`: the live StatefulSets and Deployments by kind and name (see `keep_running`).

    Labelled objects of the ensemble that are not among these, and that `inputs` has not left out, are surplus.
    """
    live = running or {}
    return (
        *_contents(inputs),
        *_network(inputs),
        *(
            keep_running(workload, live.get((workload["kind"], workload["metadata"]["name"])))
            for workload in _workloads(inputs)
        ),
    )


def _contents(inputs: Children) -> Iterator[Manifest]:
    ensemble, uid = inputs.ensemble, inputs.uid
    for component, held in ((WORKER, inputs.worker_secret), (GATEWAY, inputs.gateway_secret)):
        yield service_account(ensemble, uid, component)
        if held is not None:
            yield secret(ensemble, uid, component, held)
    if inputs.plan is not None:
        yield plan_config_map(ensemble, uid, inputs.plan, inputs.plan_annotations)
    if inputs.profiles is not None:
        yield profiles_config_map(ensemble, uid, inputs.profiles)


def _network(inputs: Children) -> Iterator[Manifest]:
    ensemble, uid, namespace = inputs.ensemble, inputs.uid, inputs.settings.operator_namespace
    yield worker_service(ensemble, uid)
    yield gateway_service(ensemble, uid)
    yield worker_policy(ensemble, uid, namespace)
    yield gateway_policy(ensemble, uid, namespace)
    yield disruption_budget(ensemble, uid, WORKER)
    if ensemble.spec.gateway.replicas > 1:
        yield disruption_budget(ensemble, uid, GATEWAY)
    for pool, devices in enumerate(inputs.pools):
        if devices.device_class:
            yield claim_template(ensemble, uid, pool, devices)


def _workloads(inputs: Children) -> Iterator[Manifest]:
    ensemble, uid, settings = inputs.ensemble, inputs.uid, inputs.settings
    for pool, (devices, replicas) in enumerate(zip(inputs.pools, inputs.replicas, strict=True)):
        yield worker_stateful_set(ensemble, uid, settings, pool, devices, replicas)
    yield gateway_deployment(ensemble, uid, settings)
