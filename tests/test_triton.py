"""The whole way of a request through a real Triton Inference Server."""

from __future__ import annotations

import base64
import functools
import io
import json
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image

from fullpipe import contract
from fullpipe.client import Client, Picture
from fullpipe.errors import Cancelled, InvalidRequest
from fullpipe.local import LocalPipeline, as_tensors

pytestmark = pytest.mark.triton

RED = "a red circle on a white background"
SMALL = {"width": 128, "height": 128, "steps": 8, "cfg": 3.0}


@pytest.fixture(scope="module")
def client(triton_url):
    return Client(triton_url, timeout_s=60)


@pytest.fixture(scope="module")
def local(config, demo_unet, demo_stages):
    with LocalPipeline(config, [demo_unet], demo_stages) as pipeline:
        yield pipeline


def post(url, document, timeout_s=60):
    request = urllib.request.Request(url, json.dumps(document).encode())
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def pixels_of(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def metric(triton, name, **labels):
    time.sleep(0.5)  # they are published a few times a second
    with urllib.request.urlopen(triton.metrics_url, timeout=20) as response:
        lines = response.read().decode().splitlines()
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    values = [
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith(name + "{") and all(label in line for label in wanted)
    ]
    assert values or labels, f"{name} is not on the metrics page"
    return sum(values)


def test_picture_is_the_one_that_the_loop_makes_without_triton(client, local):
    served = client.generate(RED, seed=7, **SMALL)
    own = local.generate(prompt=RED, seed=7, **SMALL)
    # Threads are shared out differently in this process, so single levels may differ.
    difference = np.abs(served.pixels.astype(int) - own.images)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001
    assert served.info["seed"] == 7
    assert served.info["milliseconds"].keys() >= {"text", "queue", "loop", "vae_decode", "total"}


def test_unet_over_bls_makes_the_same_picture(triton_url, client):
    apart = Client(triton_url, pipeline="apart", timeout_s=60).generate(RED, seed=7, **SMALL)
    assert np.array_equal(apart.pixels, client.generate(RED, seed=7, **SMALL).pixels)


def test_generate_with_curl_writes_a_png(triton_url, client):
    status, answer = post(
        f"{triton_url}/v2/models/full_pipeline/generate", {"prompt": RED, "seed": 7, **SMALL}
    )
    assert status == 200
    assert np.array_equal(
        pixels_of(answer["image"]), client.generate(RED, seed=7, **SMALL).pixels[0]
    )
    assert json.loads(answer["info"])["sampler_name"] == "euler"


@pytest.mark.parametrize(
    ("output_format", "kind"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")]
)
def test_output_formats(client, output_format, kind):
    picture = client.generate(RED, seed=7, output_format=output_format, **SMALL)
    assert picture.raw is None
    assert Image.open(io.BytesIO(picture.encoded[0])).format == kind
    raw = client.generate(RED, seed=7, **SMALL).pixels
    assert np.abs(picture.pixels.astype(int) - raw).mean() < 4


def ways_to_infer(triton):
    """A function per protocol that sends arrays to full_pipeline through tritonclient."""

    def infer(module, address, arrays):
        tensors = []
        for name, array in arrays.items():
            is_text = array.dtype == object
            dtype = "BYTES" if is_text else array.dtype.name.upper().replace("FLOAT", "FP")
            tensors.append(module.InferInput(name, list(array.shape), dtype))
            tensors[-1].set_data_from_numpy(array)
        with module.InferenceServerClient(address) as connection:
            return connection.infer("full_pipeline", tensors)

    http_address = triton.url.removeprefix("http://")
    return (
        functools.partial(infer, tritonclient.http, http_address),
        functools.partial(infer, tritonclient.grpc, triton.grpc_address),
    )


def test_grpc_and_http_of_tritonclient_agree(triton):
    arrays = as_tensors({"prompt": RED, "seed": 7, "output_format": "raw", **SMALL})
    results = [infer(arrays).as_numpy("images") for infer in ways_to_infer(triton)]
    assert results[0].shape == (1, 128, 128, 3)
    assert np.array_equal(*results)


def test_only_what_is_asked_for_comes_back(triton):
    """The loop's model makes four outputs; the stub may not have to drop any (Python 3.12)."""
    prompt = tritonclient.http.InferInput("prompt", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([b"a red circle"], dtype=object))
    size = [
        tritonclient.http.InferInput(name, [1], "INT32") for name in ("steps", "width", "height")
    ]
    for tensor, value in zip(size, (2, 128, 128), strict=True):
        tensor.set_data_from_numpy(np.array([value], np.int32))
    wanted = [tritonclient.http.InferRequestedOutput("info")]
    with tritonclient.http.InferenceServerClient(triton.url.removeprefix("http://")) as connection:
        for _ in range(3):
            answer = connection.infer("scheduler_model", [prompt, *size], outputs=wanted)
            assert [output["name"] for output in answer.get_response()["outputs"]] == ["info"]
            assert json.loads(answer.as_numpy("info")[0])["steps"] == 2


def test_batch_negative_prompt_and_random_seed(client):
    first = client.generate(RED, batch_size=3, negative_prompt="blue", **SMALL)
    second = client.generate(RED, batch_size=3, negative_prompt="blue", **SMALL)
    assert first.pixels.shape == (3, 128, 128, 3)
    assert first.info["seed"] != second.info["seed"]
    again = client.generate(
        RED, batch_size=3, negative_prompt="blue", seed=first.info["seed"], **SMALL
    )
    assert np.array_equal(again.pixels, first.pixels)


def test_image_to_image_and_inpainting_in_both_spellings(triton_url, client):
    start = client.generate(RED, seed=7, **SMALL).pixels
    mask = np.zeros((1, 128, 128), np.uint8)
    mask[:, :, 64:] = 255
    wanted = {"seed": 3, "steps": 6, "denoise": 0.8, "cfg": 3.0}
    blue = "a blue square on a black background"
    binary = client.generate(blue, init_image=start, mask=mask, **wanted).pixels

    def png(array):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    status, answer = post(
        f"{triton_url}/v2/models/full_pipeline/generate",
        {"prompt": blue, "init_image_b64": png(start[0]), "mask_b64": png(mask[0]), **wanted},
    )
    assert status == 200
    assert np.array_equal(pixels_of(answer["image"]), binary[0])
    changed = np.abs(binary.astype(int) - start).mean(axis=(0, 1, 3))
    assert changed[:56].mean() < 0.5 * changed[72:].mean()


def test_stream_reports_every_step_and_a_preview(client):
    events = list(client.stream(RED, seed=7, preview="latent", **SMALL))
    *steps, picture = events
    assert isinstance(picture, Picture)
    assert [event["step"] for event in steps] == sorted({event["step"] for event in steps})
    assert steps[-1]["step"] == steps[-1]["steps"] == 8
    preview = np.asarray(Image.open(io.BytesIO(steps[-1]["preview"])), dtype=float)
    assert preview.ndim == 3
    assert preview.std() > 5, "the preview shows nothing"
    assert np.array_equal(picture.pixels, client.generate(RED, seed=7, **SMALL).pixels)


def test_lost_stream_cancels_its_job(triton, client):
    before = metric(triton, "fullpipe_requests_total", outcome="CANCELLED")
    stream = client.stream(RED, steps=150, width=256, height=256)
    next(stream)
    stream.close()
    limit = time.monotonic() + 5
    while metric(triton, "fullpipe_requests_total", outcome="CANCELLED") == before:
        assert time.monotonic() < limit, "the job went on without its client"


def test_cancel_by_job_id(client):
    caught = []

    def make():
        try:
            client.generate(RED, steps=150, job_id="to-be-cancelled")
        except Cancelled as error:
            caught.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    limit = time.monotonic() + 10
    while client.cancel("to-be-cancelled")["state"] == "unknown":
        assert time.monotonic() < limit
        time.sleep(0.02)
    thread.join(timeout=10)
    assert str(caught[0]) == "job to-be-cancelled was cancelled"


WRONG = [
    ({"width": 100}, "width=100 must be a multiple of 8 in [64, 512]"),
    ({"height": -64}, "height=-64 must be a multiple of 8 in [64, 512]"),
    ({"steps": 0}, "steps=0 is out of range, allowed 1 … 150"),
    ({"cfg": float("nan")}, "cfg=nan is out of range, allowed 0 … 100"),
    ({"sampler_name": "dpm_adaptive"}, "sampler_name='dpm_adaptive' is refused: "),
    ({"sampler_name": "eular"}, "sampler_name='eular' is unknown, allowed: euler"),
    ({"output_format": "gif"}, "output_format='gif' is unknown, allowed: png, webp, jpeg, raw"),
    ({"batch_size": 99}, "batch_size=99 is out of range, allowed 1 … 8"),
    ({"denoise": 0.5}, "denoise=0.5 needs a start image"),
    ({"init_image_b64": "!!!"}, "init_image_b64"),
    ({"mask_b64": "!!!"}, "mask_b64 needs a start image"),
    ({"prompt": "x" * 9000}, "prompt has 9000 characters, allowed 8000"),
    ({"prompt": None}, "prompt is missing"),
    ({"job_id": "x" * 200}, "job_id has 200 characters, allowed 128"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[str(w)[:30] for w, _ in WRONG])
def test_bad_values_get_one_line_over_both_protocols(triton, wrong, message):
    arrays = as_tensors({"prompt": RED, **wrong}) or as_tensors({"seed": 1})
    for infer in ways_to_infer(triton):
        with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
            infer(arrays)
        assert f"INVALID_ARG: {message}" in caught.value.message()
        assert "\n" not in caught.value.message()
        assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


def test_stream_errors_keep_their_kind(client):
    with pytest.raises(InvalidRequest, match=r"width=100 must be a multiple of 8 in \[64, 512\]"):
        list(client.stream(RED, width=100))


def test_repeated_prompt_comes_from_the_text_cache(triton, client):
    name, model = "nv_cache_num_hits_per_model", "text_encoder"
    client.generate("a prompt to be repeated", seed=1, **SMALL)
    before = metric(triton, name, model=model)
    client.generate("a prompt to be repeated", seed=2, **SMALL)
    assert metric(triton, name, model=model) == before + 1


def test_metrics_tell_what_happened(triton, client):
    names = ("fullpipe_ticks_total", "fullpipe_tick_rows_total", "fullpipe_image_steps_total")
    before = [metric(triton, name, pipeline="full_pipeline") for name in names]
    client.generate(RED, seed=5, **SMALL)
    after = [metric(triton, name, pipeline="full_pipeline") for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [8, 16, 8]
    assert metric(triton, "fullpipe_requests_total", outcome="OK") >= 1
    assert metric(triton, "fullpipe_open_jobs", pipeline="full_pipeline") == 0
    assert metric(triton, "fullpipe_slots_in_use", pipeline="full_pipeline") == 0
    for stage in ("text", "queue", "loop", "vae_decode"):
        assert metric(triton, "fullpipe_stage_count_total", stage=stage) >= 1


def test_server_tells_what_it_offers(client, config):
    pipelines = {pipeline.name: pipeline for pipeline in client.pipelines()}
    assert pipelines.keys() == {"full_pipeline", "apart"}
    facts = pipelines["full_pipeline"].facts
    assert facts["checkpoint"] == config.checkpoint.digest
    assert "dpmpp_2m" in facts["samplers"]
    assert facts["limits"]["max_steps"] == 150


def test_served_tensors_are_the_contract(triton_url):
    with urllib.request.urlopen(f"{triton_url}/v2/models/full_pipeline", timeout=20) as response:
        served = json.loads(response.read())
    names = {"STRING": "BYTES"}
    for kind, table in (
        ("inputs", contract.PICTURE_INPUTS),
        ("outputs", contract.PICTURE_OUTPUTS),
    ):
        assert {(t["name"], t["datatype"], tuple(t["shape"])) for t in served[kind]} == {
            (t.name, names.get(t.dtype, t.dtype), t.dims) for t in table
        }
