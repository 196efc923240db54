"""The cluster's files against the schemas of those who read them, and against each other."""

import io
import json
import os
import re
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import ray.serve
import yaml
from dockerfile_parse import DockerfileParser
from ray.autoscaler._private.util import prepare_config, validate_config

from app import deployment
from app.settings import RAY_ENVIRONMENT

HOUSE = Path(__file__).resolve().parents[2]
CLUSTER = HOUSE / "cluster"
KUBERNETES = "1.32"


def documents() -> list[Any]:
    """All objects for Kubernetes."""
    files = [CLUSTER / "rayservice.yaml", CLUSTER / "weights-job.yaml"]
    return [document for file in files for document in yaml.safe_load_all(file.read_text())]


def rayservice() -> Any:
    return next(document for document in documents() if document["kind"] == "RayService")


def groups() -> dict[str, Any]:
    """The head and the groups of workers, by name."""
    cluster = rayservice()["spec"]["rayClusterConfig"]
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def compose() -> Any:
    return yaml.safe_load((CLUSTER / "compose.yaml").read_text())


# ray up


def test_ray_up_accepts_the_machines():
    config = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    jsonschema.validate(config, json.loads((resources.files(ray.autoscaler) / "ray-schema.json").read_text()))
    prepared = prepare_config(config)
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "gpu-small", "gpu-large"}


def test_the_machines_know_the_token_and_keep_the_heads_state():
    config = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    token = "/run/secrets/ray_token"
    assert token in config["file_mounts"]
    assert f"--env RAY_AUTH_TOKEN_PATH={token}" in config["docker"]["run_options"]
    assert any("RAY_gcs_storage=rocksdb" in command for command in config["head_start_ray_commands"])


# Kubernetes


@pytest.mark.parametrize("document", [d for d in documents() if d["kind"] != "RayService"], ids=lambda d: d["kind"])
def test_kubernetes_accepts_it(document: Any):
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_rayservice_has_the_documented_fields():
    jsonschema.validate(rayservice(), json.loads((Path(__file__).parent / "rayservice.schema.json").read_text()))


