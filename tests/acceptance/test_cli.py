"""The command line against the server, and by itself."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench.serving import PROJECT
from tests.acceptance.conftest import Server, look_at


def heliograph(*arguments: object, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=timeout_s)


@pytest.mark.parametrize("command", [[], ["serve"], ["generate"], ["models", "list"]])
def test_help_explains(command: list[str]):
    ran = heliograph(*command, "--help")
    assert ran.returncode == 0
    assert "Usage" in ran.stdout


def test_generate_draws_through_the_server(server: Server, tmp_path: Path):
    output = tmp_path / "out.webp"
    ran = heliograph("generate", "a red circle", "-o", output, "-a", server.address, "--steps", 3, "--seed", 4)
    assert ran.returncode == 0, ran.stderr
    assert look_at(output) == ("WEBP", (128, 128))
    several = heliograph("generate", "x", "-o", output, "-a", server.address, "--steps", 2, "--samples", 2)
    assert several.returncode == 0, several.stderr
    assert (tmp_path / "out-0.webp").exists()
    assert (tmp_path / "out-1.webp").exists()
    again = heliograph("generate", "x", "-i", output, "-o", tmp_path / "b.png", "-a", server.address, "--steps", 4)
    assert again.returncode == 0, again.stderr
    assert look_at(tmp_path / "b.png") == ("PNG", (128, 128))


def test_generate_draws_without_a_server(tmp_path: Path):
    output = tmp_path / "out.png"
    ran = heliograph("generate", "a red circle", "-o", output, "--local", "--steps", 2)
    assert ran.returncode == 0, ran.stderr
    assert look_at(output) == ("PNG", (128, 128))


def test_models_are_listed_and_shown(server: Server):
    listed = heliograph("models", "list", "-a", server.address)
    assert "sd15 *" in listed.stdout
    shown = json.loads(heliograph("models", "show", "sdxl", "-a", server.address).stdout)
    assert shown == json.loads(heliograph("models", "show", "sdxl", "--local").stdout) | {"state": shown["state"]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "-a", "http://127.0.0.1:9"], "heliograph serve"),
        (["generate", "x", "--local", "--model", "nope"], "sd15, sd21, sdxl"),
        (["generate", "x", "--local", "--steps", "0"], "between 1 and 150"),
        (["generate", "x", "-o", "out.gif"], ".webp"),
        (["serve", "--config", "nope.yaml"], "there is no file"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(arguments: list[str], words: str):
    ran = heliograph(*arguments)
    assert ran.returncode == 1
    assert ran.stderr.strip().startswith("error ")
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_port_that_is_taken_is_said_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = heliograph("serve", "--port", taken.getsockname()[1])
    assert ran.returncode == 1
    assert "choose another --port" in ran.stderr
