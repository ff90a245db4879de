"""No way past the gateway: hundreds of requests, and what each of them gets."""

from __future__ import annotations

import json
import re

import pytest

from tests.gateway.doors import SMALL, bearer, http1, http2, picture_body, raw

pytestmark = [pytest.mark.gateway, pytest.mark.triton]

PIPE = "/v2/models/full_pipeline"
LOOP = "/v2/models/scheduler_model"
STREAM = "/v2/models/full_pipeline_stream"
CANCEL = json.dumps({"op": "cancel", "job_id": "long-gone"}).encode()
OWN_404 = b'{"error":"this gateway does not serve that path"}'


def tensors(**values) -> bytes:
    """The body of an infer request: strings and 32 bit numbers."""
    inputs = [
        {
            "name": name,
            "datatype": "BYTES" if isinstance(value, str) else "INT32",
            "shape": [1],
            "data": [value],
        }
        for name, value in values.items()
    ]
    return json.dumps({"inputs": inputs}).encode()


# What a client may do, and what it gets with a key. Everything below this list gets a 404.
SERVED = [
    ("GET", "/v2", None, 200),
    ("POST", "/v2/repository/index", b"{}", 200),
    *[
        ("GET", f"{model}{version}{what}", None, 200)
        for model in (PIPE, STREAM, LOOP)
        for version in ("", "/versions/1")
        for what in ("", "/ready", "/config")
        if not (model == PIPE and version and what == "")
    ],
    ("POST", f"{PIPE}/generate", picture_body(), 200),
    ("POST", f"{PIPE}/versions/1/generate", picture_body(), 200),
    ("POST", f"{STREAM}/generate_stream", picture_body(), 200),
    ("POST", f"{LOOP}/generate", CANCEL, 200),
    ("POST", f"{PIPE}/infer", tensors(prompt="a", steps=2, width=64, height=64), 200),
    ("POST", f"{LOOP}/infer", tensors(op="progress", job_id="gone", wait_ms=0), 200),
]
INNER = ("text_encoder", "vae_decoder", "vae_encoder", "image_encoder", "unet", "nobody")
NOT_SERVED = [
    *[("POST", f"/v2/models/{model}/{verb}") for model in INNER for verb in ("infer", "generate")],
    *[("GET", f"/v2/models/{model}{what}") for model in INNER for what in ("", "/ready", "/stats")],
    ("POST", f"{PIPE}/generate_stream"),
    ("POST", f"{STREAM}/infer"),
    ("POST", f"{STREAM}/generate"),
    ("GET", f"{PIPE}/stats"),
    ("GET", "/v2/models/stats"),
    ("GET", f"{PIPE}/versions/1/stats"),
    ("GET", f"{PIPE}/versions/2/ready"),
    ("GET", f"{PIPE}/versions/-1/config"),
    ("POST", f"{PIPE}/versions/2/infer"),
    ("POST", f"/v2/repository/models{PIPE[10:]}/load"),
    *[("POST", f"/v2/repository/models/full_pipeline/{verb}") for verb in ("load", "unload")],
    ("POST", "/v2/repository/models/text_encoder/unload"),
    ("GET", "/v2/repository/index"),
    *[
        (method, f"/v2/{kind}sharedmemory{region}/{verb}")
        for kind in ("system", "cuda")
        for region in ("", "/region/a")
        for method, verb in (("GET", "status"), ("POST", "register"), ("POST", "unregister"))
    ],
    *[
        (method, path)
        for method in ("GET", "POST")
        for path in ("/v2/trace/setting", f"{PIPE}/trace/setting", "/v2/logging")
    ],
    *[
        ("GET", path)
        for path in ("/metrics", "/", "/v1", "/ping", "/stats", "/healthz", "/v2/health")
    ],
    *[("POST", path) for path in ("/invocations", "/v2", "/v2/models", "/v2/health/ready")],
    *[
        (method, f"{PIPE}/ready")
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD")
    ],
    *[(method, f"{PIPE}/infer") for method in ("GET", "PUT", "DELETE", "HEAD", "OPTIONS")],
]
TRICKS = [
    ("GET", "//v2/models/full_pipeline/ready"),
    ("GET", "/v2//models/full_pipeline/ready"),
    ("GET", "/v2/models//full_pipeline/ready"),
    ("GET", "/v2/./models/full_pipeline/ready"),
    ("GET", "/v2/models/full_pipeline/./ready"),
    ("GET", "/v2/models/full_pipeline/../text_encoder/ready"),
    ("POST", "/v2/models/full_pipeline/../text_encoder/infer"),
    ("POST", "/v2/models/full_pipeline/../../systemsharedmemory/region/a/register"),
    ("GET", "/v2/models/full_pipeline/..;/text_encoder/ready"),
    ("GET", "/../v2/systemsharedmemory/status"),
    ("GET", "/v2/health/ready/../../systemsharedmemory/status"),
    ("GET", "/v2/health/ready/%2e%2e/%2e%2e/systemsharedmemory/status"),
    ("GET", "/v2/models/full_pipeline/%2e%2e/text_encoder/ready"),
    ("GET", "/v2/models/full_pipeline/%2E%2E%2Ftext_encoder/ready"),
    ("GET", "/v2/models/full_pipeline%2fready"),
    ("GET", "/v2/models%2ffull_pipeline/ready"),
    ("GET", "/v2/models/full_pipelin%65/ready"),
    ("GET", "/%76%32/models/full_pipeline/ready"),
    ("GET", "/v2/models/%66ull_pipeline/ready"),
    ("GET", "/v2/systemsharedmemory%2fstatus"),
    ("GET", "/v2/%73ystemsharedmemory/status"),
    ("GET", "/v2/models/full_pipeline/ready/"),
    ("GET", "/v2/models/full_pipeline/ready;x=1"),
    ("GET", "/v2/models/full_pipeline/ready%00"),
    ("GET", "/v2/models/full_pipeline/ready%20"),
    ("GET", "/v2/models/full_pipeline/ready%3f"),
    ("GET", "/v2/models/full_pipeline/ready%23"),
    ("GET", "/v2/models/full_pipeline/ready%0d%0aX:1"),
    ("GET", "/v2/models/full_pipeline/ready%252f"),
    ("GET", "/v2/models/full_pipeline\\ready"),
    ("GET", "/v2\\models\\full_pipeline\\ready"),
    ("GET", "/v2/models/full_pipeline/%c0%af../ready"),
    ("GET", "/v2/models/full_pipeline/..%c0%af../text_encoder/ready"),
    ("GET", "/v2/models/full_pipeline/%ff"),
    ("GET", "/V2/models/full_pipeline/ready"),
    ("GET", "/v2/Models/full_pipeline/ready"),
    ("GET", "/v2/models/FULL_PIPELINE/ready"),
    ("GET", "/v2/models/full_pipeline/READY"),
    ("GET", "/v2/models/full_pipeline|/ready"),
    ("GET", "/v2/models/full_pipeline/ready|x"),
    ("GET", "/v2/models/full_pipeline /ready".replace(" ", "+")),
    ("GET", "/v2/models/full_pipelinex/ready"),
    ("GET", "/v2/models/xfull_pipeline/ready"),
    ("GET", "/v2/models/full_pipelin/ready"),
    ("GET", "/v2/models/*/ready"),
    ("GET", "/v2/models/full_pipeline/versions/01/ready"),
    ("GET", "/v2/models/full_pipeline/versions/1.0/ready"),
    ("GET", "/v2/models/full_pipeline/versions//ready"),
    ("GET", "/v2/models/full_pipeline/versions/1/../../../text_encoder/ready"),
    ("POST", "/v2/models/scheduler_model/infer/../../text_encoder/infer"),
    ("GET", "/" + "a" * 4000),
    ("GET", "/" + "../" * 300 + "v2/systemsharedmemory/status"),
]


