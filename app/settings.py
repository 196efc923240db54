"""What serve_config.yaml may say about a model and about the gateway, and the environment variables we set or read.

Nothing else in the application reads the environment, but the command its HELIOGRAPH_URL (server_option). Unknown keys
are refused; every field has a default that works on a laptop.
"""

import os
import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from app.experiments.settings import ExperimentSettings, check_together
from app.strict import Name, Positive, Strict
from models.card import ModelCard
from models.errors import InvalidRequest, NotFound
from models.upscaler_card import LANCZOS, UpscalerCard
from models.upscaling import UPSCALING

PROJECT = Path(__file__).resolve().parent.parent
START_S = 120.0  # that a gateway or runner may take over its `user_config`, for which it needs the database
MODEL_APPLICATION = "model-{name}"  # the Serve application that runs a model; the router finds it by this name
MODEL_DEPLOYMENT = "Model"
FRONT_DEPLOYMENT = "Front"  # before the model where HAProxy is on; nothing of ours is in it
UPSCALER_APPLICATION = "upscaler"
UPSCALER_DEPLOYMENT = "Upscaler"
JOBS_APPLICATION = "jobs"
RUNNER_DEPLOYMENT = "JobRunner"

# What `heliograph serve` sets before it imports Ray, unless it is set already. Token authentication because Ray's
# dashboard runs code for whoever reaches it (CVE-2023-48022); a controller that looks at everything twice a
# second, since ten times takes 3 % of a core from the models.
RAY_ENVIRONMENT: Mapping[str, str] = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray gives up on a dashboard after a minute and kills a proxy after three times 5 s; a crowded machine is slower.
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "268435456",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

_HOST = re.compile(r"(?!.*(^|\.)\d+$)[a-z0-9]([a-z0-9._-]*[a-z0-9])?")  # in lower case; no address that is mistyped


class CardDefaults(Strict):
    """What a model does when a request says nothing; see ModelCard for the meaning of each field."""

    width: int | None = None
    height: int | None = None
    max_pixels: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    guidance_input: bool | None = None
    deep_cache: int | None = None
    tasks: tuple[str, ...] | None = None


class ModelSettings(Strict):
    """One model: where its weights are, where it runs, how much may wait for it, and its default parameters."""

    name: Name
    family: Name = "sd"
    source: str = Field(min_length=1)
    revision: str | None = None
    config: str | None = None
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    offload: bool = False
    fp8: bool = Field(default=False, description="the UNet's wide linear layers in FP8; for bfloat16 on NVIDIA GPUs")
    graphs: bool = Field(default=False, description="forwards captured as CUDA graphs")
    compiled: str | None = Field(default=None, description="folder for the compiled UNet; not compiled unless said")
    threads: int | None = Field(default=None, ge=1, description="torch threads; all cores unless said")
    max_waiting: int = Field(default=256, ge=1, description="pictures that may wait before new ones get 429")
    max_wait_s: Positive = 120.0  # seconds of work that may be there before new requests get 429
    max_rows: int | None = Field(default=None, ge=2, description="rows of one forward; measured unless said")
    sizes: tuple[tuple[int, int], ...] = Field(
        default=(), description="[width, height] besides the native one, for which rows are measured too"
    )
    measured: str | None = Field(default=None, description="folder for what was measured; not kept unless said")
    adapters: str | None = Field(default=None, description="folder of LoRAs and textual inversions (.safetensors)")
    lora_cache_mib: int = Field(default=2048, ge=1, description="memory for LoRAs that are loaded")
    routing: Literal["work", "default"] = Field(
        default="work", description="how one of several replicas is chosen: by work and warmth, or as Serve does"
    )
    hold_s: Positive | None = Field(
        default=None,
        description="seconds of work that a replica has before more waits for another; for several replicas",
    )
    controlnets: dict[Name, str] = Field(default_factory=dict, description="name -> folder or .safetensors file")
    preprocessors: dict[Literal["depth", "pose"], str] = Field(
        default_factory=dict, description="name -> folder of the weights it needs"
    )
    defaults: CardDefaults = CardDefaults()

    @model_validator(mode="after")
    def _nothing_is_in_vain(self) -> Self:
        if self.family in UPSCALING and (self.controlnets or self.preprocessors):
            raise ValueError(f"controlnets and preprocessors do not go with the family {self.family}")
        if self.sizes and (self.max_rows is not None or self.family in UPSCALING):
            raise ValueError("sizes are measured: they go with neither max_rows nor a model that makes pictures larger")
        if self.hold_s is not None and self.routing != "work":
            raise ValueError("hold_s needs routing: work")
        return self

    @property
    def located_adapters(self) -> Path | None:
        """The folder of adapters, as `located` finds it."""
        return None if self.adapters is None else Path(located(self.adapters))

    @property
    def located_controlnets(self) -> dict[str, str]:
        """The ControlNets by name, each as `located` finds it."""
        return {name: located(source) for name, source in self.controlnets.items()}

    @property
    def located_preprocessors(self) -> dict[str, str]:
        """The preprocessors' weights, each as `located` finds them."""
        return {name: located(source) for name, source in self.preprocessors.items()}

    @property
    def located_source(self) -> str:
        """The source, as `located` finds it."""
        return located(self.source)

    @property
    def application(self) -> str:
        """The name of the Serve application that runs this model."""
        return MODEL_APPLICATION.format(name=self.name)

    def card(self) -> ModelCard:
        """What the model can do, read without its weights and without torch."""
        defaults = self.defaults.model_dump(exclude_none=True)
        return ModelCard.read(self.name, self.family, self.located_source, defaults)


