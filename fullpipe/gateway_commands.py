"""`fullpipe keys …` and `fullpipe gateway …`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from fullpipe.errors import SetupError
from fullpipe.gateway import ADMIN_SOCKET, write_gateway
from fullpipe.gateway_settings import GatewayConfig, Replica
from fullpipe.haproxy import AdminSocket, check_config
from fullpipe.keys import CONCURRENT, FILE_NAME, RATE, KeyFile

FOLDER = Path("gateway")


def add_keys(commands: argparse._SubParsersAction) -> None:
    """The command `fullpipe keys`."""
    command = commands.add_parser(
        "keys",
        help="make, list and revoke a gateway's API keys",
        description="Make, list and revoke the API keys of a gateway. A running gateway hears of"
        " it at once; no request is dropped.",
    )
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="make a key; it is shown once and stored nowhere")
    add.add_argument("name", help="whose it is; stands in the gateway's log")
    add.add_argument(
        "--rate", type=int, default=RATE, metavar="N", help="requests a minute (%(default)s)"
    )
    add.add_argument(
        "--concurrent",
        type=int,
        default=CONCURRENT,
        metavar="N",
        help="requests at once (%(default)s)",
    )
    add.set_defaults(run=_keys_add)
    revoke = actions.add_parser("revoke", help="take a key back")
    revoke.add_argument("name")
    revoke.set_defaults(run=_keys_revoke)
    listing = actions.add_parser("list", help="names, limits and dates")
    listing.set_defaults(run=_keys_list)
    watch = actions.add_parser(
        "watch", help="keep a gateway in step with a key file that something else writes"
    )
    watch.add_argument(
        "--keys", type=Path, metavar="FILE", help="the file (default: the gateway's own)"
    )
    watch.set_defaults(run=_keys_watch)
    for action in (add, revoke, listing, watch):
        _add_folder(action)


def add_gateway(commands: argparse._SubParsersAction) -> None:
    """The command `fullpipe gateway`."""
    command = commands.add_parser(
        "gateway",
        help="write a gateway's configuration, or take a replica out",
        description="Write HAProxy's configuration for a repository; take a replica out and back.",
    )
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    write = actions.add_parser("write", help="write haproxy.cfg and its maps from gateway.json")
    write.add_argument("repository", type=Path, metavar="REPOSITORY")
    write.set_defaults(run=_gateway_write)
    drain = actions.add_parser(
        "drain", help="send a replica no new requests and wait for its open ones"
    )
    drain.add_argument("replica", metavar="REPLICA")
    drain.add_argument("--timeout", type=float, default=330.0, metavar="SECONDS")
    drain.set_defaults(run=_gateway_drain)
    ready = actions.add_parser("ready", help="take a drained replica back")
    ready.add_argument("replica", metavar="REPLICA")
    ready.set_defaults(run=_gateway_ready)
    status = actions.add_parser("status", help="the replicas and their open requests")
    status.set_defaults(run=_gateway_status)
    for action in (write, drain, ready, status):
        _add_folder(action)


def _add_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--gateway",
        type=Path,
        default=FOLDER,
        metavar="DIR",
        help="the gateway's folder (default: %(default)s)",
    )


def tell_gateway(folder: Path, key_file: KeyFile) -> bool:
    """Bring a running gateway's keys in step with the file; False where none runs."""
    folder = folder.resolve()
    admin = AdminSocket(folder / ADMIN_SOCKET)
    if not admin.is_open():
        return False
    admin.set_map(folder / FILE_NAME, [(key.digest, key.entry) for key in key_file.read()])
    return True


def _keys_add(args: argparse.Namespace) -> int:
    key_file = KeyFile(args.gateway / FILE_NAME)
    secret, key = key_file.add(args.name, args.rate, args.concurrent)
    is_running = tell_gateway(args.gateway, key_file)
    print(secret)
    print(
        f"{key.name}: {key.rate} requests a minute, {key.concurrent} at once; this is the only time"
        f" that the key is shown{'' if is_running else '; no gateway runs here yet'}",
        file=sys.stderr,
    )
    return 0


def _keys_revoke(args: argparse.Namespace) -> int:
    key_file = KeyFile(args.gateway / FILE_NAME)
    key = key_file.revoke(args.name)
    is_running = tell_gateway(args.gateway, key_file)
    print(f"{key.name} is revoked{'' if is_running else '; no gateway runs here'}")
    return 0


def _keys_list(args: argparse.Namespace) -> int:
    keys = KeyFile(args.gateway / FILE_NAME).read()
    if not keys:
        print(f"no keys in {args.gateway / FILE_NAME}; fullpipe keys add NAME", file=sys.stderr)
    for key in keys:
        limits = f"{key.rate}/min {key.concurrent} at once"
        print(f"{key.name:<24} {limits:<24} {key.created} sha256 {key.digest[:12]}…")
    return 0


def _keys_watch(args: argparse.Namespace) -> int:
    path = args.keys or args.gateway / FILE_NAME
    told: str | None = None
    while True:
        try:
            key_file = KeyFile(path)
            state = repr(key_file.read())
            # A restarted HAProxy has read its own file, so it is told anew then too.
            pid = (
                AdminSocket((args.gateway / ADMIN_SOCKET).resolve()).ask("show info").split("Pid:")
            )
            state += pid[1].split()[0] if len(pid) > 1 else ""
            if state != told and tell_gateway(args.gateway, key_file):
                told = state
                print(f"{len(key_file.read())} keys", flush=True)
        except SetupError as error:
            print(f"fullpipe: {error}", file=sys.stderr, flush=True)
        time.sleep(2.0)


def _gateway_write(args: argparse.Namespace) -> int:
    config = GatewayConfig.load(args.gateway)
    path = write_gateway(args.gateway, args.repository, config)
    try:
        check_config(path)
        print(f"{path} is written and HAProxy takes it")
    except SetupError as error:
        if "not installed" not in str(error):
            raise
        print(f"{path} is written; HAProxy is not installed here to check it")
    return 0


def _gateway_drain(args: argparse.Namespace) -> int:
    AdminSocket(args.gateway.resolve() / ADMIN_SOCKET).drain(args.replica, args.timeout)
    print(f"{args.replica} has no open requests and gets no new ones")
    return 0


def _gateway_ready(args: argparse.Namespace) -> int:
    AdminSocket(args.gateway.resolve() / ADMIN_SOCKET).set_replica(args.replica, "ready")
    print(f"{args.replica} is taken back")
    return 0


def _gateway_status(args: argparse.Namespace) -> int:
    replicas = AdminSocket(args.gateway.resolve() / ADMIN_SOCKET).replicas()
    for name, row in replicas.items():
        print(f"{name:<20} {row['status']:<16} {row['scur']} open, {row['qcur']} queued")
    return 0


def local_config(folder: Path, host: str, http_port: int, grpc_port: int) -> GatewayConfig:
    """A folder's settings with the server of this machine in front of the other replicas."""
    config = GatewayConfig.load(folder)
    local = Replica("local", host, http_port, grpc_port)
    others = [replica for replica in config.replicas if replica.name != "local"]
    return dataclasses.replace(config, replicas=[local, *others])