def name_of(row) -> str:
    return re.sub(r"[^!-~]", "?", f"{row[0]} {row[1]}")[:90]


PROTOCOLS = pytest.mark.parametrize("send", [http1, http2], ids=["h1", "h2"])


@PROTOCOLS
@pytest.mark.parametrize("row", SERVED, ids=name_of)
def test_what_is_served_needs_a_key(gateway, key, send, row):
    method, path, body, status = row
    answer = send(gateway, method, path, bearer(key), body)
    assert answer.status == status, answer
    assert answer.body != OWN_404
    for headers in ([], bearer("fp_" + "A" * 43), bearer(""), [("Authorization", f"Basic {key}")]):
        refused = send(gateway, method, path, headers, body)
        assert refused.status == 401
        assert refused.headers["www-authenticate"] == 'Bearer realm="fullpipe"'


@PROTOCOLS
@pytest.mark.parametrize("row", NOT_SERVED + TRICKS, ids=name_of)
def test_everything_else_is_refused(gateway, key, send, row):
    method, path = row
    body = b"{}" if method in ("POST", "PUT", "PATCH") else None
    answer = send(gateway, method, path, bearer(key), body)
    assert answer.status == 404, answer
    assert answer.body == (b"" if method == "HEAD" else OWN_404)
    assert send(gateway, method, path, [], body).status in ((200,) if row in HEALTH else (401,)), (
        "a stranger hears which paths there are"
    )


