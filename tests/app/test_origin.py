"""What a picture depends on besides its request: files are known by what they hold, not by their names."""

import hashlib
import shutil
from pathlib import Path

import pytest

from app.origin import Needs, Origins
from app.settings import ModelSettings
from models.errors import NotFound
from models.parts import AdapterUse
from models.request import GenerationRequest
from tests.app.conftest import CARDS

LORAS = Path("models/embedded/loras")
CANNY = Path("models/embedded/controlnets/canny-sd15")


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LORAS, tmp_path / "loras"))


@pytest.fixture
def origins(adapters: Path) -> Origins:
    settings = ModelSettings(name="sd15", source="x", adapters=str(adapters), controlnets={"canny": str(CANNY)})
    return Origins(settings, "abc", "cpu", "float32")


def test_an_origin_tells_the_versions_and_what_is_put_on(origins: Origins, adapters: Path):
    origin = origins.of(Needs(loras=("crescent",), controlnets=("canny",), preprocessors=("canny",)))
    assert (origin.revision, origin.device, origin.dtype) == ("abc", "cpu", "float32")
    assert {"torch", "diffusers", "transformers", "numpy", "heliograph"} == {*origin.versions}
    assert {*origin.adapters} == {"lora:crescent", "controlnet:canny"}
    file = adapters / "crescent.safetensors"
    assert origin.adapters["lora:crescent"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_another_file_of_the_same_name_is_another_origin(origins: Origins, adapters: Path):
    needs = Needs(loras=("crescent",))
    before = origins.of(needs)
    assert origins.of(needs) == before
    (adapters / "crescent.safetensors").write_bytes((adapters / "framed.safetensors").read_bytes())
    assert origins.of(needs).adapters != before.adapters


def test_a_lora_that_is_not_there_is_named(origins: Origins):
    with pytest.raises(NotFound, match="crescent"):
        origins.of(Needs(loras=("nope",)))


def test_a_request_needs_what_it_names():
    request = GenerationRequest(model="sd15", prompt="a <lora:moon:0.5> sky", negative_prompt="ugly")
    needs = Needs.of(request.resolve(CARDS["sd15"]))
    assert needs.loras == ("moon",)
    assert "ugly" in needs.prompts
    assert AdapterUse(name="moon", weight=0.5) in request.resolve(CARDS["sd15"]).adapters
