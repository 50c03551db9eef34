"""The Ray that trials run on: one of this machine, or a cluster."""

import gc
import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from semformer.errors import MachineError, UserError, first_line

log = logging.getLogger(__name__)
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in a config are relative to where the sweep was started
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # only some reports carry what a scheduler looks at
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # the store holds all state; Tune's own snapshots are not used
}
"""Of the driver and the trials' processes."""
OBJECT_STORE = 100 * 2**20
"""Bytes. Trials exchange nothing through Ray's object store."""


@contextmanager
def connect(address: str | None, *, timeout: float = 20.0) -> Iterator[None]:
    """A quiet connection to Ray: a Ray of our own on this machine (None), or the cluster at "HOST:PORT" or "auto".

    "auto" is the cluster that `ray start` noted on this machine, or $RAY_ADDRESS. Raises UserError within `timeout`
    seconds if there is no such cluster, it is no Ray, refuses the token, runs another Ray or Python, or has no living
    node on this machine.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address is None:
        _start_ray(**quiet)
    else:
        address = _resolve(address)
        _try(address, timeout)
        ray.init(address=address, runtime_env={"env_vars": ENVIRONMENT}, **quiet)
    try:
        yield
    finally:
        _shut_down()


def _start_ray(**options: Any) -> None:
    """A Ray of our own. Tried twice: on a busy machine one of its processes may not come up in time."""
    for is_last in (False, True):
        try:
            ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE, **options)
            return
        except Exception as error:  # Ray has no class for it
            if "timed out during startup" not in str(error):
                raise
            _shut_down()
            if is_last:
                raise MachineError(
                    f"Ray does not start on this machine ({first_line(error)}). It may be too busy: run again"
                ) from error


def _shut_down() -> None:
    """An actor's handle that another thread's garbage collection finds in the meantime would end this process."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        if was_enabled:
            gc.enable()


def _resolve(address: str) -> str:
    if address == "auto":
        from ray._private.utils import read_ray_address

        address = os.environ.get("RAY_ADDRESS") or read_ray_address() or ""
        if not address:
            raise UserError(
                "--address auto: no Ray cluster was started on this machine. Start one (ray start --head), give "
                "HOST:PORT, or leave --address out to run on this machine alone."
            )
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--address {address}: write HOST:PORT, such as 10.0.0.1:6379, or auto")
    return address


_ASK = """
import json, sys
import ray
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import GcsClient

ensure_token_if_auth_enabled(create_token_if_missing=False)
print(json.dumps(get_cluster_metadata(GcsClient(address=sys.argv[1]))), flush=True)
"""
_JOIN = f"""{_ASK}
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="CRITICAL")
"""


def _try(address: str, timeout: float) -> None:
    """Connect in a process of its own, because Ray's client may take minutes to give up, and cannot be stopped."""
    deadline = time.monotonic() + timeout
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()
    except OSError as error:
        raise UserError(
            f"--address {address}: nothing answers there ({error.strerror or error}). Start the cluster "
            "(ray up, or ray start --head), or correct the address."
        ) from error
    join, ask = _start(_JOIN, address, os.environ), _start(_ASK, address, {**os.environ, "RAY_AUTH_MODE": "disabled"})
    out, err = _answer(join, deadline)
    if not out:
        _answer(ask, 0.0)
        raise UserError(f"--address {address}: {_explain_refusal(err, timeout)}")
    theirs, ours = json.loads(out.splitlines()[0]), {"ray": ray.__version__, "python": platform.python_version()}
    is_open = _answer(ask, time.monotonic() + 2.0)[0] != ""  # it began when the other did, which has answered
    if wrong := [f"{k} {theirs[f'{k}_version']} (here {v})" for k, v in ours.items() if theirs[f"{k}_version"] != v]:
        raise UserError(f"--address {address}: the cluster runs {', '.join(wrong)}: install the same everywhere")
    if join.returncode:
        raise UserError(
            f"--address {address}: the head answers, but no living node of the cluster is on this machine. Start the "
            "sweep on a node of the cluster: on its head (ray attach), or with ray job submit."
        )
    if is_open:
        log.warning("%s asks for no token: whoever reaches it can run code there (RAY_AUTH_MODE=token)", address)


def _start(code: str, address: str, environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, address]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def _answer(process: "subprocess.Popen[str]", deadline: float) -> tuple[str, str]:
    """What a process has printed by then, when it is killed."""
    try:
        return process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


def _explain_refusal(stderr: str, timeout: float) -> str:
    if "AuthenticationError" not in stderr:
        told = stderr.strip().splitlines()[-1:]
        return " ".join(
            [
                f"something answers there, but in {timeout:g} s not as the head of a Ray cluster, whose port is 6379 "
                "unless `ray start --port` says otherwise.",
                *told,
            ]
        )
    copy = "copy ~/.ray/auth_token of the head to ~/.ray/auth_token here (chmod 600)"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return (
            f"the cluster asks for a token, and RAY_AUTH_MODE is not token here: export RAY_AUTH_MODE=token, and {copy}"
        )
    if "no authentication token was found" in stderr:
        return f"RAY_AUTH_MODE=token is set, but there is no token here: {copy}"
    return f"the token here is not the cluster's: {copy}"
