"""gRPC through the gateway: what it lets through; inner models refuse what it cannot see."""

from __future__ import annotations

import contextlib
import queue
import struct

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from tests.gateway.doors import PROMPT, SMALL, bearer, http2

pytestmark = [pytest.mark.gateway, pytest.mark.triton]

SERVICE = "/inference.GRPCInferenceService"
SERVED = {
    "ServerLive": pb.ServerLiveRequest(),
    "ServerReady": pb.ServerReadyRequest(),
    "ServerMetadata": pb.ServerMetadataRequest(),
    "ModelReady": pb.ModelReadyRequest(name="full_pipeline"),
    "ModelMetadata": pb.ModelMetadataRequest(name="full_pipeline"),
    "ModelConfig": pb.ModelConfigRequest(name="full_pipeline"),
}
NOT_SERVED = [
    "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "TraceSetting",
    "LogSettings",
    "Nothing",
]


@pytest.fixture(scope="module")
def channel(gateway):
    credentials = grpc.ssl_channel_credentials((gateway.folder / "tls.pem").read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{gateway.port}", credentials) as channel:
        yield channel


def call(channel, path, message, key, timeout_s=20):
    """One unary call with raw bytes; returns the status code's name, or OK."""
    metadata = [("authorization", f"Bearer {key}")] if key else []
    method = channel.unary_unary(path)
    try:
        method(message, metadata=metadata, timeout=timeout_s)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def infer_request(model="full_pipeline") -> bytes:
    request = pb.ModelInferRequest(model_name=model)
    for name, value in {"prompt": PROMPT, **SMALL}.items():
        tensor = request.inputs.add(name=name, shape=[1])
        if isinstance(value, str):
            tensor.datatype = "BYTES"
            tensor.contents.bytes_contents.append(value.encode())
        elif isinstance(value, float):
            tensor.datatype = "FP32"
            tensor.contents.fp32_contents.append(value)
        else:
            tensor.datatype = "INT32"
            tensor.contents.int_contents.append(value)
    return request.SerializeToString()


@pytest.mark.parametrize("method", SERVED)
def test_served_methods_need_a_key(channel, key, method):
    message = SERVED[method].SerializeToString()
    assert call(channel, f"{SERVICE}/{method}", message, key) == "OK"
    for wrong in ("", "fp_wrong", key[:-1]):
        assert call(channel, f"{SERVICE}/{method}", message, wrong) == "UNAUTHENTICATED"


@pytest.mark.parametrize("method", NOT_SERVED)
def test_other_methods_are_not_there(channel, key, method):
    assert call(channel, f"{SERVICE}/{method}", b"", key) == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    "path",
    [
        "/inference.GRPCInferenceService//ModelInfer",
        "/inference.GRPCInferenceService/ModelInfer/",
        "/inference.GRPCInferenceService/modelinfer",
        "/inference.GRPCInferenceService/../x/ModelInfer",
        "/inference.GRPCInferenceService/Model%49nfer",
        "/x/inference.GRPCInferenceService/ModelInfer",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.health.v1.Health/Watch",
    ],
)
def test_tricks_with_the_path(channel, key, path):
    assert call(channel, path, infer_request(), key) == "UNIMPLEMENTED"


