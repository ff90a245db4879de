"""The client: its tables and parser, bad connections over real sockets, and a real server."""

import base64
import contextlib
import io
import json
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from fullpipe import contract
from fullpipe.client import Client, Picture, Pipeline
from fullpipe.errors import Cancelled, InvalidRequest, PipelineError, Unavailable
from fullpipe.wire import build_inputs, json_fields, server_error, sse_data

PROMPT = "a red circle on a white background"


@contextlib.contextmanager
def listener(answer=None, reads=True):
    """A socket that accepts, and calls `answer` with each connection or stays silent."""
    server = socket.create_server(("127.0.0.1", 0))
    held = []

    def run():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                held.append(connection)
                if answer is not None:
                    if reads:
                        read_request(connection)
                    answer(connection)
                    connection.close()

    threading.Thread(target=run, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        for connection in held:
            connection.close()


def read_request(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65_536)
    head, _, body = data.partition(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            while len(body) < int(line.split(b":")[1]):
                body += connection.recv(65_536)


def answering(data):
    return lambda connection: connection.sendall(data)


def page(status, body):
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def chunked(*chunks):
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body


def event(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


STEP = event(event=json.dumps({"step": 1, "steps": 2, "preview": base64.b64encode(b"x").decode()}))
DONE = event(
    event='{"done":true}',
    image=base64.b64encode(b"picture").decode(),
    images=[],
    info='{"seed": 7}',
)


class TestBuildInputs:
    def test_every_input_of_the_table(self):
        values = {
            "prompt": "a ünïcode prompt",
            "seed": 2**64 - 1,
            "steps": np.int64(20),
            "cfg": 7,
            "init_image": np.zeros((8, 16, 3), np.uint8),
            "mask": np.zeros((2, 8, 16), np.uint8),
        }
        arrays = build_inputs(values, contract.PICTURE_INPUTS)
        assert arrays["prompt"].tolist() == ["a ünïcode prompt".encode()]
        assert arrays["seed"].dtype == np.uint64 and arrays["seed"].tolist() == [2**64 - 1]
        assert arrays["steps"].dtype == np.int32 and arrays["steps"].shape == (1,)
        assert arrays["cfg"].dtype == np.float32
        assert arrays["init_image"].shape == (1, 8, 16, 3)
        assert arrays["mask"].shape == (2, 8, 16)

    def test_a_client_and_the_contract_agree(self):
        """What the client builds is what the server's own parser reads."""
        from fullpipe.config import Defaults, Limits

        values = {"prompt": PROMPT, "seed": 2**64 - 1, "steps": 3, "cfg": 1.5, "job_id": "j"}
        request = contract.parse(
            build_inputs(values, contract.PICTURE_INPUTS),
            Defaults(width=256, height=256),
            Limits(),
            ("euler",),
            ("normal",),
            {},
        )
        assert isinstance(request, contract.Request)
        assert {name: getattr(request, name) for name in values} == values

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("prompt", 5),
            ("prompt", b"bytes"),
            ("steps", "20"),
            ("steps", 20.5),
            ("steps", 2**31),
            ("seed", -1),
            ("seed", 2**64),
            ("cfg", "much"),
            ("cfg", None),
            ("init_image", np.zeros((8, 8, 3), np.float32)),
            ("init_image", np.zeros((8, 8, 4), np.uint8)),
            ("init_image", np.zeros((8, 8), np.uint8)),
            ("mask", np.zeros((1, 1, 8, 8), np.uint8)),
            ("mask", "a path"),
        ],
    )
    def test_wrong_values_name_the_input(self, name, value):
        with pytest.raises(InvalidRequest, match=f"^{name}"):
            build_inputs({name: value}, contract.PICTURE_INPUTS)

    def test_unknown_names_list_the_known(self):
        with pytest.raises(InvalidRequest, match=r"^promt is no input.*negative_prompt"):
            build_inputs({"promt": "x"}, contract.PICTURE_INPUTS)

    def test_json_fields_carry_pictures_as_png(self):
        rng = np.random.default_rng(0)
        values = {
            "prompt": "ünïcode",
            "seed": 2**64 - 1,
            "init_image": rng.integers(0, 256, (9, 17, 3), np.uint8),
            "mask": rng.integers(0, 256, (9, 17), np.uint8),
        }
        fields = json_fields(build_inputs(values, contract.STREAM_INPUTS))
        assert json.loads(json.dumps(fields))["prompt"] == "ünïcode"
        assert fields["seed"] == 2**64 - 1
        assert set(fields) == {"prompt", "seed", "init_image_b64", "mask_b64"}
        for name in ("init_image", "mask"):
            image = Image.open(io.BytesIO(base64.b64decode(fields[f"{name}_b64"])))
            np.testing.assert_array_equal(np.asarray(image), values[name])

    def test_json_fields_take_one_picture(self):
        arrays = build_inputs(
            {"init_image": np.zeros((2, 8, 8, 3), np.uint8)}, contract.STREAM_INPUTS
        )
        with pytest.raises(InvalidRequest, match=r"^init_image holds 2 pictures"):
            json_fields(arrays)


class TestServerSentEvents:
    TEXT = (
        b": a comment\n\ndata: one\n\nevent: x\ndata: two\ndata:  lines\nid: 7\n\n"
        b"data:\n\ndata\n\n\n\ndata: \xc3\xbc\n\ndata: unfinished"
    )
    EXPECTED = ("one", "two\n lines", "", "", "ü")

    @pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
    def test_any_line_end_at_any_chunk_border(self, end, size):
        text = self.TEXT.replace(b"\n", end)
        chunks = [text[i : i + size] for i in range(0, len(text), size)]
        assert tuple(sse_data(chunks)) == self.EXPECTED

    def test_an_event_is_there_as_soon_as_its_empty_line_is(self):
        def chunks():
            yield b"data: one\r\r"
            raise AssertionError("asked for more than it needs")

        assert next(sse_data(chunks())) == "one"

    def test_large_events_take_linear_time(self):
        chunk, count = b"x" * 1000, 20_000
        start = time.perf_counter()
        [data] = sse_data([b"data: ", *[chunk] * count, b"\n\n"])
        assert len(data) == 1000 * count
        assert time.perf_counter() - start < 5


class TestServerError:
    @pytest.mark.parametrize(
        ("message", "status", "kind"),
        [
            ("steps=0 is out of range", 400, InvalidRequest),
            ("128 jobs are open", 503, Unavailable),
            ("slow down", 429, Unavailable),
            ("no gateway", 502, Unavailable),
            ("gone", 499, Cancelled),
            ("odd", 500, PipelineError),
            ("odd", None, PipelineError),
            ("UNAVAILABLE: 128 jobs are open", 400, Unavailable),
            ("in ensemble 'full_pipeline', CANCELLED: job x was cancelled", 400, Cancelled),
            ("INTERNAL: in ensemble 'a', INVALID_ARG: steps=0", None, InvalidRequest),
        ],
    )
    def test_a_code_in_the_message_counts_before_the_status(self, message, status, kind):
        error = server_error(message, status)
        assert type(error) is kind
        assert message.endswith(str(error))
        assert "ensemble" not in str(error) and "INVALID_ARG" not in str(error)

    def test_messages_are_one_line(self):
        assert str(server_error("a\n  b", 500)) == "a b"


class TestConnections:
    """Every way of not being answered is an Unavailable that names the address."""

    def calls(self, url, **options):
        client = Client(url, **options)
        for call in (
            lambda: client.generate(PROMPT),
            lambda: list(client.stream(PROMPT)),
            client.pipelines,
            lambda: client.cancel("job"),
        ):
            with pytest.raises(PipelineError) as caught:
                call()
            assert "\n" not in str(caught.value)
            yield caught.value

    def test_nobody_listens(self):
        with listener() as url:
            pass
        for error in self.calls(url):
            assert isinstance(error, Unavailable)
            assert url in str(error) and "refused" in str(error) and "serve" in str(error)

    def test_silence(self):
        with listener() as url:
            start = time.monotonic()
            for error in self.calls(url, timeout_s=0.3):
                assert isinstance(error, Unavailable)
                assert url in str(error) and "silent for 0.3 s" in str(error)
            assert time.monotonic() - start < 5

    def test_unknown_host(self):
        for error in self.calls("http://host.invalid:8000"):
            assert isinstance(error, Unavailable) and "host.invalid" in str(error)

    def test_another_protocol(self):
        with listener(answering(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00")) as url:
            for error in self.calls(url):
                assert isinstance(error, Unavailable) and "gRPC" in str(error)

    def test_closed_without_an_answer(self):
        with listener(answering(b"")) as url:
            for error in self.calls(url):
                assert isinstance(error, Unavailable) and "closed the connection" in str(error)

    def test_broken_off(self):
        with listener(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nx")) as url:
            for error in self.calls(url):
                assert isinstance(error, Unavailable)

    def test_what_a_gateway_lost_is_sent_again_if_a_repeat_is_safe(self):
        """502 means that a replica died with the request; a picture is the same from another."""
        asked = []

        def answer(connection):
            asked.append(connection)
            said = b"UNAVAILABLE: the server broke off"
            if len(asked) > 2:
                said = b"UNAVAILABLE: all replicas are down"
            connection.sendall(
                page(
                    b"502 Bad Gateway" if len(asked) <= 2 else b"503 Service Unavailable",
                    json.dumps({"error": said.decode()}).encode(),
                )
            )

        with listener(answer) as url:
            with pytest.raises(Unavailable, match="all replicas are down"):
                Client(url).generate(PROMPT)
            assert len(asked) == 3
            asked.clear()
            with pytest.raises(Unavailable, match="broke off"):
                Client(url).cancel("job")
            assert len(asked) == 1, "a cancel was repeated"

    def test_tls_towards_a_plain_port(self):
        with (
            listener(answering(page(b"400 Bad Request", b"")), reads=False) as url,
            pytest.raises(Unavailable, match=r"https.*TLS"),
        ):
            Client(url.replace("http:", "https:")).generate(PROMPT)

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (b"401 Unauthorized", PipelineError),
            (b"404 Not Found", InvalidRequest),
            (b"413 Too Large", InvalidRequest),
            (b"429 Too Many", Unavailable),
            (b"503 No", Unavailable),
        ],
    )
    def test_a_gateways_page(self, status, kind):
        with listener(answering(page(status, b"<html><b>why\nnot</b></html>"))) as url:
            for error in self.calls(url):
                assert type(error) is kind and "why not" in str(error)

    def test_ok_without_sense(self):
        with (
            listener(answering(page(b"200 OK", b"<html>hello</html>"))) as url,
            pytest.raises(PipelineError, match="Triton"),
        ):
            Client(url).pipelines()

    @pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port", "http://[::1"])
    def test_addresses_of_another_form(self, url):
        with pytest.raises(InvalidRequest, match=r"^url"):
            Client(url)

    def test_a_password_in_the_address_is_not_repeated(self):
        with pytest.raises(InvalidRequest) as caught:
            Client("http://me:secret@host:8000")
        assert "secret" not in str(caught.value)

    def test_headers_are_sent(self):
        heard = []

        def listen(connection):
            heard.append(connection.recv(65_536))
            connection.sendall(page(b"403 Forbidden", b"no"))
            connection.close()

        server = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: listen(server.accept()[0]))
        thread.start()
        client = Client(
            f"127.0.0.1:{server.getsockname()[1]}/path", headers={"Authorization": "Bearer k"}
        )
        with server, pytest.raises(PipelineError) as caught:
            client.cancel("job")
        thread.join()
        assert heard[0].startswith(b"POST /path/v2/models/scheduler_model/infer ")
        assert b"Authorization: Bearer k" in heard[0]
        assert "Bearer" not in str(caught.value)


class TestStreamOverSockets:
    def test_events_and_picture(self):
        text = STEP + DONE
        with listener(answering(chunked(text[:30], text[30:31], text[31:], b""))) as url:
            first, last = Client(url).stream(PROMPT)
        assert first == {"step": 1, "steps": 2, "preview": b"x"}
        assert isinstance(last, Picture)
        assert last.encoded == [b"picture"] and last.info == {"seed": 7}

    def test_raw_pictures(self):
        fields = {"image": [], "images": list(range(24)), "info": '{"width": 4, "height": 2}'}
        with listener(answering(chunked(event(**fields), b""))) as url:
            [picture] = Client(url).stream(PROMPT, output_format="raw")
        assert picture.pixels.shape == (1, 2, 4, 3)
        assert picture.pixels[0, 1, 3].tolist() == [21, 22, 23]

    @pytest.mark.parametrize(
        ("data", "kind"),
        [
            (chunked(STEP, event(error="CANCELLED: job x was cancelled"), b""), Cancelled),
            (chunked(STEP, event(error="something"), b""), PipelineError),
            (chunked(STEP, b""), Unavailable),
            (chunked(STEP, DONE[:-20]), Unavailable),
            (chunked(STEP, b"data: not json\n\n", b""), PipelineError),
            (chunked(event(event='{"step": 1}'), b""), PipelineError),
            (page(b"400 Bad Request", event(error="UNAVAILABLE: full")), Unavailable),
        ],
    )
    def test_bad_ends(self, data, kind):
        with listener(answering(data)) as url, pytest.raises(PipelineError) as caught:
            list(Client(url).stream(PROMPT))
        assert type(caught.value) is kind

    def test_closing_closes_the_connection(self):
        closed = threading.Event()

        def answer(connection):
            connection.sendall(chunked(STEP))
            if connection.recv(1) == b"":
                closed.set()

        with listener(answer) as url, Client(url).stream(PROMPT) as stream:
            assert next(stream)["step"] == 1
            stream.close()
            assert closed.wait(5)
            with pytest.raises(StopIteration):
                next(stream)

    @pytest.mark.parametrize("data", [b"", chunked(STEP)])
    def test_closing_from_another_thread_wakes_the_reader(self, data):
        def answer(connection):
            connection.sendall(data)
            connection.recv(1)

        with listener(answer) as url:
            stream = Client(url).stream(PROMPT)
            threading.Timer(0.3, stream.close).start()
            start = time.monotonic()
            with pytest.raises(Cancelled, match="closed"):
                list(stream)
            assert time.monotonic() - start < 5

    def test_a_time_out_cancels_the_job(self):
        cancelled = threading.Event()

        def answer(connection):
            if not answered.is_set():
                answered.set()
                time.sleep(0.6)
            else:
                cancelled.set()

        answered = threading.Event()
        with listener(answer) as url:
            with pytest.raises(Unavailable, match="silent"):
                Client(url, timeout_s=0.3).generate(PROMPT)
            assert cancelled.wait(5)


def test_importing_the_client_needs_no_torch_and_no_pillow():
    code = (
        "import sys, fullpipe.client;"
        "sys.exit(repr([m for m in ('torch', 'PIL', 'diffusers') if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "''"


SMALL = {"width": 64, "height": 64, "steps": 4, "seed": 7}


@pytest.mark.triton
class TestRealServer:
    @pytest.fixture
    def client(self, triton_url):
        return Client(triton_url, timeout_s=60)

    def test_pipelines(self, client):
        [pipeline] = [one for one in client.pipelines() if one.name == "full_pipeline"]
        assert isinstance(pipeline, Pipeline) and pipeline.ready
        assert "euler" in pipeline.facts["samplers"] and "normal" in pipeline.facts["schedulers"]
        assert pipeline.facts["limits"]["max_size_px"] >= pipeline.facts["defaults"]["width"]
        assert pipeline.facts["stream"] == "full_pipeline_stream"

    def test_generate(self, client):
        picture = client.generate(PROMPT, batch_size=2, **SMALL)
        assert picture.pixels.shape == (2, 64, 64, 3) and picture.pixels.dtype == np.uint8
        assert picture.info["seed"] == 7 and picture.info["steps"] == 4

    def test_stream_gives_the_same_picture(self, client):
        *events, picture = client.stream(PROMPT, preview="latent", **SMALL)
        assert events[-1]["step"] <= 4 and all(one["steps"] == 4 for one in events)
        previews = [one["preview"] for one in events if one["preview"]]
        assert previews and all(preview.startswith(b"\xff\xd8") for preview in previews)
        assert Image.open(io.BytesIO(picture.encoded[0])).format == "PNG"
        np.testing.assert_array_equal(picture.pixels, client.generate(PROMPT, **SMALL).pixels)

    @pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
    def test_formats(self, client, output_format):
        picture = client.generate(PROMPT, output_format=output_format, **SMALL)
        [file] = picture.encoded
        assert Image.open(io.BytesIO(file)).format == output_format.upper()
        assert picture.pixels.shape == (1, 64, 64, 3)

    @pytest.mark.parametrize("way", ["generate", "stream"])
    def test_black_keeps_and_white_repaints(self, client, way):
        def repaint(mask, seed):
            options = {"init_image": start, "mask": mask, "denoise": 0.8, "steps": 4, "seed": seed}
            if way == "generate":
                picture = client.generate(PROMPT, **options)
            else:
                picture = list(client.stream(PROMPT, **options))[-1]
            return picture.pixels.astype(int)

        start = np.full((64, 64, 3), 255, np.uint8)
        start[16:48, 16:48] = (255, 0, 0)
        black, white = np.zeros((64, 64), np.uint8), np.full((64, 64), 255, np.uint8)
        kept = repaint(black, seed=1)
        np.testing.assert_array_equal(kept, repaint(black, seed=2))
        np.testing.assert_array_equal(repaint(white, seed=1), repaint(None, seed=1))
        assert (kept != repaint(white, seed=1)).any()

    @pytest.mark.parametrize(
        ("inputs", "what"),
        [
            ({"steps": 0}, "steps=0"),
            ({"width": 65}, "width=65"),
            ({"sampler_name": "nope"}, "sampler_name='nope'"),
            ({"init_image_b64": "rubbish!"}, "init_image_b64"),
        ],
    )
    def test_refusals(self, client, inputs, what):
        for call in (client.generate, lambda *a, **k: list(client.stream(*a, **k))):
            with pytest.raises(InvalidRequest) as caught:
                call(PROMPT, **{**SMALL, **inputs})
            assert str(caught.value).startswith(what)

    def test_cancelling_a_job(self, client):
        options = {"steps": 150, "seed": 1, "job_id": "to-be-cancelled"}
        stream = client.stream(PROMPT, **options)
        assert next(stream)["steps"] == 150
        client.cancel("to-be-cancelled")
        with pytest.raises(Cancelled):
            list(stream)

    def test_closing_a_stream_cancels_its_job(self, client):
        options = {"steps": 150, "seed": 1, "job_id": "to-be-dropped"}
        with client.stream(PROMPT, **options) as stream:
            next(stream)
        deadline = time.monotonic() + 5
        while client.cancel("to-be-dropped").get("state") != "unknown":
            assert time.monotonic() < deadline, "the job runs on"
            time.sleep(0.05)

    def test_an_unknown_pipeline(self, triton_url):
        with pytest.raises(InvalidRequest, match="nope"):
            Client(triton_url, "nope").generate(PROMPT)
