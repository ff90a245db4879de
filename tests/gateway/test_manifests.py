"""Images, compose and Kubernetes manifests: what linters and schemas say, and what must hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from fullpipe.config import load_dataclass
from fullpipe.gateway import write_gateway
from fullpipe.gateway_settings import GatewayConfig
from fullpipe.haproxy import check_config

pytestmark = pytest.mark.gateway

DOCKER = Path(__file__).parents[2] / "docker"
OVERLAYS = ["cpu", "gpu", "gpu-keda"]
# Kinds that Kubernetes itself does not know.
CUSTOM = {"ScaledObject"}


def tool(name: str, *arguments: str) -> str:
    """Run a command that pip installed beside this Python, or that is on PATH."""
    beside = Path(sys.executable).parent / name
    command = str(beside) if beside.is_file() else name
    done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(DOCKER.glob("*.Dockerfile")), ids=lambda path: path.name)
def test_dockerfiles(path):
    tool("hadolint", str(path))
    text = path.read_text()
    assert "USER 10001:10001" in text
    assert "HEALTHCHECK" in text
    assert '"--sealed"' in text


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request):
    """Every document of an overlay, as kubectl builds it."""
    built = tool("kubectl", "kustomize", str(DOCKER / "kubernetes" / "overlays" / request.param))
    return list(yaml.safe_load_all(built))


def test_manifests_fit_kubernetes_schemas(manifests):
    for document in manifests:
        if document["kind"] not in CUSTOM:
            kubernetes_validate.validate(document, "1.34", strict=True)


def pods(manifests):
    for document in manifests:
        if document["kind"] in ("Deployment", "Job"):
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def test_pods_may_do_little(manifests):
    for name, pod in pods(manifests):
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"] + pod.get("initContainers", []):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"], (name, container["name"])
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert ":" in container["image"], "an image without a tag"


def test_servers_have_probes_a_drain_and_a_sealed_door(manifests):
    for name, pod in pods(manifests):
        if name not in ("triton", "gateway"):
            continue
        server = pod["containers"][0]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert probe in server, (name, probe)
        assert server["lifecycle"]["preStop"]
        if name == "triton":
            assert "--sealed" in server["args"]
            mounts = {mount["name"]: mount for mount in server["volumeMounts"]}
            assert mounts["repository"]["readOnly"]


def test_network_lets_nobody_but_the_gateway_reach_the_servers(manifests):
    policies = {d["metadata"]["name"]: d for d in manifests if d["kind"] == "NetworkPolicy"}
    assert policies["nothing"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for rule in policies["triton"]["spec"]["ingress"]:
        ports = {port["port"] for port in rule["ports"]}
        (source,) = rule["from"]
        if ports & {8000, 8001}:
            labels = source["podSelector"]["matchLabels"]
            assert labels == {"app.kubernetes.io/name": "gateway"}
        else:
            assert ports == {8002}
    services = {d["metadata"]["name"]: d["spec"] for d in manifests if d["kind"] == "Service"}
    exposed = {name for name, spec in services.items() if spec.get("type") == "LoadBalancer"}
    assert exposed == {"gateway"}


def test_one_autoscaler_and_it_asks_for_queue_and_rows(manifests):
    scalers = [d for d in manifests if d["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
    assert len(scalers) == 1
    text = json.dumps(scalers[0])
    assert "fullpipe_queued_images" in text
    assert "rows" in text


@pytest.mark.parametrize(
    "path",
    [DOCKER / "gateway" / "gateway.json", DOCKER / "kubernetes" / "base" / "gateway.json"],
    ids=["compose", "kubernetes"],
)
def test_gateway_settings_make_a_configuration(path, tmp_path, served_repository):
    config = load_dataclass(GatewayConfig, path)
    written = write_gateway(tmp_path, served_repository, config)
    check_config(written)
    text = written.read_text()
    (replica,) = config.replicas
    assert f"server-template triton- 1-{replica.count} {replica.host}:8000 check" in text
    assert "resolvers dns init-addr none" in text


def test_compose_exposes_the_gateway_alone():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    exposed = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert exposed.keys() == {"gateway", "grafana"}
    assert all(port.startswith("127.0.0.1:") for port in exposed["grafana"])
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    assert services["triton"]["shm_size"] == "1gb"
    assert services["triton"]["volumes"] == ["repository:/repository:ro"]
    assert "--sealed" in services["triton"]["command"]