HEALTH = [("GET", "/v2/health/live"), ("GET", "/v2/health/ready")]


@PROTOCOLS
@pytest.mark.parametrize("row", HEALTH, ids=name_of)
def test_health_needs_no_key_and_tells_nothing(gateway, send, row):
    answer = send(gateway, *row)
    assert (answer.status, answer.body) == (200, b"")
    assert gateway.log(job_id=answer.headers["x-request-id"])[0]["replica"] == "<NOSRV>"


@PROTOCOLS
@pytest.mark.parametrize("row", SERVED, ids=name_of)
def test_revoked_key_gets_nothing(gateway, revoked_key, send, row):
    method, path, body, _ = row
    assert send(gateway, method, path, bearer(revoked_key), body).status == 401


def test_index_lists_the_pipelines_and_nothing_else(gateway, key):
    answer = http1(gateway, "POST", "/v2/repository/index", bearer(key), b"{}")
    assert json.loads(answer.body) == [{"name": "full_pipeline", "version": "1", "state": "READY"}]


@PROTOCOLS
def test_query_is_dropped_and_either_header_carries_a_key(gateway, key, send):
    assert send(gateway, "GET", f"{PIPE}/ready?x=/../..", bearer(key)).status == 200
    assert send(gateway, "GET", f"{PIPE}/ready", [("X-API-Key", key)]).status == 200
    assert send(gateway, "GET", f"{PIPE}/ready", [("authorization", f"bearer {key}")]).status in (
        200,
        401,
    )


CREDENTIALS = [
    ("two keys", lambda key: [*bearer(key), *bearer(key)], 401),
    ("a wrong key first", lambda key: [*bearer("fp_x"), *bearer(key)], 401),
    ("both headers", lambda key: [*bearer(key), ("X-API-Key", key)], 401),
    ("a wrong key in the other header", lambda key: [*bearer(key), ("X-API-Key", "x")], 401),
    ("a key in the query's place", lambda key: [("Cookie", f"key={key}")], 401),
    ("its hash", lambda key: bearer(__import__("hashlib").sha256(key.encode()).hexdigest()), 401),
    ("upper case", lambda key: bearer(key.upper()), 401),
    ("cut short", lambda key: bearer(key[:-1]), 401),
    ("one more", lambda key: bearer(key + "A"), 401),
    ("two in a list", lambda key: [("Authorization", f"Bearer {key}, Bearer {key}")], 401),
    ("no scheme", lambda key: [("Authorization", key)], 401),
    ("as a token", lambda key: bearer(f"eyJ.{key}.x"), 401),
    ("hop by hop", lambda key: [*bearer(key), ("Connection", "keep-alive, authorization")], 200),
]


@pytest.mark.parametrize("row", CREDENTIALS, ids=[row[0] for row in CREDENTIALS])
def test_credentials(gateway, key, row):
    _, headers, status = row
    answer = http1(gateway, "GET", f"{PIPE}/ready", headers(key))
    assert answer.status == status