@pytest.mark.parametrize("name", groups())
def test_kubernetes_accepts_the_pods(name: str):
    template = groups()[name]["template"]
    spec = template["spec"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"} | template["metadata"], "spec": spec}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    assert spec["securityContext"]["runAsNonRoot"]
    assert all(not c["securityContext"]["allowPrivilegeEscalation"] for c in spec["containers"])
    assert {mount["name"] for c in spec["containers"] for mount in c.get("volumeMounts", ())} <= {
        volume["name"] for volume in spec.get("volumes", ())
    }


def test_the_policy_covers_every_pod():
    (policy,) = (document for document in documents() if document["kind"] == "NetworkPolicy")
    selected = policy["spec"]["podSelector"]["matchLabels"]
    assert all(selected.items() <= group["template"]["metadata"]["labels"].items() for group in groups().values())


def test_whoever_serves_knows_the_passwords():
    for name, group in groups().items():
        told = {variable["name"] for c in group["template"]["spec"]["containers"] for variable in c.get("env", ())}
        wanted = {"PGPASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
        assert told == (set() if name == "head" else wanted)


def test_the_job_fetches_what_the_models_read():
    (job,) = (document for document in documents() if document["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    models = deployment.read(CLUSTER / "serve_gpu.yaml")[0].models
    assert [f"/models/{word}" for word in container["args"] if "@" in word] == [model.source for model in models]


def test_the_page_names_every_secret():
    page = (HOUSE / "docs" / "cluster.md").read_text()
    text = (CLUSTER / "rayservice.yaml").read_text()
    names = {*re.findall(r"secretKeyRef: {name: ([\w-]+)", text), *re.findall(r"secretName: ([\w-]+)", text)}
    assert len(names) == 4
    assert [name for name in names if name not in page] == []
    assert [name for name in compose()["secrets"] if name not in page] == []


# compose


def test_compose_accepts_it():
    schema = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(compose(), json.loads(schema.read_text()))


def test_what_the_services_name_is_there():
    file = compose()
    for name, service in file["services"].items():
        assert set(service.get("secrets", ())) <= set(file["secrets"]), name
        assert {volume.split(":")[0] for volume in service.get("volumes", ())} <= set(file["volumes"]), name
        assert set(service.get("depends_on", ())) <= set(file["services"]), name


def test_only_this_machine_reaches_the_ports():
    ports = [port for service in compose()["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


# The image


def image() -> DockerfileParser:
    return DockerfileParser(fileobj=io.BytesIO((CLUSTER / "Dockerfile").read_bytes()))


def test_the_image_sets_what_the_server_sets():
    assert dict(RAY_ENVIRONMENT).items() <= dict(image().envs).items()


def test_the_image_runs_as_nobody_special_and_tells_how_it_is():
    parser = image()
    last = {step["instruction"]: step["value"] for step in parser.structure}
    assert last["USER"] == "1000:1000"
    assert "local_raylet_healthz" in last["HEALTHCHECK"]
    assert last["ENTRYPOINT"] == '["/opt/heliograph/cluster/entrypoint.sh"]'
    assert all(":" in image for image in parser.parent_images), "an image without a tag"


def test_login_shells_find_ray():
    """`ray up` runs its commands in those (with_docker_exec), and Debian's /etc/profile sets PATH anew."""
    [installed] = [step["value"] for step in image().structure if "apt-get install" in step["value"]]
    assert "'PATH=/opt/venv/bin:$PATH' > /etc/profile.d/heliograph.sh" in installed
    assert dict(image().envs)["PATH"].startswith("/opt/venv/bin:")


def test_commands_of_the_page_get_the_passwords():
    """`docker compose exec` goes past the entry point, which alone reads the files that the passwords are in."""
    page = (HOUSE / "docs" / "cluster.md").read_text()
    commands = re.findall(r"compose\.yaml exec (\S+) (\S+)", page)
    assert commands
    assert all(words == ("head", "cluster/entrypoint.sh") for words in commands)


def test_the_image_gets_what_it_copies():
    copied = [step["value"].split()[:-1] for step in image().structure if step["instruction"] == "COPY"]
    sources = [source for words in copied if not words[0].startswith("--from") for source in words]
    let_through = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{source}" for source in sources} == {line for line in let_through if line.startswith("!")}
    assert all((HOUSE / source).exists() for source in sources)


def test_secrets_reach_a_command_as_files(tmp_path: Path):
    (tmp_path / "key").write_text("it's a $ecret\n")
    environment = {"PATH": os.defpath, "PGPASSWORD_FILE": str(tmp_path / "key"), "AWS_ACCESS_KEY_ID": "as it is"}
    program = 'printf "%s|%s|%s" "$PGPASSWORD" "$AWS_ACCESS_KEY_ID" "$1"'
    command = [CLUSTER / "entrypoint.sh", "sh", "-c", program, "-", "a b"]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert told.stdout == "it's a $ecret|as it is|a b"


def test_a_secret_that_is_not_there_ends_the_command(tmp_path: Path):
    environment = {"PATH": os.defpath, "PGPASSWORD_FILE": str(tmp_path / "none")}
    command = [CLUSTER / "entrypoint.sh", "echo", "started"]
    ended = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert ended.returncode != 0
    assert b"started" not in ended.stdout


def test_ray_knows_the_variables_of_the_profile():
    lines = (CLUSTER / "high_throughput.env").read_text().splitlines()
    wanted = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    sources = (Path(str(ray.serve.__file__)).parent / "_private").glob("*.py")
    text = "".join(source.read_text() for source in sources)
    assert wanted
    assert [name for name in wanted if f'"{name}"' not in text] == []
