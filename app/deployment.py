"""serve_config.yaml as a whole, typed: Serve ignores keys it does not know, we refuse them.

It also checks that the parts agree: the gateway offers what the applications run.
"""

import ipaddress
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from app.settings import (
    JOBS_APPLICATION,
    RUNNER_DEPLOYMENT,
    UPSCALER_APPLICATION,
    CatalogueSettings,
    GatewaySettings,
    ModelSettings,
    PolicySettings,
    RunnerSettings,
    Strict,
    UpscalerSettings,
    explain,
)
from models.errors import InvalidRequest

GATEWAY_IMPORT = "app.main:gateway"
MODEL_IMPORT = "app.main:model"
UPSCALER_IMPORT = "app.main:upscaler"
JOBS_IMPORT = "app.main:jobs"
WORK_POLICY = "app.autoscaling:WorkPolicy"


class HttpOptions(Strict):
    """Where the proxies listen, and how long a request may take."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    root_path: str = ""
    request_timeout_s: float | None = Field(default=None, gt=0)
    keep_alive_timeout_s: int = 90
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None


class Application(Strict):
    """One Serve application. `deployments` holds Serve's own options, which Serve's own schema checks."""

    name: str
    import_path: str
    route_prefix: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    deployments: list[dict[str, Any]] = Field(default_factory=list)
    autoscaling_policy: dict[str, Any] | None = None
    logging_config: dict[str, Any] | None = None
    external_scaler_enabled: bool = False

    def user_config(self, deployment: str) -> Any:
        """The user_config of one deployment, None where there is none."""
        return next((d.get("user_config") for d in self.deployments if d.get("name") == deployment), None)


class Deployment(Strict):
    """The whole file."""

    proxy_location: Literal["Disabled", "HeadOnly", "EveryNode"] = "EveryNode"
    http_options: HttpOptions = HttpOptions()
    grpc_options: dict[str, Any] = Field(default_factory=dict)
    controller_options: dict[str, Any] | None = None
    logging_config: dict[str, Any] | None = None
    tracing_config: dict[str, Any] | None = None
    target_capacity: float | None = None
    applications: list[Application] = Field(min_length=1)

    @property
    def models(self) -> list[ModelSettings]:
        """The models that the file runs."""
        return [ModelSettings.model_validate(a.args) for a in self.applications if a.import_path == MODEL_IMPORT]

    @property
    def upscaler(self) -> UpscalerSettings | None:
        """The upscaler that the file runs, None where it runs none."""
        found = [a for a in self.applications if a.import_path == UPSCALER_IMPORT]
        return UpscalerSettings.model_validate(found[0].args) if found else None

    @property
    def catalogue(self) -> CatalogueSettings:
        """The models that the gateway offers."""
        return CatalogueSettings.model_validate(self._gateway.user_config("Gateway"))

    @property
    def _gateway(self) -> Application:
        return next(a for a in self.applications if a.import_path == GATEWAY_IMPORT)

    @property
    def gateway(self) -> GatewaySettings:
        """What the gateway is started with."""
        return GatewaySettings.model_validate(self._gateway.args)

    def refuse_exposure(self) -> None:
        """Raises InvalidRequest where other machines would reach a server that wants no keys and was not told so."""
        if self.gateway.auth == "loopback" and not _is_loopback(self.http_options.host):
            raise InvalidRequest(
                "host",
                f"{self.http_options.host} is reachable from other machines, and this server has no API keys: give the "
                "gateway `auth: keys` and make a key with `heliograph keys create`, or say `auth: open` to let "
                "everybody in",
            )

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        gateways = [a for a in self.applications if a.import_path == GATEWAY_IMPORT]
        if len(gateways) != 1:
            raise ValueError(f"exactly one application must have import_path {GATEWAY_IMPORT}, not {len(gateways)}")
        GatewaySettings.model_validate(gateways[0].args)
        running = {a.name: ModelSettings.model_validate(a.args) for a in self.applications if _runs_model(a)}
        for name, model in running.items():
            if name != model.application:
                raise ValueError(f"the application of model {model.name} must be named {model.application}, not {name}")
        for model in self.catalogue.models:
            if running.get(model.application) != model:
                raise ValueError(
                    f"the gateway offers model {model.name}, but no application {model.application} runs it with the "
                    "same settings; share them by a YAML anchor"
                )
        self._check_upscaler()
        self._check_jobs()
        self._check_policies()
        return self

    def _check_upscaler(self) -> None:
        names = [a.name for a in self.applications if a.import_path == UPSCALER_IMPORT]
        if names not in ([], [UPSCALER_APPLICATION]):
            raise ValueError(f"one application at most runs the upscaler, named {UPSCALER_APPLICATION}, not {names}")
        if self.catalogue.upscaler not in (None, self.upscaler):
            raise ValueError(
                f"the gateway offers an upscaler, but no application {UPSCALER_APPLICATION} runs it with the same "
                "settings; share them by a YAML anchor"
            )

    def _check_jobs(self) -> None:
        """Whoever takes jobs and whoever works on them use the same database and store, and know the same models."""
        found = [a for a in self.applications if a.import_path == JOBS_IMPORT]
        names = [a.name for a in found]
        if names != ([JOBS_APPLICATION] if self.gateway.jobs else []):
            raise ValueError(
                f"one application named {JOBS_APPLICATION} has to work on jobs where the gateway takes `jobs`, and "
                f"none where it does not; there are {names}"
            )
        for runner in found:
            settings = RunnerSettings.model_validate(runner.args)
            for field in ("database", "secret_file", "store", "keep_results_s", "fetch"):
                if getattr(settings, field) != getattr(self.gateway, field):
                    raise ValueError(f"{runner.name} and the gateway must have the same {field}; share it by an anchor")
            if CatalogueSettings.model_validate(runner.user_config(RUNNER_DEPLOYMENT)) != self.catalogue:
                raise ValueError(f"{runner.name} and the gateway must have the same user_config; share it by an anchor")

    def _check_policies(self) -> None:
        """What Serve hands to our policy is found wrong here, and not in its controller."""
        for application in self.applications:
            for options in application.deployments:
                policy = (options.get("autoscaling_config") or {}).get("policy") or {}
                if policy.get("policy_function") != WORK_POLICY:
                    continue
                if application.import_path not in (MODEL_IMPORT, UPSCALER_IMPORT):
                    raise ValueError(f"{application.name} tells of no work, which {WORK_POLICY} goes by; leave it out")
                PolicySettings.model_validate(policy.get("policy_kwargs") or {})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _runs_model(application: Application) -> bool:
    return application.import_path == MODEL_IMPORT


def read(path: Path) -> tuple[Deployment, dict[str, Any]]:
    """The file, typed and as plain data for Serve. Raises InvalidRequest saying where it is wrong."""
    try:
        raw = yaml.safe_load(path.read_text())
        return Deployment.model_validate(raw), raw
    except FileNotFoundError as missing:
        raise InvalidRequest("config", f"there is no file {path}") from missing
    except yaml.YAMLError as malformed:
        raise InvalidRequest("config", f"{path} is not YAML: {malformed}") from malformed
    except ValidationError as wrong:
        raise InvalidRequest("config", f"{path} is not a valid configuration\n{explain(wrong)}") from wrong