class UpscalerSettings(Strict):
    """The upscalers: checkpoints by name (`lanczos` is there anyway), where they run, how much may come in and out."""

    models: dict[Name, str] = Field(default_factory=dict, description="name -> .safetensors file")
    default_model: Name = LANCZOS
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    tile: int = Field(default=256, ge=128, le=4096, multiple_of=8, description="pixels a side that a network sees")
    threads: int | None = Field(default=None, ge=1, description="torch threads; all cores unless said")
    max_waiting: int = Field(default=16, ge=1, description="pictures that may wait before new ones get 429")
    max_input_pixels: int = Field(default=UpscalerCard.max_input_pixels, ge=1)
    max_output_pixels: int = Field(default=UpscalerCard.max_output_pixels, ge=1)

    @model_validator(mode="after")
    def _names_are_right(self) -> Self:
        if LANCZOS in self.models:
            raise ValueError(f"{LANCZOS} needs no file and cannot be another upscaler's name")
        if self.default_model not in (LANCZOS, *self.models):
            raise ValueError(f"default_model must be one of {LANCZOS}, {', '.join(self.models)}")
        return self

    @property
    def located_models(self) -> dict[str, str]:
        """The checkpoints by name, each as `located` finds it."""
        return {name: located(source) for name, source in self.models.items()}

    def card(self) -> UpscalerCard:
        """What the upscalers take and give, told without torch."""
        return UpscalerCard(
            names=(LANCZOS, *self.models),
            default=self.default_model,
            max_input_pixels=self.max_input_pixels,
            max_output_pixels=self.max_output_pixels,
        )


