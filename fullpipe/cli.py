"""The command line: `fullpipe generate | models | assemble | serve | check | keys | gateway`.

Commands that need torch or the embedded server import them when they run, so that `generate` and
`models` work where only the client is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fullpipe import __version__, assemble_command, contract
from fullpipe.assemble_command import REPOSITORY
from fullpipe.client import DEFAULT_PIPELINE, DEFAULT_TIMEOUT_S, Client, Pipeline
from fullpipe.connection import DEFAULT_URL
from fullpipe.errors import PipelineError, SetupError
from fullpipe.gateway_commands import FOLDER, add_gateway, add_keys
from fullpipe.generate import add_options, generate, read_options


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 for a failure, 2 for usage, 130 for Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("fullpipe: cancelled", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read stdout has seen enough; Python's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        return _fail(
            f"`fullpipe {args.command}` needs {error.name}: "
            "pip install '.[server]' in a clone of this project"
        )
    except (PipelineError, OSError) as error:
        return _fail(str(error))


def _fail(message: str) -> int:
    print(f"fullpipe: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fullpipe",
        description="Stable Diffusion on NVIDIA Triton Inference Server: one request, one picture.",
    )
    parser.add_argument("--version", action="version", version=f"fullpipe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_models(commands)
    _add_assemble(commands)
    _add_serve(commands)
    _add_check(commands)
    add_keys(commands)
    add_gateway(commands)
    return parser


def _add_generate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "generate",
        help="make a picture from a prompt",
        usage="fullpipe generate PROMPT [-o FILE] [options]",
        description="Make pictures from a prompt and write them to files.",
        epilog="What is left out is the pipeline's own choice; `fullpipe models` shows it.",
    )
    command.set_defaults(run=_generate, parser=command)
    add_options(command)
    _add_server_options(command)


def _add_server_options(command: argparse.ArgumentParser) -> None:
    server = command.add_argument_group("server")
    server.add_argument(
        "--url",
        help=f"default: $FULLPIPE_URL, else {DEFAULT_URL}; the key is $FULLPIPE_API_KEY, the"
        " certificate to trust is the file $FULLPIPE_CA_CERT",
    )
    server.add_argument(
        "--pipeline", default=DEFAULT_PIPELINE, metavar="NAME", help="default: %(default)s"
    )
    server.add_argument(
        "--header",
        action="append",
        default=[],
        type=_header,
        metavar="'NAME: VALUE'",
        help="sent with every request; @FILE reads one from a file, which hides a key from `ps`",
    )
    server.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="longest silence of the server (default: %(default)g)",
    )


def _add_models(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "models",
        help="list the pipelines of a server",
        description="List the pipelines of a server with their sizes, limits and samplers.",
    )
    command.set_defaults(run=_models)
    command.add_argument("--json", action="store_true", help="one JSON document, for scripts")
    _add_server_options(command)


def _add_assemble(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "assemble",
        help="turn a checkpoint into a Triton model repository",
        description="Write a complete Triton model repository for a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=assemble_command.run)
    assemble_command.add_options(command)


def _add_serve(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "serve",
        help="serve a model repository on this machine",
        description="Start tritonserver with a model repository and show how to ask it.",
    )
    command.set_defaults(run=_serve)
    command.add_argument(
        "repository",
        nargs="?",
        type=Path,
        metavar="REPOSITORY",
        help="default: ./repository, made of the demo checkpoint if it is not there",
    )
    _add_place_options(command)
    command.add_argument(
        "--gateway",
        nargs="?",
        type=Path,
        const=FOLDER,
        metavar="DIR",
        help="also start the gateway of this folder (default: %(const)s), which HAProxy runs",
    )
    command.add_argument(
        "--sealed",
        action="store_true",
        help="inner models and control APIs answer nobody outside; --gateway does it too",
    )
    command.add_argument(
        "--traces",
        metavar="URL",
        help="send OpenTelemetry spans to this collector (http://HOST:4318/v1/traces)",
    )
    command.add_argument("--verbose", action="store_true", help="show all of Triton's log")


def _add_check(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "check",
        help="say what this machine lacks to serve",
        description="Say what this machine lacks to serve, and how to get it.",
    )
    command.set_defaults(run=_check)
    command.add_argument(
        "repository", nargs="?", type=Path, metavar="REPOSITORY", help="look at this one too"
    )
    _add_place_options(command)


def _add_place_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    for service, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        command.add_argument(
            f"--{service}-port",
            type=int,
            default=port,
            metavar="PORT",
            help="0 picks a free one (default: %(default)s)",
        )
    command.add_argument(
        "--triton",
        type=Path,
        metavar="PATH",
        help="an installed tritonserver instead of the embedded one",
    )


def _header(text: str) -> tuple[str, str]:
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"cannot read {text[1:]}: {error}") from None
    name, colon, value = text.partition(":")
    if not (name.strip() and colon and text.isprintable() and text.isascii()):
        raise argparse.ArgumentTypeError("needs the form 'NAME: VALUE', one line of ASCII")
    return name.strip(), value.strip()


def _client(args: argparse.Namespace) -> Client:
    return Client(args.url, args.pipeline, args.timeout, dict(args.header))


def _generate(args: argparse.Namespace) -> int:
    generate(_client(args), read_options(args.parser, args))
    return 0


def _models(args: argparse.Namespace) -> int:
    client = _client(args)
    pipelines = client.pipelines()
    if args.json:
        print(json.dumps([vars(pipeline) for pipeline in pipelines], indent=2))
    elif not pipelines:
        return _fail(f"{client.url} serves no pipeline; make one with `fullpipe assemble`")
    else:
        print("\n\n".join(map(_describe, pipelines)))
    return 0


def _describe(pipeline: Pipeline) -> str:
    facts = pipeline.facts
    lines = [f"{pipeline.name}  {'ready' if pipeline.ready else 'not ready'}"]
    if facts:
        defaults, limits = facts["defaults"], facts["limits"]
        rows = {
            "size": f"{defaults['width']}x{defaults['height']},"
            f" sides {limits['min_size_px']} to {limits['max_size_px']} pixels",
            "steps": f"{defaults['steps']}, at most {limits['max_steps']}",
            "cfg": f"{defaults['cfg']:g}",
            "batch": f"at most {limits['max_batch_size']} pictures a request",
            "samplers": _listed(facts["samplers"], defaults["sampler_name"]),
            "schedulers": _listed(facts["schedulers"], defaults["scheduler"]),
            "checkpoint": f"{facts['checkpoint']}, fullpipe {facts['version']}",
        }
        if facts.get("step_cache"):
            rows["step cache"] = "1, at most {1}".format(*contract.STEP_CACHE_RANGE)
        indent = " " * 14
        lines += [
            textwrap.fill(f"  {label:<11} {text}", 100, subsequent_indent=indent)
            for label, text in rows.items()
        ]
    return "\n".join(lines)


def _listed(names: Sequence[str], default: str) -> str:
    return ", ".join(f"{name} (default)" if name == default else name for name in names)


def _serve(args: argparse.Namespace) -> int:
    from fullpipe.seal import sealed
    from fullpipe.serve import serve
    from fullpipe.server import ServerConfig
    from fullpipe.traces import traced

    config = ServerConfig(
        repository=args.repository or _demo_repository(),
        host=args.host,
        http_port=args.http_port,
        grpc_port=args.grpc_port,
        metrics_port=args.metrics_port,
        triton=args.triton,
        log_level="verbose" if args.verbose else "info",
    )
    if args.sealed or args.gateway:
        config = sealed(config)
    if args.traces:
        config = traced(config, args.traces)
    return serve(config, gateway=args.gateway)


def _demo_repository() -> Path:
    """./repository; made of the demo checkpoint if it has no pipeline yet."""
    if not (REPOSITORY / DEFAULT_PIPELINE / "config.pbtxt").is_file():
        checkpoint = Path(__file__).parents[1] / "demo" / "checkpoint"
        if not checkpoint.is_dir():
            raise SetupError(
                f"there is no {REPOSITORY}; make one with `fullpipe assemble CHECKPOINT`"
            )
        from fullpipe.assemble import assemble

        print(f"assembling the demo checkpoint into {REPOSITORY}", flush=True)
        assemble(checkpoint, REPOSITORY)
    return REPOSITORY


def _check(args: argparse.Namespace) -> int:
    from fullpipe.check import check_main

    ports = {name: getattr(args, name) for name in ("http_port", "grpc_port", "metrics_port")}
    return check_main(args.repository, args.host, ports, args.triton)


if __name__ == "__main__":
    sys.exit(main())