GENERATE = f"POST {PIPE}/generate HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer KEY\r\n"
SMUGGLED = "GET /v2/systemsharedmemory/status HTTP/1.1\r\nHost: a\r\n\r\n"
READY = f"GET {PIPE}/ready HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer KEY\r\n"
SMUGGLING = [
    ("chunked", GENERATE + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, {411}),
    (
        "length and chunked",
        GENERATE + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        {400, 411},
    ),
    (
        "chunked and length",
        GENERATE + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + SMUGGLED,
        {400, 411},
    ),
    ("no length", GENERATE + "\r\n", {411}),
    ("two lengths", GENERATE + "Content-Length: 2\r\nContent-Length: 60\r\n\r\n{}", {400}),
    ("list of lengths", GENERATE + "Content-Length: 2, 60\r\n\r\n{}", {400}),
    ("signed length", GENERATE + "Content-Length: +2\r\n\r\n{}", {400}),
    ("negative length", GENERATE + "Content-Length: -2\r\n\r\n{}", {400}),
    ("hexadecimal length", GENERATE + "Content-Length: 0x2\r\n\r\n{}", {400}),
    ("huge length", GENERATE + "Content-Length: 99999999999999999999\r\n\r\n{}", {400, 413}),
    ("large length", GENERATE + "Content-Length: 50331649\r\n\r\n{}", {413}),
    ("space before colon", GENERATE + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", {400}),
    (
        "folded header",
        GENERATE + "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
        {400, 411, 501},
    ),
    (
        "strange coding",
        GENERATE + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        {400, 411, 422, 501},
    ),
    ("coding with tab", GENERATE + "Transfer-Encoding:\tchunked\r\n\r\n0\r\n\r\n", {400, 411}),
    ("coding twice", GENERATE + "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", {400, 411}),
    ("bare line feed", READY.replace("\r\n", "\n", 1) + "\r\n", {200, 400}),
    ("no host", READY.replace("Host: gateway\r\n", "") + "\r\n", {200, 400}),
    ("two hosts", READY + "Host: other\r\n\r\n", {400}),
    ("other host", READY.replace("Host: gateway", "Host: evil") + "\r\n", {200}),
    ("null in header", READY + "X: a\0b\r\n\r\n", {400}),
    ("null in path", READY.replace("/ready", "/ready\0") + "\r\n", {400}),
    ("tab in path", READY.replace("/ready", "/ready\t") + "\r\n", {200, 400, 404}),
    ("space in path", READY.replace("/ready", "/re ady") + "\r\n", {400}),
    ("fragment", READY.replace("/ready", "/ready#x") + "\r\n", {400, 404}),
    ("HTTP/0.9", f"GET {PIPE}/ready\r\n", {0, 400}),
    ("HTTP/1.0", READY.replace("HTTP/1.1", "HTTP/1.0") + "\r\n", {200}),
    ("HTTP/3.0", READY.replace("HTTP/1.1", "HTTP/3.0") + "\r\n", {400}),
    (
        "CONNECT",
        "CONNECT 127.0.0.1:8000 HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n"
        "Authorization: Bearer KEY\r\n\r\n",
        {400, 404},
    ),
    ("TRACE", READY.replace("GET", "TRACE") + "\r\n", {404}),
    ("asterisk", READY.replace(f"GET {PIPE}/ready", "OPTIONS *") + "\r\n", {404}),
    ("strange method", READY.replace("GET", "GET/v2") + "\r\n", {400, 404}),
    ("lower case method", READY.replace("GET", "get") + "\r\n", {404}),
    ("absolute form, served", READY.replace("GET /", "GET http://gateway/") + "\r\n", {200}),
    (
        "absolute form, other host",
        READY.replace("GET /", "GET http://127.0.0.1:8000/") + "\r\n",
        {200, 400},
    ),
    (
        "absolute form, not served",
        READY.replace(f"GET {PIPE}/ready", "GET http://gateway/v2/systemsharedmemory/status")
        + "\r\n",
        {404},
    ),
    ("absolute form, tricky", READY.replace("GET /", "GET http://gateway/v2/../") + "\r\n", {404}),
    (
        "upgrade to h2c",
        READY
        + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
        {200},
    ),
    (
        "websocket",
        READY + "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        {200},
    ),
    (
        "original url",
        READY
        + "X-Original-URL: /v2/systemsharedmemory/status\r\nX-Rewrite-URL: /v2/logging\r\n\r\n",
        {200},
    ),
    ("method override", READY + "X-HTTP-Method-Override: POST\r\n\r\n", {200}),
    (
        "forwarded for",
        READY + "X-Forwarded-For: 10.0.0.1\r\nForwarded: for=10.0.0.1\r\n\r\n",
        {200},
    ),
    ("content encoding", GENERATE + "Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", {400}),
    ("header section too large", READY + "X: " + "a" * 20000 + "\r\n\r\n", {400, 431}),
    ("job id of another form", READY + "X-Request-Id: a b\r\n\r\n", {200}),
    ("job id with quotes", READY + 'X-Request-Id: a","status":1\r\n\r\n', {200}),
    ("two job ids", READY + "X-Request-Id: a\r\nX-Request-Id: b\r\n\r\n", {200}),
]


@pytest.mark.parametrize("row", SMUGGLING, ids=[row[0] for row in SMUGGLING])
def test_smuggling(gateway, key, row):
    _, data, allowed = row
    answer = raw(gateway, data.replace("KEY", key).encode("latin-1"))
    assert answer.status in allowed, answer
    assert b"shared" not in answer.body


def test_request_inside_a_body_is_a_body(gateway, key):
    inner = READY.replace("KEY", key).replace(f"{PIPE}/ready", "/v2/logging") + "\r\n"
    body = picture_body() + b"\r\n\r\n" + inner.encode()
    before = len(gateway.log(status=404))
    answer = http1(gateway, "POST", f"{PIPE}/generate", bearer(key), body)
    assert answer.status in (400, 500)
    assert len(gateway.log(status=404)) == before


def test_job_id_goes_from_the_client_into_the_log_and_back(gateway, key):
    headers = [*bearer(key), ("X-Request-Id", "my-job.1")]
    assert http1(gateway, "GET", f"{PIPE}/ready", headers).headers["x-request-id"] == "my-job.1"
    (line,) = gateway.log(job_id="my-job.1")
    assert {name: line[name] for name in ("key", "pipeline", "call", "status", "address")} == {
        "key": "tester",
        "pipeline": "full_pipeline",
        "call": "ready",
        "status": 200,
        "address": "127.0.0.1",
    }
    odd = http1(gateway, "GET", f"{PIPE}/ready", [*bearer(key), ("X-Request-Id", 'a","x":1')])
    assert re.fullmatch(r"[0-9a-f-]{36}", odd.headers["x-request-id"])


def test_addresses(open_gateway):
    inside, outside = (
        open_gateway(allowed_addresses=["127.0.0.0/8"]),
        open_gateway(allowed_addresses=["10.0.0.0/8", "192.168.7.7"]),
    )
    assert http1(inside, "GET", f"{PIPE}/ready", bearer(inside.key("a"))).status == 200
    headers = [*bearer(outside.key("a")), ("X-Forwarded-For", "10.0.0.1")]
    answer = http1(outside, "GET", f"{PIPE}/ready", headers)
    assert (answer.status, answer.body) == (403, b'{"error":"this address is not allowed"}')
    assert http1(outside, "GET", "/v2/health/ready").status == 403


def test_body_limit(open_gateway):
    door = open_gateway(max_body_bytes=1000)
    key = door.key("a")
    fits = http1(door, "POST", f"{PIPE}/generate", bearer(key), picture_body())
    assert fits.status == 200
    too_long = http1(door, "POST", f"{PIPE}/generate", bearer(key), picture_body(pad="x" * 1000))
    assert too_long.status == 413
    assert json.loads(too_long.body)["error"].endswith("too large, allowed 1000 bytes")


def test_stages_are_served_when_asked_for_and_the_servers_still_refuse(open_gateway):
    door = open_gateway(serve_stages=True)
    answer = http1(
        door,
        "POST",
        "/v2/models/text_encoder/infer",
        bearer(door.key("a")),
        tensors(prompt="a"),
    )
    assert answer.status == 400
    assert b"answers the pipelines of its own server only" in answer.body


def test_secrets_are_in_no_log(gateway, replicas, key):
    prompt = "my-secret-prompt-4711"
    client = gateway.client(key)
    client.generate(prompt, **SMALL)
    list(client.stream(prompt, **SMALL))
    for path in (f"{PIPE}/generate", f"{PIPE}/generate?prompt={prompt}", f"/{prompt}/{key}"):
        http1(
            gateway, "POST", path, [*bearer(key), ("X-Note", prompt)], picture_body(prompt=prompt)
        )
    http1(gateway, "POST", f"{PIPE}/generate", bearer(key), picture_body(prompt=prompt, steps=0))
    http1(gateway, "POST", f"{PIPE}/generate", bearer(key + prompt), picture_body(prompt=prompt))
    http1(gateway, "POST", f"{PIPE}/generate", bearer(key), f'{{"prompt":"{prompt}"'.encode())
    raw(gateway, f"BAD {prompt} {key}\r\n\r\n".encode())
    logs = [gateway.log_path.read_text(), *("\n".join(r.tail) for r in replicas)]
    for log in logs:
        assert log
        assert prompt not in log
        assert key not in log
        assert key[:12] not in log
