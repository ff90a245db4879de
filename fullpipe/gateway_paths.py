"""What of a model repository clients of a gateway may call, path by path."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

from fullpipe.errors import SetupError

PARAMETER = "fullpipe_pipeline"
GRPC = "/inference.GRPCInferenceService"


@dataclasses.dataclass(frozen=True)
class Served:
    """What a repository offers to clients.

    Attributes:
        paths: "METHOD/path" → "call|pipeline".
        models: name → pipeline, of the models that unary gRPC calls may name.
        pipelines: names of the pipelines.
        unsealed: models that cannot tell a stranger from their own server, see `grpc_streams`.
    """

    paths: Mapping[str, str]
    models: Mapping[str, str]
    pipelines: tuple[str, ...]
    unsealed: tuple[str, ...]


def read_repository(repository: Path, serve_stages: bool = False) -> Served:
    """Find the pipelines of a model repository and what of them clients may call.

    Raises:
        SetupError: a configuration cannot be read.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    configs = {}
    for path in sorted(repository.glob("*/config.pbtxt")):
        try:
            text = path.read_text(encoding="utf-8")
            configs[path.parent.name] = text_format.Parse(text, model_config_pb2.ModelConfig())
        except (OSError, text_format.ParseError) as error:
            raise SetupError(f"{path} cannot be read: {error}") from None
    calls: dict[str, tuple[str, tuple[str, ...]]] = {}
    pipelines = []
    loops: set[str] = set()
    for name, model in configs.items():
        if PARAMETER in model.parameters:
            facts = json.loads(model.parameters[PARAMETER].string_value)
            pipelines.append(name)
            calls[name] = (name, ("infer", "generate"))
            calls[facts["stream"]] = (name, ("generate_stream",))
            calls[facts["scheduler_model"]] = (name, ("infer", "generate"))
            loops.add(facts["scheduler_model"])
    stages = [name for name, model in configs.items() if model.backend == "diffusion"]
    unsealed = tuple(name for name in configs if name not in calls and name not in stages)
    if serve_stages:
        calls.update({name: (name, ("infer",)) for name in stages})
    versions = {
        name: sorted(path.name for path in (repository / name).iterdir() if path.name.isdigit())
        for name in calls
        if (repository / name).is_dir()
    }
    return Served(
        paths=dict(_paths(calls, versions, loops)),
        models={name: pipeline for name, (pipeline, _) in calls.items()},
        pipelines=tuple(pipelines),
        unsealed=unsealed,
    )


def _paths(
    calls: Mapping[str, tuple[str, tuple[str, ...]]],
    versions: Mapping[str, list[str]],
    loops: Set[str],
) -> Iterable[tuple[str, str]]:
    yield "GET/v2/health/live", "health|"
    yield "GET/v2/health/ready", "health|"
    yield "GET/v2", "metadata|"
    yield "POST/v2/repository/index", "index|"
    for name, (pipeline, verbs) in calls.items():
        for version in ["", *versions.get(name, [])]:
            path = f"/v2/models/{name}" + (f"/versions/{version}" if version else "")
            yield f"GET{path}", f"metadata|{pipeline}"
            yield f"GET{path}/ready", f"ready|{pipeline}"
            yield f"GET{path}/config", f"config|{pipeline}"
            for verb in verbs:
                call = f"loop-{verb}" if name in loops else verb
                yield f"POST{path}/{verb}", f"{call}|{pipeline}"
    for method in ("ServerLive", "ServerReady", "ServerMetadata"):
        yield f"POST{GRPC}/{method}", "grpc-server|"
    for method in ("ModelReady", "ModelMetadata", "ModelConfig", "ModelInfer"):
        yield f"POST{GRPC}/{method}", f"grpc-model-{method}|"
    yield "POST/grpc.health.v1.Health/Check", "grpc-server|"
