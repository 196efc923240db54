"""What Serve's HAProxy mode makes of our applications; served for real by `python -m bench.scale`."""

from typing import Any

import pytest
from ray.serve._private import build_app as ray_build
from ray.serve.exceptions import RayServeException

from app import main
from app.settings import ModelSettings


def built(routing: str) -> Any:
    settings = ModelSettings.model_validate({"name": "one", "source": "models/embedded/sd15", "routing": routing})
    return ray_build.build_app(main.model(settings), name="model-one")


@pytest.fixture(autouse=True)
def haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray reads it when it is imported."""
    monkeypatch.setattr(ray_build, "RAY_SERVE_ENABLE_HA_PROXY", True)


@pytest.mark.parametrize(("routing", "deployments"), [("work", ["Model", "Front"]), ("default", ["Model"])])
def test_a_model_can_be_deployed_behind_haproxy(monkeypatch: pytest.MonkeyPatch, routing: str, deployments: list[str]):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    application = built(routing)
    assert [deployment.name for deployment in application.deployments] == deployments
    assert application.ingress_deployment_name == deployments[-1]
    [model] = (one for one in application.deployments if one.name == "Model")
    assert model._deployment_config.request_router_config.is_default_request_router() == (routing == "default")


def test_ray_would_refuse_it_without_a_front(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    with pytest.raises(RayServeException, match="not supported on the ingress deployment"):
        built("work")
