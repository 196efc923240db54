"""What serve_config.yaml may say, and what it is refused for."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from app import deployment, local
from app.settings import CatalogueSettings, FetchSettings, GatewaySettings, ModelSettings
from models.errors import InvalidRequest

SHIPPED = Path(__file__).resolve().parents[2] / "serve_config.yaml"


@pytest.fixture
def raw() -> dict[str, Any]:
    return json.loads(json.dumps(yaml.safe_load(SHIPPED.read_text())))  # through JSON: anchors make shared objects


def refusal(raw: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(InvalidRequest) as refused:
        deployment.read(path)
    return refused.value.message


def test_what_ships_is_valid_and_complete():
    described, _ = deployment.read(SHIPPED)
    local.refuse_unknown_options(described)
    assert [model.name for model in described.models] == ["sd15", "sd21", "sdxl"]
    assert described.http_options.host == "127.0.0.1"
    cards = described.catalogue.cards()
    assert all(card.max_pixels == 1024 * 1024 and card.width == 128 for card in cards.values())


def test_a_key_that_serve_would_ignore_is_refused_at_every_level(raw: dict[str, Any], tmp_path: Path):
    assert "x-models: unknown key" in refusal(raw | {"x-models": 1}, tmp_path)
    assert "http_options.prot: unknown key" in refusal(raw | {"http_options": {"prot": 80}}, tmp_path)
    raw["applications"][0]["routeprefix"] = "/"
    assert "applications.0.routeprefix: unknown key" in refusal(raw, tmp_path)


def test_an_unknown_setting_of_a_model_is_refused(raw: dict[str, Any], tmp_path: Path):
    raw["applications"][0]["args"]["sorce"] = "x"
    assert "sorce" in refusal(raw, tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"max_ongoing_request": 5}, {"autoscaling_config": {"min_replica": 1}}, {"ray_actor_options": {"num_gpu": 1}}],
)
def test_an_unknown_option_of_a_deployment_is_refused(raw: dict[str, Any], options: dict[str, Any]):
    raw["applications"][0]["deployments"][0] |= options
    with pytest.raises(InvalidRequest, match="unknown key"):
        local.refuse_unknown_options(deployment.Deployment.model_validate(raw))


def scaling(raw: dict[str, Any], application: str) -> dict[str, Any]:
    found = next(one for one in raw["applications"] if one["name"] == application)
    return found["deployments"][0].setdefault("autoscaling_config", {})


def test_what_the_work_policy_is_told_is_checked_before_serve_has_it(raw: dict[str, Any], tmp_path: Path):
    policy = {"policy_function": deployment.WORK_POLICY}
    for kwargs, complaint in (({"drain": 5}, "drain"), ({"drain_s": 0}, "drain_s"), ({"drain_s": "x"}, "drain_s")):
        scaling(raw, "model-sd15")["policy"] = policy | {"policy_kwargs": kwargs}
        assert complaint in refusal(raw, tmp_path)
    scaling(raw, "model-sd15")["policy"] = policy | {"policy_kwargs": {"drain_s": 5}}
    assert deployment.Deployment.model_validate(raw)
    scaling(raw, "jobs")["policy"] = policy
    assert "jobs tells of no work" in refusal(raw, tmp_path)


def test_an_unknown_key_of_a_policy_is_refused(raw: dict[str, Any]):
    scaling(raw, "model-sd15")["policy"]["policy_arguments"] = {}
    with pytest.raises(InvalidRequest, match="unknown key"):
        local.refuse_unknown_options(deployment.Deployment.model_validate(raw))


def test_every_model_and_the_upscaler_follow_their_work(raw: dict[str, Any]):
    for name in ("model-sd15", "model-sd21", "model-sdxl", "upscaler"):
        assert scaling(raw, name)["policy"]["policy_function"] == deployment.WORK_POLICY


def test_the_gateway_offers_what_runs(raw: dict[str, Any], tmp_path: Path):
    raw["applications"][-1]["deployments"][0]["user_config"]["models"][0]["max_waiting"] = 3
    assert "share them by a YAML anchor" in refusal(raw, tmp_path)


def test_the_gateway_offers_the_upscaler_that_runs(raw: dict[str, Any], tmp_path: Path):
    catalogue = raw["applications"][-1]["deployments"][0]["user_config"]
    catalogue["upscaler"]["max_waiting"] = 3
    assert "no application upscaler runs it" in refusal(raw, tmp_path)
    del catalogue["upscaler"]
    next(a for a in raw["applications"] if a["name"] == "upscaler")["name"] = "larger"
    assert "named upscaler" in refusal(raw, tmp_path)


def test_runners_and_gateway_share_what_they_keep_and_know(raw: dict[str, Any], tmp_path: Path):
    jobs, gateway = raw["applications"][-2:]
    for field, other in (
        ("database", "sqlite:///b.db"),
        ("secret_file", "b"),
        ("store", {"kind": "folder", "path": "b"}),
    ):
        mine = jobs["args"][field]
        jobs["args"][field] = other
        assert f"must have the same {field}" in refusal(raw, tmp_path)
        jobs["args"][field] = mine
    jobs["deployments"][0]["user_config"]["default_model"] = "sdxl"
    assert "must have the same user_config" in refusal(raw, tmp_path)
    jobs["deployments"][0]["user_config"]["default_model"] = "sd15"
    jobs["name"] = "workers"
    assert "one application named jobs" in refusal(raw, tmp_path)
    jobs["name"] = "jobs"
    taken = gateway["args"].pop("jobs")
    assert "one application named jobs" in refusal(raw, tmp_path)
    gateway["args"] |= {"jobs": taken, "store": None}
    assert "jobs needs a store" in refusal(raw, tmp_path)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "pictures.example"])
def test_a_server_without_keys_is_not_shown_to_other_machines(raw: dict[str, Any], host: str):
    raw["http_options"]["host"] = host
    with (
        pytest.raises(InvalidRequest, match="heliograph keys create"),
        local.running(deployment.Deployment.model_validate(raw), raw, print),
    ):
        pytest.fail("it runs")
    for auth in ("keys", "open"):
        raw["applications"][-1]["args"]["auth"] = auth
        deployment.Deployment.model_validate(raw).refuse_exposure()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_server_on_loopback_needs_no_keys(raw: dict[str, Any], host: str):
    raw["http_options"]["host"] = host
    deployment.Deployment.model_validate(raw).refuse_exposure()


def test_a_store_is_of_a_kind_that_there_is(raw: dict[str, Any], tmp_path: Path):
    for store in ({"kind": "ftp"}, {"kind": "s3"}, {"kind": "folder", "bucket": "a"}, {"path": "a"}):
        raw["applications"][-1]["args"]["store"] = store
        assert "store" in refusal(raw, tmp_path)


def test_an_application_is_named_after_its_model(raw: dict[str, Any], tmp_path: Path):
    raw["applications"][0]["name"] = "pictures"
    assert "must be named model-sd15" in refusal(raw, tmp_path)


def test_a_file_that_is_missing_or_not_yaml_is_refused(tmp_path: Path):
    with pytest.raises(InvalidRequest, match="there is no file"):
        deployment.read(tmp_path / "none.yaml")
    path = tmp_path / "broken.yaml"
    path.write_text("a: [")
    with pytest.raises(InvalidRequest, match="is not YAML"):
        deployment.read(path)


@pytest.mark.parametrize("name", ["../sd15", "SD15", "", "a" * 65, "sd 15"])
def test_a_name_is_a_plain_word(name: str):
    with pytest.raises(ValidationError):
        ModelSettings(name=name, source="x")


def test_the_default_model_is_among_the_models():
    model = ModelSettings(name="a", source="x")
    with pytest.raises(ValidationError, match="default_model must be one of a"):
        CatalogueSettings(models=(model,), default_model="b")
    with pytest.raises(ValidationError, match="same name"):
        CatalogueSettings(models=(model, model), default_model="a")


def test_a_model_that_ships_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    settings = ModelSettings(name="sd15", source="models/embedded/sd15")
    assert Path(settings.located_source).is_dir()
    assert settings.card().width == 128
    assert ModelSettings(name="hub", source="someone/something").located_source == "someone/something"


def test_limits_are_positive():
    with pytest.raises(ValidationError):
        GatewaySettings(request_timeout_s=0)
    with pytest.raises(ValidationError):
        GatewaySettings(request_timeout_s=float("inf"))


def test_what_may_be_fetched_is_public_unless_networks_and_hosts_are_named():
    assert (FetchSettings().networks, FetchSettings().hosts) == ((), frozenset())
    allowed = FetchSettings(allowed=("10.1.0.0/16", "192.168.0.7", "fd00::/8", "minio.internal", "localhost"))
    assert [str(network) for network in allowed.networks] == ["10.1.0.0/16", "192.168.0.7/32", "fd00::/8"]
    assert allowed.hosts == {"minio.internal", "localhost"}


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "10.1.0.1/16",
        "10.0.0.300",
        "1.2.3",
        "300",
        "http://minio",
        "minio:9000",
        "*.internal",
        "Minio",
        "a b",
        "a/24",
    ],
)
def test_a_network_or_host_that_is_mistyped_is_refused(entry: str):
    with pytest.raises(ValidationError, match="neither a network"):
        FetchSettings(allowed=(entry,))


@pytest.mark.parametrize(
    "change", [{"ports": ()}, {"ports": (0,)}, {"ports": (65536,)}, {"timeout_s": 0}, {"proxy": ""}]
)
def test_bad_settings_of_what_may_be_fetched_are_refused(change: dict[str, Any]):
    with pytest.raises(ValidationError):
        FetchSettings.model_validate(change)
