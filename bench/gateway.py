"""What the gateway costs a small request, and what it keeps a flood from costing the others.

The first number matters because a gateway stands before every request: a few milliseconds of TLS,
key and log would be felt by whoever asks for progress ten times a second. The second matters, as
keys with limits are only worth something if a flooding one leaves the others their speed.

Small requests alternate between the server itself and the gateway, both over connections that stay
open, the gateway's with TLS. In the second part one key makes pictures one at a time, alone and
while another key floods from four threads.

    python -m bench.gateway [--count 400] [--pictures 40]
"""

from __future__ import annotations

import argparse
import http.client
import json
import ssl
import tempfile
import threading
import time
from pathlib import Path

from bench.record import spread, store
from bench.served import prompts, served_demo
from fullpipe.client import Client
from fullpipe.gateway import ADMIN_SOCKET, write_gateway
from fullpipe.gateway_settings import GatewayConfig, Replica
from fullpipe.haproxy import HAProxy
from fullpipe.keys import FILE_NAME, KeyFile
from fullpipe.ports import choose_ports

LOOP = "/v2/models/scheduler_model/generate"
PROGRESS = json.dumps({"op": "progress", "job_id": "nobody's", "wait_ms": 0}).encode()
PICTURE = {"width": 64, "height": 64, "steps": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400, help="small requests of each kind")
    parser.add_argument("--pictures", type=int, default=40, help="pictures of each phase")
    arguments = parser.parse_args()

    with served_demo() as (server, _), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ports = choose_ports("127.0.0.1", {"bind": 0, "metrics": 0})
        config = GatewayConfig(
            bind=f"127.0.0.1:{ports['bind']}",
            metrics_bind=f"127.0.0.1:{ports['metrics']}",
            replicas=[Replica("r1", "127.0.0.1", server.config.http_port, server.config.grpc_port)],
        )
        keys = KeyFile(folder / FILE_NAME)
        quiet, _ = keys.add("quiet", rate=1_000_000, concurrent=1000)
        flooding, _ = keys.add("flooding", rate=10, concurrent=1)
        path = write_gateway(folder, server.config.repository, config)
        with (folder / "log").open("wb") as log:
            door = HAProxy(path, folder / ADMIN_SOCKET)
            door.start(log.fileno())
        try:
            tls = ssl.create_default_context(cafile=folder / "tls.pem")
            small = compare(server.config.http_port, ports["bind"], tls, quiet, arguments.count)
            url = f"https://127.0.0.1:{ports['bind']}"
            client = Client(url, api_key=quiet, ca_cert=str(folder / "tls.pem"))
            flood = flooded(client, ports["bind"], tls, flooding, arguments.pictures)
        finally:
            door.stop()
    store("gateway", {"small_request": small, "flood": flood})


def compare(server_port: int, gateway_port: int, tls, key: str, count: int) -> dict:
    """Small requests to the server and through the gateway, turn about."""
    plain = http.client.HTTPConnection("127.0.0.1", server_port, timeout=30)
    through = http.client.HTTPSConnection("127.0.0.1", gateway_port, timeout=30, context=tls)
    headers = {"Authorization": f"Bearer {key}"}
    times: dict[str, list[float]] = {"server": [], "gateway": []}
    for number in range(count + 50):
        for kind, connection, sent in (("server", plain, {}), ("gateway", through, headers)):
            started = time.perf_counter()
            connection.request("POST", LOOP, PROGRESS, sent)
            response = connection.getresponse()
            body = response.read()
            seconds = time.perf_counter() - started
            assert response.status == 200, body
            if number >= 50:  # the first ones warm up
                times[kind].append(seconds)
    server, gateway = (spread_small(times[kind]) for kind in ("server", "gateway"))
    return {
        "request": "op=progress of the loop model, JSON, HTTP/1.1, connections kept open",
        "server": server,
        "gateway_with_tls": gateway,
        "added_p50_ms": round(gateway["p50_ms"] - server["p50_ms"], 3),
    }


def spread_small(seconds: list[float]) -> dict:
    """As `spread`, with microseconds."""
    ordered = sorted(seconds)
    return {
        "p50_ms": round(ordered[len(ordered) // 2] * 1e3, 3),
        "p99_ms": round(ordered[int(len(ordered) * 0.99)] * 1e3, 3),
        "count": len(ordered),
    }


def flooded(client: Client, port: int, tls, key: str, count: int) -> dict:
    """One key's pictures without and with another key's flood, in turns of half the count."""
    captions = prompts()
    times: dict[str, list[float]] = {"alone": [], "beside_a_flood": []}
    statuses: dict[int, int] = {}

    def make(kind: str) -> None:
        started = time.perf_counter()
        client.generate(next(captions), seed=1, **PICTURE)
        times[kind].append(time.perf_counter() - started)

    def flood(is_over: threading.Event) -> None:
        body = json.dumps({"prompt": "a flood", **PICTURE}).encode()
        headers = {"Authorization": f"Bearer {key}"}
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=tls)
        while not is_over.wait(0.01):  # four of them: up to 400 requests a second
            connection.request("POST", "/v2/models/full_pipeline/generate", body, headers)
            response = connection.getresponse()
            response.read()
            statuses[response.status] = statuses.get(response.status, 0) + 1

    for _ in range(5):
        client.generate(next(captions), seed=1, **PICTURE)
    for _ in range(2):
        for _ in range(count // 2):
            make("alone")
        is_over = threading.Event()
        threads = [threading.Thread(target=flood, args=(is_over,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(count // 2):
            make("beside_a_flood")
        is_over.set()
        for thread in threads:
            thread.join()
    alone, beside = spread(times["alone"]), spread(times["beside_a_flood"])
    return {
        "request": "64x64, 4 steps, raw; the flooding key may make 10 pictures a minute, 1 at once",
        "alone": alone,
        "beside_a_flood": beside,
        "p99_over_alone": round(beside["p99_ms"] / alone["p99_ms"], 2),
        "p50_over_alone": round(beside["p50_ms"] / alone["p50_ms"], 2),
        "answers_to_the_flood": {str(status): n for status, n in sorted(statuses.items())},
    }


if __name__ == "__main__":
    main()
