"""The whole Serve graph on one page: an application for each model, the upscaler, the job runners and the gateway.

Serve restarts every replica of an application whose args change, so what changes apart is deployed apart. Only the
gateway has a route; it finds models by their application's name. Numbers here are defaults that serve_config.yaml may
override.
"""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from app.front import Front
from app.ingress import Gateway
from app.job_runner import JobRunner
from app.replica import Model
from app.routing import REPORT_S, WorkRouter
from app.settings import (
    FRONT_DEPLOYMENT,
    MODEL_DEPLOYMENT,
    RUNNER_DEPLOYMENT,
    UPSCALER_DEPLOYMENT,
    GatewaySettings,
    ModelSettings,
    RunnerSettings,
    UpscalerSettings,
    behind_haproxy,
)
from app.upscaler import Upscaler

_GATEWAY = serve.deployment(
    name="Gateway",
    # Every waiting client holds a slot: with Serve's default of 5 the rest would wait in the proxy, unseen.
    max_ongoing_requests=1000,
    max_surge_percent=100,
    health_check_period_s=5,
    health_check_timeout_s=15,
    graceful_shutdown_timeout_s=120,
    graceful_shutdown_wait_loop_s=0.5,
    ray_actor_options={"num_cpus": 0.1},
)

_MODEL = serve.deployment(
    name=MODEL_DEPLOYMENT,
    # Above what an engine lets wait and run, so that the engine refuses (429) before Serve hides requests in a queue.
    max_ongoing_requests=2000,
    max_queued_requests=256,  # those that wait for a replica to wake
    health_check_period_s=2,
    health_check_timeout_s=20,
    graceful_shutdown_timeout_s=180,  # longer than the longest generation: a replica that stops finishes its work
    graceful_shutdown_wait_loop_s=0.5,
    ray_actor_options={"num_cpus": 0.1},
)

_FRONT = serve.deployment(name=FRONT_DEPLOYMENT, ray_actor_options={"num_cpus": 0})

_UPSCALER = serve.deployment(
    name=UPSCALER_DEPLOYMENT,
    max_ongoing_requests=256,  # likewise: the replica refuses first
    max_queued_requests=256,
    health_check_period_s=5,
    health_check_timeout_s=20,
    graceful_shutdown_timeout_s=120,
    graceful_shutdown_wait_loop_s=0.5,
    ray_actor_options={"num_cpus": 0.1},
)

_RUNNER = serve.deployment(
    name=RUNNER_DEPLOYMENT,
    # A runner that is gone is replaced within the lease of its jobs.
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=30,  # it hands its jobs back, and waits for none
    graceful_shutdown_wait_loop_s=0.1,
    ray_actor_options={"num_cpus": 0.1},
)


def gateway(args: GatewaySettings) -> Application:
    """The application that answers HTTP."""
    return _GATEWAY(serve.ingress()(Gateway)).bind(args)


def model(args: ModelSettings) -> Application:
    """The application that runs one model."""
    return served(Model, args)


def served(by: type[Model], args: ModelSettings) -> Application:
    """A model's application with replicas of this class: benchmarks have one whose network only takes time."""
    if args.routing != "work":
        return _MODEL(by).bind(args)
    options: Any = {"request_router_class": WorkRouter, "request_router_kwargs": {"hold_s": args.hold_s}}
    by_work = RequestRouterConfig(**options | {"request_routing_stats_period_s": REPORT_S})
    routed = _MODEL(by).options(request_router_config=by_work).bind(args)
    return _FRONT(Front).bind(routed) if behind_haproxy() else routed


def upscaler(args: UpscalerSettings) -> Application:
    """The application that makes pictures larger."""
    return _UPSCALER(Upscaler).bind(args)


def jobs(args: RunnerSettings) -> Application:
    """The application that works on jobs."""
    return _RUNNER(JobRunner).bind(args)
