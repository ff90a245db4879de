"""Rules, dashboard and traces, against what real servers really publish."""

from __future__ import annotations

import base64
import http.server
import json
import re
import shutil
import subprocess
import threading
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.gateway.doors import PROMPT, SMALL, Gateway, bearer, http2, wait_until

pytestmark = pytest.mark.gateway

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = json.loads((DOCKER / "grafana" / "fullpipe.json").read_text())
RULES = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())
# Triton's own, on machines with an NVIDIA GPU only
# (docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/metrics.html).
GPU = {
    "nv_gpu_utilization",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_memory_total_bytes",
    "nv_gpu_power_usage",
}
# Made by Prometheus, and by pipelines once the caches are switched on (test_caches.py has them).
OTHERS = {"up", "fullpipe_embedding_cache_total", "fullpipe_result_cache_total", "ALERTS"}


def promtool(*arguments: str) -> str:
    tool = shutil.which("promtool")
    assert tool, "promtool is missing: apt-get install prometheus"
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_configuration_and_rules():
    assert "SUCCESS" in promtool("check", "config", str(DOCKER / "prometheus" / "prometheus.yml"))


def test_alerts_fire_when_they_should_and_only_then():
    promtool("test", "rules", str(DOCKER / "prometheus" / "alerts_test.yml"))


def test_every_alert_has_a_unit_test_and_says_what_to_do():
    alerts = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
    tests = yaml.safe_load((DOCKER / "prometheus" / "alerts_test.yml").read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert {alert["alert"] for alert in alerts} == fired
    for alert in alerts:
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"].keys() == {"summary", "action"}


def expressions() -> dict[str, str]:
    """Every PromQL expression of rules and dashboard, by where it stands."""
    found = {}
    for group in RULES["groups"]:
        for rule in group["rules"]:
            found[rule.get("alert") or rule["record"]] = rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']} {panel['id']}"] = target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        found[variable["name"]] = variable["query"]["query"]
    return found


def metrics_of(expression: str) -> set[str]:
    bare = re.sub(r'"[^"]*"|\[[^]]*\]', "", expression)
    bare = re.sub(r"\b(by|on|without|ignoring)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\{[^}]*\}", "", bare)
    words = re.findall(r"[a-zA-Z_][\w:]*", bare)
    return {word for word in words if "_" in word or ":" in word or word == "up"} - {
        "avg_over_time",
        "label_values",
    }


@pytest.mark.triton
def test_every_metric_of_rules_and_dashboard_is_on_a_real_page(gateway, replicas, key):
    gateway.client(key).generate(PROMPT, **SMALL)

    def read_pages() -> str:
        pages = ""
        for url in (replicas[0].metrics_url, replicas[1].metrics_url, gateway.metrics_url):
            with urllib.request.urlopen(url, timeout=20) as response:
                pages += response.read().decode()
        return pages

    wait_until(lambda: "fullpipe_ticks_total{" in read_pages(), 20, "no ticks are published")
    pages = read_pages()
    published = set(re.findall(r"^# TYPE (\S+)", pages, re.MULTILINE)) | GPU | OTHERS
    published |= {
        rule["record"] for g in RULES["groups"] for rule in g["rules"] if "record" in rule
    }
    for where, expression in expressions().items():
        names = metrics_of(expression)
        assert names, where
        assert names <= published, f"{where}: {sorted(names - published)}"


def test_prometheus_takes_every_expression_of_the_dashboard(tmp_path):
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$pipeline", ".*")}
        for number, expression in enumerate(expressions().values())
        if not expression.startswith("label_values")
    ]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", str(path))


def test_panels_do_not_overlap():
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        own = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert not own & cells, panel["title"]
        cells |= own


class Collector:
    """What arrives at /v1/traces: bodies, and the spans of the loop."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.spans: list[dict] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.bodies.append(body)
                if b'"fullpipe.loop"' in body:
                    for resource in json.loads(body)["resourceSpans"]:
                        collector.spans += resource["scopeSpans"][0]["spans"]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()


def has_id(body: bytes, hexadecimal: str) -> bool:
    """Whether an export names an id, in protobuf or in one of the two spellings of JSON."""
    data = bytes.fromhex(hexadecimal)
    return any(form in body for form in (data, hexadecimal.encode(), base64.b64encode(data)))


@pytest.fixture(scope="module")
def collector():
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced_door(served_repository, collector, tmp_path_factory):
    from fullpipe.seal import sealed
    from fullpipe.server import ServerConfig, TritonServer
    from fullpipe.traces import traced

    config = ServerConfig(served_repository, http_port=0, grpc_port=0, metrics_port=0)
    with TritonServer(traced(sealed(config), collector.url)) as server:
        folder = tmp_path_factory.mktemp("gateway")
        with Gateway(folder, served_repository, [server], trace=True) as door:
            yield door


@pytest.mark.triton
def test_one_trace_goes_from_the_client_through_gateway_and_triton_into_the_loop(
    traced_door, collector
):
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = [
        *bearer(traced_door.key("a")),
        ("traceparent", f"00-{trace_id}-{span_id}-01"),
        ("X-Request-Id", "job-of-the-trace"),
    ]
    # Triton 2.51 hands headers of /infer over, and not those of /generate.
    values = {"prompt": ("BYTES", PROMPT), "seed": ("UINT64", 7), "width": ("INT32", 64)}
    values |= {"height": ("INT32", 64), "steps": ("INT32", 2)}
    tensors = [
        {"name": name, "datatype": datatype, "shape": [1], "data": [value]}
        for name, (datatype, value) in values.items()
    ]
    body = json.dumps({"inputs": tensors, "outputs": [{"name": "info"}]}).encode()
    answer = http2(traced_door, "POST", "/v2/models/full_pipeline/infer", headers, body)
    assert answer.status == 200, answer
    # One name from the gateway's log to the loop's answer.
    info = json.loads(json.loads(answer.body)["outputs"][0]["data"][0])
    assert info["job_id"] == "job-of-the-trace"
    wait_until(lambda: traced_door.log(job_id="job-of-the-trace"), 20, "the gateway logs nothing")
    assert traced_door.log(job_id="job-of-the-trace")[0]["trace_id"] == trace_id
    wait_until(lambda: collector.spans, 20, "the loop sends no spans")
    assert [span["name"] for span in collector.spans] == ["text", "queue", "loop", "vae_decode"]
    assert {span["traceId"] for span in collector.spans} == {trace_id}
    parent = collector.spans[0]["parentSpanId"]
    wait_until(
        lambda: any(
            has_id(body, trace_id) and has_id(body, parent)
            for body in collector.bodies
            if b'"fullpipe.loop"' not in body
        ),
        30,
        f"no span of Triton's is the loop's parent: {[body[:300] for body in collector.bodies]}",
    )


@pytest.mark.triton
def test_gateway_begins_a_trace_where_the_client_has_none(traced_door, collector):
    before = len(collector.spans)
    traced_door.client(traced_door.key("b")).generate(PROMPT, **SMALL)
    wait_until(lambda: len(collector.spans) > before, 20, "no spans")
    trace_id = collector.spans[-1]["traceId"]
    wait_until(
        lambda: trace_id in [line["trace_id"] for line in traced_door.log(call="infer")],
        20,
        f"the gateway logs no request of the trace {trace_id}",
    )