class FetchSettings(Strict):
    """What may be asked for over HTTP: pictures by address and webhooks."""

    pictures: bool = Field(default=True, description="whether requests may give pictures by http(s) address")
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = Field(default=(80, 443), min_length=1)
    allowed: tuple[str, ...] = Field(default=(), description="private networks (CIDR) and hosts that may be reached")
    max_bytes: int = Field(default=20 * 1024 * 1024, ge=1024, description="of one picture")
    timeout_s: Positive = 20.0  # for one picture, redirects included
    max_at_once: int = Field(default=32, ge=1, description="pictures that are fetched at a time")

    @field_validator("allowed")
    @classmethod
    def _are_networks_or_hosts(cls, allowed: tuple[str, ...]) -> tuple[str, ...]:
        for entry in allowed:
            if _network(entry) is None and not _HOST.fullmatch(entry):
                raise ValueError(f"{entry!r} is neither a network, like 10.1.0.0/16, nor the name of a host")
        return allowed

    @property
    def networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The allowed networks."""
        return tuple(network for entry in self.allowed if (network := _network(entry)))

    @property
    def hosts(self) -> frozenset[str]:
        """The allowed hosts."""
        return frozenset(entry for entry in self.allowed if _network(entry) is None)


def _network(entry: str) -> IPv4Network | IPv6Network | None:
    try:
        return ip_network(entry)
    except ValueError:
        return None


# keys: an API key for everything; open: none, for anybody; loopback: none, for this machine alone.
AuthMode = Literal["loopback", "keys", "open"]


KEEP_RESULTS_S = 7 * 24 * 3600.0  # receipts, stored pictures, and with them what the cache finds
# Not less than addresses of pictures last.
KeepResults = Annotated[float, Field(ge=3600, allow_inf_nan=False)]


class FolderSettings(Strict):
    """Pictures in a folder, which all gateways have to share."""

    kind: Literal["folder"] = "folder"
    path: str = "data/pictures"
    base_url: str = Field(default="", description="what clients call this server; begins the pictures' addresses")


class S3Settings(Strict):
    """Pictures in a bucket. The credentials come from the environment, as AWS_ACCESS_KEY_ID and so on."""

    kind: Literal["s3"]
    bucket: str = Field(min_length=3, max_length=63)
    prefix: str = Field(default="", description="a folder of the bucket; the bucket or this must be ours alone")
    endpoint: str | None = Field(default=None, description="a server other than Amazon's")
    region: str | None = None
    conditional_put: bool = Field(default=True, description="whether the server honours If-None-Match")


class QueueSettings(Strict):
    """How many jobs may wait, in all and of one caller, before new ones get 429; lines of batches by themselves."""

    max_waiting: int = Field(default=10_000, ge=1)
    max_waiting_per_caller: int = Field(default=1_000, ge=1)
    max_waiting_lines: int = Field(default=50_000, ge=1)
    max_waiting_lines_per_caller: int = Field(default=20_000, ge=1)
    max_batch_lines: int = Field(default=5_000, ge=1, description="of one batch")


class PolicySettings(Strict):
    """The `policy_kwargs` of app.autoscaling:WorkPolicy."""

    drain_s: Positive = 10.0


class GatewaySettings(Strict):
    """What the gateway needs to start. A change here restarts it, so the models are not among it."""

    max_body_bytes: int = Field(default=32 * 1024 * 1024, ge=1024)
    request_timeout_s: Positive = 600.0
    max_wait_s: Positive = 120.0  # of work that waits for a model to wake, or for room at its replicas
    dialects: tuple[Name, ...] = ("native",)
    fetch: FetchSettings = FetchSettings()
    auth: AuthMode = "loopback"
    database: str = "sqlite:///data/heliograph.db"
    secret_file: str = "data/secret"
    store: FolderSettings | S3Settings | None = Field(default=None, discriminator="kind")
    keep_results_s: KeepResults = KEEP_RESULTS_S
    jobs: QueueSettings | None = None

    @model_validator(mode="after")
    def _jobs_are_kept(self) -> Self:
        if self.jobs is not None and self.store is None:
            raise ValueError("jobs needs a store, in which their pictures are kept")
        return self


class RunnerSettings(Strict):
    """What the job runners need to start: the gateway's database, secret and store, and how they work.

    The models arrive as `user_config`, like the gateway's.
    """

    database: str
    secret_file: str
    store: FolderSettings | S3Settings = Field(discriminator="kind")
    keep_results_s: KeepResults = KEEP_RESULTS_S
    fetch: FetchSettings = FetchSettings()
    request_timeout_s: Positive = 600.0
    max_running: int = Field(default=8, ge=1, description="jobs of one model that a runner works on at a time")
    lease_s: float = Field(default=10.0, ge=3, le=3600, description="after which the jobs of a dead runner run again")
    keep_days: Positive = 7.0  # after its end, a job's request and result
    forget_days: Positive = 30.0  # the job itself


class CatalogueSettings(Strict):
    """The models, the upscaler and the experiments the gateway knows. Arrives as `user_config`, so Serve changes it in
    place."""

    models: tuple[ModelSettings, ...] = Field(min_length=1)
    default_model: Name
    upscaler: UpscalerSettings | None = None
    experiments: dict[Name, ExperimentSettings] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_are_right(self) -> Self:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"two models have the same name: {', '.join(names)}")
        if self.default_model not in names:
            raise ValueError(f"default_model must be one of {', '.join(names)}, not {self.default_model!r}")
        upscalers = (LANCZOS, *(self.upscaler.models if self.upscaler else ()))
        twice = [model.name for model in self.models if model.family in UPSCALING and model.name in upscalers]
        if twice:
            raise ValueError(f"a model that makes pictures larger has an upscaler's name: {', '.join(twice)}")
        return self

    @model_validator(mode="after")
    def _arms_can_draw(self) -> Self:
        if self.experiments:
            try:
                check_together(self.experiments, self.cards(), self.default_model)
            except (InvalidRequest, NotFound) as wrong:
                raise ValueError(str(wrong)) from wrong
        return self

    def cards(self) -> dict[str, ModelCard]:
        """The models' cards by name, in the order of the file."""
        return {model.name: model.card() for model in self.models}


def located(source: str) -> str:
    """A source, with what ships with the project found from whatever directory a worker starts in."""
    shipped = PROJECT / source
    return str(shipped) if not Path(source).exists() and shipped.exists() else source


def set_ray_environment() -> None:
    """Sets RAY_ENVIRONMENT where nothing is set. Call it before Ray is imported: it reads its constants then."""
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray's workers import the project from wherever they start, also where it is not installed.
    paths = [str(PROJECT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


def ray_auth_mode() -> str:
    """How Ray's own ports are guarded: `token` or `disabled`."""
    return os.environ.get("RAY_AUTH_MODE", RAY_ENVIRONMENT["RAY_AUTH_MODE"])


def behind_haproxy() -> bool:
    """Whether Ray was told to put Serve's HAProxy before the gateways in place of its Python proxies."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def api_key() -> str:
    """The key that the command sends to a server, HELIOGRAPH_API_KEY; empty where there is none."""
    return os.environ.get("HELIOGRAPH_API_KEY", "")


def cores() -> int:
    """The processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def explain(error: ValidationError) -> str:
    """What pydantic found wrong, one line for each place in the file."""
    return "\n".join(f"{_place(fault['loc'])}: {_complaint(fault)}" for fault in error.errors(include_url=False))


def _place(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path) or "the file"


def _complaint(fault: Any) -> str:
    return "unknown key" if fault["type"] == "extra_forbidden" else fault["msg"]
