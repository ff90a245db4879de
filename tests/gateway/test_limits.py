"""Keys while the gateway runs, limits of each key, and reloads: nobody's request is dropped."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from fullpipe.errors import InvalidRequest, PipelineError, Unavailable
from fullpipe.keys import KeyFile
from tests.gateway.doors import PROMPT, SMALL, bearer, http1, picture_body, wait_until

pytestmark = [pytest.mark.gateway, pytest.mark.triton]

READY = "/v2/models/full_pipeline/ready"
GENERATE = "/v2/models/full_pipeline/generate"
LONG = {"prompt": PROMPT, "width": 128, "height": 128, "steps": 60, "seed": 1}


def fullpipe(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fullpipe.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_keys_on_the_command_line_of_a_running_gateway(open_gateway):
    door = open_gateway()
    folder = str(door.folder)
    added = fullpipe("keys", "add", "dave", "--rate", "100", "--gateway", folder)
    secret = added.stdout.strip()
    assert added.returncode == 0, added.stderr
    assert secret.startswith("fp_")
    assert len(secret) == 46
    assert http1(door, "GET", READY, bearer(secret)).status == 200
    listed = fullpipe("keys", "list", "--gateway", folder).stdout
    assert "dave" in listed
    assert "100/min" in listed
    stored = (door.folder / "keys.map").read_text()
    assert secret not in stored + listed
    assert (door.folder / "keys.map").stat().st_mode & 0o077 == 0
    again = fullpipe("keys", "add", "dave", "--gateway", folder)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == "fullpipe: name=dave has a key already; revoke it first\n"
    assert fullpipe("keys", "revoke", "dave", "--gateway", folder).stdout == "dave is revoked\n"
    assert http1(door, "GET", READY, bearer(secret)).status == 401
    assert fullpipe("keys", "revoke", "dave", "--gateway", folder).returncode == 1


@pytest.mark.parametrize("name", ["", "a b", "a|b", "ä", "x" * 65, "a\nb"])
def test_names_that_would_break_the_key_file_are_refused(tmp_path, name):
    with pytest.raises(InvalidRequest, match="letters, digits"):
        KeyFile(tmp_path / "keys.map").add(name)


def test_many_keys_at_the_same_time_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        names = [f"user{number}" for number in range(40)]
        secrets = list(pool.map(lambda name: KeyFile(tmp_path / "keys.map").add(name)[0], names))
    keys = KeyFile(tmp_path / "keys.map").read()
    assert sorted(key.name for key in keys) == sorted(names)
    assert len(set(secrets)) == 40


def test_revoking_and_reloading_let_open_requests_finish(open_gateway):
    door = open_gateway()
    client = door.client(door.key("erin"))
    results: list = []
    thread = threading.Thread(target=lambda: results.append(client.generate(**LONG)))
    thread.start()
    wait_until(lambda: int(total_open(door)) > 0, 20, "the request has not begun")
    fullpipe("keys", "revoke", "erin", "--gateway", str(door.folder))
    with pytest.raises(PipelineError, match="refuses access"):
        client.generate(PROMPT, **SMALL)
    fresh = door.key("frank")
    door.haproxy.reload()
    # Old worker and new one answer side by side: no connection is refused at any time.
    for _ in range(50):
        assert http1(door, "GET", READY, bearer(fresh)).status == 200
    thread.join(60)
    assert results
    assert results[0].pixels.shape == (1, 128, 128, 3)


def total_open(door) -> int:
    return sum(int(row["scur"] or 0) for row in door.admin.replicas().values())


def test_watched_key_file_of_somebody_else(open_gateway, tmp_path):
    door = open_gateway()
    own = door.key("own")
    command = [sys.executable, "-m", "fullpipe.cli", "keys", "watch"]
    command += ["--keys", str(tmp_path / "keys.map"), "--gateway", str(door.folder)]
    secret, _ = KeyFile(tmp_path / "keys.map").add("henry")
    watcher = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: http1(door, "GET", READY, bearer(secret)).status == 200, 20, "not taken")
        assert http1(door, "GET", READY, bearer(own)).status == 401
        KeyFile(tmp_path / "keys.map").revoke("henry")
        wait_until(lambda: http1(door, "GET", READY, bearer(secret)).status == 401, 20, "kept")
    finally:
        watcher.kill()
        watcher.wait()


def test_configuration_that_haproxy_refuses_changes_nothing(open_gateway):
    door = open_gateway()
    key = door.key("grace")
    text = door.haproxy.config.read_text()
    door.haproxy.config.write_text(text + "\nnonsense\n")
    with pytest.raises(PipelineError, match=r"HAProxy refuses .*unknown keyword 'nonsense'"):
        door.haproxy.reload()
    assert http1(door, "GET", READY, bearer(key)).status == 200


def test_rate_of_a_key_is_its_own(open_gateway):
    door = open_gateway()
    slow, other = door.key("slow", rate=5), door.key("other")
    answers = [http1(door, "GET", READY, bearer(slow)) for _ in range(12)]
    assert [answer.status for answer in answers] == [200] * 5 + [429] * 7
    refused = answers[-1]
    assert refused.headers["retry-after"] == "13"
    assert json.loads(refused.body)["error"].startswith("UNAVAILABLE: too many requests a minute")
    assert http1(door, "GET", READY, bearer(other)).status == 200
    with pytest.raises(Unavailable, match="too many requests a minute"):
        door.client(slow).generate(PROMPT, **SMALL)


def test_requests_at_once_of_a_key_are_its_own(open_gateway):
    door = open_gateway()
    few, other = door.key("few", concurrent=2), door.key("other")
    with ThreadPoolExecutor(6) as pool:
        body = json.dumps(LONG).encode()
        open_ones = [
            pool.submit(http1, door, "POST", GENERATE, bearer(few), body) for _ in range(6)
        ]
        wait_until(lambda: sum(f.done() for f in open_ones) == 4, 30, "more than 2 got in, or less")
        assert http1(door, "POST", GENERATE, bearer(other), picture_body()).status == 200
        answers = [future.result(60) for future in open_ones]
    assert sorted(answer.status for answer in answers) == [200, 200, 429, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status == 429)
    assert refused.headers["retry-after"] == "1"
    assert http1(door, "POST", GENERATE, bearer(few), picture_body()).status == 200


def test_flood_of_one_key_leaves_the_others_alone(open_gateway):
    door = open_gateway()
    flooding, quiet = door.key("flooding", rate=20, concurrent=2), door.client(door.key("quiet"))
    statuses: list[int] = []
    is_over = threading.Event()

    def flood() -> None:
        while not is_over.is_set():
            statuses.append(http1(door, "POST", GENERATE, bearer(flooding), picture_body()).status)

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for seed in range(20):
            assert quiet.generate(PROMPT, seed=seed, **SMALL).info["seed"] == seed
    finally:
        is_over.set()
        for thread in threads:
            thread.join(60)
    assert set(statuses) == {200, 429}
    assert statuses.count(200) <= 22  # 20 a minute; the test may see a minute's turn
    assert statuses.count(429) > 50


def test_metrics_of_the_gateway(gateway, key):
    http1(gateway, "GET", READY, bearer(key))
    with urllib.request.urlopen(gateway.metrics_url, timeout=20) as response:
        page = response.read().decode()
    assert 'haproxy_backend_active_servers{proxy="triton"} 2' in page
    assert 'haproxy_server_status{proxy="triton",server="r1",state="UP"} 1' in page
    assert 'haproxy_frontend_http_responses_total{proxy="gateway",code="2xx"}' in page
