"""The configurations for clusters, by Serve's own schema and by ours, and what the nodes promise that they want."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from app import deployment
from app.local import refuse_unknown_options
from models.weights import COMMIT, HUB_ID

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
CONFIGS = sorted(CLUSTER.glob("serve_*.yaml"))
SHIPPED = CLUSTER.parent / "serve_config.yaml"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def documents(path: Path) -> dict[str, Any]:
    """A file of several Kubernetes objects, by their kinds."""
    return {document["kind"]: document for document in yaml.safe_load_all(path.read_text())}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_serve_and_we_accept_it(path: Path):
    described, raw = deployment.read(path)
    refuse_unknown_options(described)
    described.refuse_exposure()
    assert ServeDeploySchema.model_validate(raw).applications
    assert described.gateway.auth == "keys"


@pytest.mark.parametrize("path", [*CONFIGS, SHIPPED], ids=lambda path: path.name)
def test_replicas_follow_the_work(path: Path):
    """Of the models and of the upscaler: whatever has its number of replicas from Serve."""
    deployments = [d for a in load(path)["applications"] for d in a["deployments"]]
    scaled = [d["autoscaling_config"] for d in deployments if "autoscaling_config" in d]
    assert len(scaled) == len(deployment.read(path)[0].models) + 1
    for config in scaled:
        assert config["policy"]["policy_function"] == deployment.WORK_POLICY
        assert config["aggregation_function"] == "max"
        told = AutoscalingConfig.model_validate(config)
        assert told.metrics_interval_s == 1, "Serve 2.60 goes by this alone; no environment variable changes it"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_what_no_node_shares_is_kept_elsewhere(path: Path):
    gateway = deployment.read(path)[0].gateway
    assert gateway.database.startswith("postgresql://")
    assert gateway.store is not None
    assert gateway.store.kind == "s3"
    assert ":" not in gateway.database.partition("://")[2], "a password or port stands in the configuration"


def test_weights_are_pinned_and_on_the_volume():
    for model in deployment.read(CLUSTER / "serve_gpu.yaml")[0].models:
        name, _, commit = model.source.removeprefix("/models/").partition("@")
        assert model.source.startswith("/models/")
        assert HUB_ID.fullmatch(name)
        assert COMMIT.fullmatch(commit)
        assert model.device == "cuda"


def selectors(config: Path) -> list[dict[str, str]]:
    applications = load(config)["applications"]
    found = [d["ray_actor_options"]["label_selector"] for a in applications for d in a["deployments"]]
    assert len(found) == len(applications), "a deployment does not say on which nodes it runs"
    return found


def fits(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether a node with these labels may have it: a label, or one of several in `in(...)`."""
    return all(labels.get(key) in re.findall(r"[\w.-]+", value.removeprefix("in")) for key, value in selector.items())


def labels_of_machines() -> list[dict[str, str]]:
    return [kind.get("labels", {}) for kind in load(CLUSTER / "ray-cluster.yaml")["available_node_types"].values()]


def labels_of_pods() -> list[dict[str, str]]:
    cluster = documents(CLUSTER / "rayservice.yaml")["RayService"]["spec"]["rayClusterConfig"]
    return [group.get("labels", {}) for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def labels_of_containers() -> list[dict[str, str]]:
    commands = [service.get("command") for service in load(CLUSTER / "compose.yaml")["services"].values()]
    found = [re.search(r"--labels=(\S+)=(\S+)", command) for command in commands if isinstance(command, str)]
    return [{match[1]: match[2]} for match in found if match]


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ("serve_gpu.yaml", labels_of_machines()),
        ("serve_gpu.yaml", labels_of_pods()),
        ("serve_compose.yaml", labels_of_containers()),
    ],
    ids=["machines", "pods", "containers"],
)
def test_every_deployment_finds_a_node(config: str, labels: list[dict[str, str]]):
    for selector in selectors(CLUSTER / config):
        assert any(fits(selector, node) for node in labels), f"no node fits {selector}"


def test_kuberay_gets_the_same_configuration():
    inlined = documents(CLUSTER / "rayservice.yaml")["RayService"]["spec"]["serveConfigV2"]
    assert yaml.safe_load(inlined) == load(CLUSTER / "serve_gpu.yaml")
