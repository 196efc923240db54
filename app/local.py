"""A local Ray with one configuration deployed on it, for as long as somebody is looking: what `heliograph serve` runs.

It deploys the way Ray's own `serve run` does. Ray is imported inside functions because its constants are read from the
environment at import.
"""

import contextlib
import io
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2

from app.deployment import Deployment
from app.settings import cores
from models.errors import HeliographError, InvalidRequest

READY_TIMEOUT_S = 600.0
POLL_S = 0.5


class DidNotStart(HeliographError):
    """The application did not start."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """Where everything answers."""

    address: str
    dashboard: str


@contextlib.contextmanager
def running(deployment: Deployment, raw: dict[str, Any], report: Callable[[str], None]) -> Iterator[Running]:
    """Starts Ray, deploys, waits until it is ready, and leaves no process behind at the end.

    `report` hears what is being waited for. Raises DidNotStart or InvalidRequest.
    """
    deployment.refuse_exposure()
    options = deployment.http_options
    _check_port_is_free(options.host, options.port)
    report("starting Ray")
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        context = ray.init(
            address="local",
            num_cpus=max(2, cores()),
            namespace="serve",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        # After ray.init, which takes SIGTERM for itself; SIGINT because a shell's background jobs start without it.
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGINT, _interrupt)
        address = f"http://{_reachable(options.host)}:{options.port}"
        report("deploying the applications")
        _deploy(deployment, raw)
        _wait_until_ready(address, report)
        yield Running(address=address, dashboard=f"http://{context.dashboard_url}")
    finally:
        # A second Ctrl-C must not leave half of Ray's processes behind.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        report("stopping")
        # Serve kills its controller while that says goodbye, and Ray prints it as a failure.
        with contextlib.redirect_stdout(io.StringIO()):
            serve.shutdown()
            ray.shutdown()


def _interrupt(*_: object) -> None:
    """SIGTERM ends what Ctrl-C ends."""
    raise KeyboardInterrupt


def _check_port_is_free(host: str, port: int) -> None:
    """Serve would only say that its proxy did not come up."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as taken:
            raise DidNotStart(f"cannot listen on {host}:{port}: {taken.strerror}; choose another --port") from taken


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)


def _deploy(deployment: Deployment, raw: dict[str, Any]) -> None:
    from pydantic import ValidationError
    from ray.exceptions import RayError
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ServeDeploySchema

    refuse_unknown_options(deployment)
    try:
        schema = ServeDeploySchema.model_validate(raw | {"http_options": deployment.http_options.model_dump()})
    except ValidationError as wrong:
        raise InvalidRequest("config", f"Serve does not accept the configuration: {wrong}") from wrong
    try:
        client = serve_start(
            http_options=schema.http_options.model_dump(),
            proxy_location=schema.proxy_location,
            controller_options=schema.controller_options,
            global_logging_config=schema.logging_config,
        )
        client.deploy_apps(schema, _blocking=False)
    except (RayError, TimeoutError) as fault:
        raise DidNotStart(f"Serve did not start: {str(fault).splitlines()[0]}") from fault


def refuse_unknown_options(deployment: Deployment) -> None:
    """Raises InvalidRequest for an option of a Serve deployment that Serve would silently ignore."""
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
    from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema

    for application in deployment.applications:
        for options in application.deployments:
            place = f"{application.name}.deployments.{options.get('name')}"
            _refuse(place, options, DeploymentSchema.model_fields)
            scaling = options.get("autoscaling_config") or {}
            _refuse(f"{place}.autoscaling_config", scaling, AutoscalingConfig.model_fields)
            _refuse(f"{place}.autoscaling_config.policy", scaling.get("policy"), AutoscalingPolicy.model_fields)
            _refuse(f"{place}.ray_actor_options", options.get("ray_actor_options"), RayActorOptionsSchema.model_fields)


def _refuse(place: str, options: dict[str, Any] | None, known: Any) -> None:
    for key in options or {}:
        if key not in known:
            raise InvalidRequest("config", f"{place}: unknown key {key!r}; the keys are: {', '.join(known)}")


def _wait_until_ready(address: str, report: Callable[[str], None]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    reason = ""
    while time.monotonic() < deadline:
        _check_applications()
        try:
            answer = httpx2.get(f"{address}/readyz", timeout=10)
            if answer.status_code == 200:
                return
            reason = _reason(answer) or "the gateway starts"
        except httpx2.HTTPError:
            reason = "the proxy starts"
        report(reason)
        time.sleep(POLL_S)
    raise DidNotStart(f"not ready after {READY_TIMEOUT_S:.0f} s: {reason}")


def _check_applications() -> None:
    from ray import serve

    for name, application in serve.status().applications.items():
        if application.status == "DEPLOY_FAILED":
            raise DidNotStart(f"application {name} failed to deploy: {_last_words(application)}")


def _last_words(application: Any) -> str:
    messages = [application.message, *(d.message for d in application.deployments.values() if d.message)]
    lines = [line.strip() for line in messages[-1].splitlines() if line.strip()]
    return lines[-1] if lines else "no message; see Ray's logs"


def _reason(answer: httpx2.Response) -> str:
    try:
        return str(answer.json().get("reason", ""))
    except ValueError:  # Serve's own answer while there is no gateway is plain text
        return ""
