"""Settings from the environment: defaults, each kind of value, and everything that is wrong at once."""

from __future__ import annotations

import pytest

from ensemble_operator.control.settings import InvalidSettings, Settings


def test_defaults_without_any_variable() -> None:
    settings = Settings.from_environment({"PATH": "/bin"})
    assert settings == Settings()
    assert (
        settings.admin_url.format(ip="10.0.0.1", pod="p", namespace="n", component="worker") == "http://10.0.0.1:8081"
    )


def test_every_variable_is_read() -> None:
    settings = Settings.from_environment(
        {
            "ENSEMBLE_OPERATOR_NAMESPACE": "vision",
            "ENSEMBLE_OPERATOR_POD_NAMESPACE": "system",
            "ENSEMBLE_OPERATOR_POD_NAME": "operator-7d",
            "ENSEMBLE_OPERATOR_LEASE_NAME": "operator",
            "ENSEMBLE_OPERATOR_WORKER_IMAGE": "registry/worker:1",
            "ENSEMBLE_OPERATOR_GATEWAY_IMAGE": "registry/gateway:1",
            "ENSEMBLE_OPERATOR_IMAGE_PULL_POLICY": "IfNotPresent",
            "ENSEMBLE_OPERATOR_IMAGE_PULL_SECRETS": "registry, mirror,registry",
            "ENSEMBLE_OPERATOR_ALLOW_OVERRIDES": "True",
            "ENSEMBLE_OPERATOR_ADMIN_URL": "http://127.0.0.1:7000/{namespace}/{pod}",
            "ENSEMBLE_OPERATOR_WORKER_HOST": "{ip}",
            "ENSEMBLE_OPERATOR_METRICS_PORT": "0",
            "ENSEMBLE_OPERATOR_HEALTH_PORT": "8181",
            "ENSEMBLE_OPERATOR_LOG_FORMAT": "text",
            "ENSEMBLE_OPERATOR_LOG_LEVEL": "DEBUG",
            "ENSEMBLE_OPERATOR_WORKERS": "32",
            "ENSEMBLE_OPERATOR_RESYNC_S": "30",
        }
    )
    assert settings == Settings(
        namespace="vision",
        pod_namespace="system",
        pod_name="operator-7d",
        lease_name="operator",
        worker_image="registry/worker:1",
        gateway_image="registry/gateway:1",
        image_pull_policy="IfNotPresent",
        image_pull_secrets=("registry", "mirror"),
        allow_overrides=True,
        admin_url="http://127.0.0.1:7000/{namespace}/{pod}",
        worker_host="{ip}",
        metrics_port=0,
        health_port=8181,
        log_format="text",
        log_level="DEBUG",
        workers=32,
        resync_s=30,
    )


def test_an_empty_variable_is_none() -> None:
    assert Settings.from_environment({"ENSEMBLE_OPERATOR_WORKERS": "", "ENSEMBLE_OPERATOR_NAMESPACE": ""}) == Settings()


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("WORKERS", "0", "not a whole number in 1..256"),
        ("WORKERS", "many", "not a whole number in 1..256"),
        ("METRICS_PORT", "70000", "not a whole number in 0..65535"),
        ("ALLOW_OVERRIDES", "yes", "neither true nor false"),
        ("ADMIN_URL", "http://{host}:8081", "must name some of {component}, {ip}, {namespace}, {pod}, only"),
        ("ADMIN_URL", "http://{ip", "not a template"),
        ("WORKER_HOST", "worker", "must name some of {ip}, {namespace}, {pod}, {service}, only"),
        ("NAMESPACE", "Vision", "not a name"),
        ("LEASE_NAME", "a/b", "not a name"),
        ("IMAGE_PULL_SECRETS", "good,Bad", "'Bad' is not a name"),
        ("IMAGE_PULL_POLICY", "Sometimes", "not one of Always, IfNotPresent, Never"),
        ("RESYNC_S", "nan", "not a number of seconds"),
        ("LOG_FORMAT", "xml", "not one of json, text"),
        ("WORKES", "3", "not a setting; known are"),
    ],
)
def test_what_is_wrong_is_named(name: str, text: str, complaint: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environment({f"ENSEMBLE_OPERATOR_{name}": text})
    assert str(caught.value).startswith(f"ENSEMBLE_OPERATOR_{name}: ")
    assert complaint in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environment({"ENSEMBLE_OPERATOR_WORKERS": "0", "ENSEMBLE_OPERATOR_HEALTH_PORT": "x"})
    assert len(str(caught.value).splitlines()) == 2


def test_variables_that_kubernetes_writes_for_a_service_of_our_name_are_not_ours() -> None:
    links = {
        "ENSEMBLE_OPERATOR_SERVICE_HOST": "10.96.0.7",
        "ENSEMBLE_OPERATOR_SERVICE_PORT_METRICS": "9090",
        "ENSEMBLE_OPERATOR_PORT": "tcp://10.96.0.7:9090",
        "ENSEMBLE_OPERATOR_PORT_9090_TCP_ADDR": "10.96.0.7",
    }
    assert Settings.from_environment(links) == Settings()
