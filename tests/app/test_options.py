"""The command line's options become the fields of the JSON body, one to one."""

import base64
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app import cli
from app.dialects.native.bodies import GenerateBody
from app.options import PANELS, to_body
from models.errors import InvalidRequest

PICTURE = Path(__file__).parent / "native_answer.json"  # any file: nobody looks into it here
ENCODED = base64.b64encode(PICTURE.read_bytes()).decode()


@pytest.mark.parametrize(
    ("options", "body"),
    [
        ({"steps": 3, "mask_blur": None, "lora": None}, {"steps": 3}),
        ({"image": PICTURE, "mask": PICTURE}, {"image": ENCODED, "mask": ENCODED}),
        ({"paste_back": False}, {"paste_back": False}),
        ({"outpaint": "64, 0,8,16"}, {"outpaint": {"left": 64, "right": 0, "top": 8, "bottom": 16}}),
        ({"hires": 1.5}, {"hires": {"scale": 1.5}}),
        ({"hires": 2.0, "hires_steps": 5}, {"hires": {"scale": 2.0, "steps": 5}}),
        ({"hires_upscaler": "lanczos"}, {"hires": {"upscaler": "lanczos"}}),
        ({"upscale": 4.0, "upscaler": "x4"}, {"upscale": {"scale": 4.0, "model": "x4"}}),
        (
            {"lora": ["moon", "sun:0.5", "a:b", "low:-1"]},
            {"adapters": [{"name": "moon"}, {"name": "sun", "weight": 0.5}, {"name": "a:b"},
                          {"name": "low", "weight": -1.0}]},
        ),
        ({"control": [f"canny:{PICTURE}"]}, {"controls": [{"name": "canny", "image": ENCODED}]}),
        (
            {"control": [f"canny:{PICTURE}:0.5"], "preprocessor": "canny"},
            {"controls": [{"name": "canny", "image": ENCODED, "weight": 0.5, "preprocessor": "canny"}]},
        ),
    ],
)  # fmt: skip
def test_options_become_fields(options: dict[str, Any], body: dict[str, Any]):
    assert to_body(options) == body
    GenerateBody.model_validate({"prompt": "x"} | body)


@pytest.mark.parametrize(
    ("options", "field", "word"),
    [
        ({"outpaint": "1,2,3"}, "outpaint", "LEFT,RIGHT,TOP,BOTTOM"),
        ({"outpaint": "1,2,3,-4"}, "outpaint", "LEFT,RIGHT,TOP,BOTTOM"),
        ({"mask": Path("nowhere.png")}, "mask", "nowhere.png"),
        ({"control": ["canny"]}, "control", "NAME:PICTURE"),
        ({"control": ["canny:nowhere.png"]}, "control", "nowhere.png"),
        ({"preprocessor": "canny"}, "preprocessor", "--control"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], field: str, word: str):
    with pytest.raises(InvalidRequest, match=word) as refused:
        to_body(options)
    assert refused.value.field == field


def test_help_shows_every_option():
    shown = CliRunner().invoke(cli.app, ["generate", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    flags = set(re.findall(r"--[a-z-]+", shown))
    options = [option for options in PANELS.values() for option in options]
    assert all(panel in shown for panel in PANELS)
    for option in options:
        expected = option.flags[0].split("/")[0] if option.flags else "--" + option.name.replace("_", "-")
        assert expected in flags, option.name


def test_the_command_line_has_every_field_of_the_api():
    """But for those that a program needs, or that are another name of one."""
    elsewhere = {"prompt", "stream", "preview_every", "output_format", "init_image", "image_strength"}
    elsewhere |= {"controls", "adapters", "asynchronous"}  # --control, --lora, --async
    elsewhere |= {"webhook_url", "webhook_events", "response"}
    assert set(GenerateBody.model_fields) - elsewhere <= {o.name for options in PANELS.values() for o in options}
