"""How pods are reached and disturbed: Services, NetworkPolicies, PodDisruptionBudgets."""

from __future__ import annotations

from ensemble_contract.pod import ADMIN_PORT, DATA_PORT, HTTP_PORT
from ensemble_operator.api import InferenceEnsemble
from ensemble_operator.manifests.names import GATEWAY, WORKER, Manifest, child_name, metadata, selector

_NAMESPACE_NAME = "kubernetes.io/metadata.name"
# DNS as clients send it, and as some clusters' DNS pods listen behind their Service.
_DNS_PORTS = (53, 5353)


def worker_service(ensemble: InferenceEnsemble, uid: str) -> Manifest:
    """The headless Service that gives each worker pod its DNS name, from the moment that it has an address."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(ensemble, uid, child_name(ensemble.name, WORKER), WORKER),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector(ensemble.name, WORKER),
            "ports": [
                {"name": "data", "port": DATA_PORT, "targetPort": "data", "protocol": "TCP"},
                {"name": "admin", "port": ADMIN_PORT, "targetPort": "admin", "protocol": "TCP"},
            ],
        },
    }


def gateway_service(ensemble: InferenceEnsemble, uid: str) -> Manifest:
    """The Service that clients use; it has the ensemble's name."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(ensemble, uid, ensemble.name, GATEWAY),
        "spec": {
            "type": ensemble.spec.gateway.service_type,
            "selector": selector(ensemble.name, GATEWAY),
            "ports": [{"name": "http", "port": HTTP_PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def worker_policy(ensemble: InferenceEnsemble, uid: str, operator_namespace: str) -> Manifest:
    """Workers: data from this ensemble's gateways, admin from the operator. They may fetch models from anywhere."""
    gateways = {"podSelector": {"matchLabels": selector(ensemble.name, GATEWAY)}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(ensemble, uid, child_name(ensemble.name, WORKER), WORKER),
        "spec": {
            "podSelector": {"matchLabels": selector(ensemble.name, WORKER)},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [gateways], "ports": [_tcp(DATA_PORT)]}, _admin(operator_namespace)],
        },
    }


def gateway_policy(ensemble: InferenceEnsemble, uid: str, operator_namespace: str) -> Manifest:
    """Gateways: HTTP from everywhere, admin from the operator; from there only to DNS and this ensemble's workers."""
    workers = {"podSelector": {"matchLabels": selector(ensemble.name, WORKER)}}
    names = [{"protocol": protocol, "port": port} for port in _DNS_PORTS for protocol in ("UDP", "TCP")]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(ensemble, uid, child_name(ensemble.name, GATEWAY), GATEWAY),
        "spec": {
            "podSelector": {"matchLabels": selector(ensemble.name, GATEWAY)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"ports": [_tcp(HTTP_PORT)]}, _admin(operator_namespace)],
            "egress": [{"to": [workers], "ports": [_tcp(DATA_PORT)]}, {"ports": names}],
        },
    }


def disruption_budget(ensemble: InferenceEnsemble, uid: str, component: str) -> Manifest:
    """At most one pod of a component is evicted at a time; one that does not work anyway does not hold up a drain."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(ensemble, uid, child_name(ensemble.name, component), component),
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": selector(ensemble.name, component)},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }


def _admin(operator_namespace: str) -> Manifest:
    rule: Manifest = {"ports": [_tcp(ADMIN_PORT)]}
    if not operator_namespace:
        return rule
    return {"from": [{"namespaceSelector": {"matchLabels": {_NAMESPACE_NAME: operator_namespace}}}], **rule}


def _tcp(port: int) -> Manifest:
    return {"protocol": "TCP", "port": port}