def test_picture_over_grpc_and_the_log_names_the_pipeline(gateway, channel, key):
    assert call(channel, f"{SERVICE}/ModelInfer", infer_request(), key) == "OK"
    line = gateway.log(call="grpc-model-ModelInfer", status=200)[-1]
    assert (line["pipeline"], line["key"], line["protocol"]) == ("full_pipeline", "tester", "2.0")


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protobuf message, shorter than 128 bytes."""
    return bytes([number << 3 | 2, len(data)]) + data


INNER = [
    ("an inner model", infer_request("text_encoder"), "PERMISSION_DENIED"),
    ("another case", infer_request("Full_Pipeline"), "PERMISSION_DENIED"),
    ("a longer name", infer_request("full_pipeline2"), "PERMISSION_DENIED"),
    ("no name", infer_request(""), "PERMISSION_DENIED"),
    ("nothing", b"", "PERMISSION_DENIED"),
    ("no protobuf", b"\xff" * 64, "PERMISSION_DENIED"),
    ("a name that ends late", b"\x0a\xff\xff\xff\x0ftext_encoder", "PERMISSION_DENIED"),
]


@pytest.mark.parametrize("row", INNER, ids=[row[0] for row in INNER])
def test_other_models_are_refused(channel, key, row):
    _, message, code = row
    assert call(channel, f"{SERVICE}/ModelInfer", message, key) == code


@pytest.mark.parametrize("stage", ["text_encoder", "vae_decoder", "vae_encoder"])
def test_second_name_that_the_gateway_does_not_see_reaches_a_sealed_model(channel, key, stage):
    request = pb.ModelInferRequest(model_name="full_pipeline")
    shapes = {"text_encoder": ("prompt", "BYTES", [1])}
    name, datatype, shape = shapes.get(stage, ("latents", "FP32", [1, 4, 8, 8]))
    if stage == "vae_encoder":
        name, datatype, shape = "images", "UINT8", [1, 64, 64, 3]
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    count = int(np.prod(shape))
    sizes = {
        "BYTES": struct.pack("<I", 1) + b"a",
        "FP32": b"\0" * 4 * count,
        "UINT8": b"\0" * count,
    }
    request.raw_input_contents.append(sizes[datatype])
    message = request.SerializeToString() + field(1, stage.encode())
    method = channel.unary_unary(f"{SERVICE}/ModelInfer")
    with pytest.raises(grpc.RpcError) as caught:
        method(message, metadata=[("authorization", f"Bearer {key}")], timeout=20)
    assert caught.value.code().name == "INVALID_ARGUMENT"
    assert "answers the pipelines of its own server only" in caught.value.details()


def test_compressed_message_is_refused_and_so_is_a_large_one(gateway, channel, open_gateway, key):
    method = channel.unary_unary(f"{SERVICE}/ModelInfer")
    with pytest.raises(grpc.RpcError) as caught:
        method(
            infer_request() * 20,
            metadata=[("authorization", f"Bearer {key}")],
            compression=grpc.Compression.Gzip,
            timeout=20,
        )
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    door = open_gateway(max_body_bytes=100)
    headers = [*bearer(door.key("a")), ("content-type", "application/grpc"), ("te", "trailers")]
    message = infer_request()
    frame = b"\0" + struct.pack(">I", len(message)) + message
    assert http2(door, "POST", f"{SERVICE}/ModelInfer", headers, frame).status == 413


def open_stream(gateway, key):
    certificate = str(gateway.folder / "tls.pem")
    client = triton.InferenceServerClient(
        f"127.0.0.1:{gateway.port}", ssl=True, root_certificates=certificate
    )
    answers: queue.Queue = queue.Queue()
    client.start_stream(
        lambda result, error: answers.put(error or result),
        headers={"authorization": f"Bearer {key}"},
    )
    return client, answers


def tensors(**values):
    made = []
    for name, value in values.items():
        array = np.array([value.encode()], object) if isinstance(value, str) else np.array([value])
        array = array if array.dtype == object else array.astype(np.int32)
        made.append(triton.InferInput(name, [1], "BYTES" if array.dtype == object else "INT32"))
        made[-1].set_data_from_numpy(array)
    return made


def test_stream_gives_events_and_sealed_models_refuse_a_stranger(gateway, key):
    client, answers = open_stream(gateway, key)
    with client:
        client.async_stream_infer(
            "full_pipeline_stream", tensors(prompt=PROMPT, steps=2, width=64, height=64)
        )
        while b"done" not in answers.get(timeout=20).as_numpy("event")[0]:
            pass
        client.async_stream_infer("text_encoder", tensors(prompt="a"))
        refused = answers.get(timeout=20)
    assert isinstance(refused, InferenceServerException)
    assert "answers the pipelines of its own server only" in str(refused)


def test_stream_needs_a_key_and_can_be_closed(gateway, key, open_gateway):
    closed = open_gateway(grpc_streams=False)
    for door, secret in ((gateway, "fp_wrong"), (closed, closed.key("a"))):
        client, answers = open_stream(door, secret)
        with client:
            # The refusal may come before the request is written, or after.
            with contextlib.suppress(InferenceServerException):
                client.async_stream_infer("full_pipeline_stream", tensors(prompt=PROMPT))
            assert isinstance(answers.get(timeout=20), InferenceServerException)
