"""What the README, the pages of docs/ and the changelog state, compared with what is there."""

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from app.dialects.native import GenerateBody
from app.settings import CardDefaults, CatalogueSettings, GatewaySettings, ModelSettings
from models.samplers import SAMPLERS

HOUSE = Path(__file__).resolve().parent.parent
README = (HOUSE / "README.md").read_text()
PAGES = sorted([*HOUSE.glob("*.md"), *HOUSE.glob("docs/*.md")])
EXAMPLES = sorted(path for path in (HOUSE / "examples").iterdir() if path.is_file())
IMPORT_NAMES = {
    "pil": "pillow",
    "yaml": "pyyaml",
    "cv2": "opencv-python-headless",
    "python_multipart": "python-multipart",
    "pydantic_core": "pydantic",
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((HOUSE / "pyproject.toml").read_text())


def _section(title: str) -> str:
    """The README's section under a heading, up to the next heading of its kind."""
    return re.split(r"^## ", README.split(f"\n## {title}\n")[1], flags=re.M)[0]


def _rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, without its heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower()


def test_the_changelog_ends_at_the_packages_version(project: dict[str, Any]) -> None:
    released = re.findall(r"^## \[(\d[^]]*)\]", (HOUSE / "CHANGELOG.md").read_text(), flags=re.M)
    assert released[0] == project["project"]["version"]


def test_every_dependency_is_justified(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"].values()
    wanted = {_name(r) for r in [*project["project"]["dependencies"], *(r for extra in extras for r in extra)]}
    justified = {name for row in _rows(_section("Dependencies")) for name in re.findall(r"`([^`]+)`", row[0])}
    assert justified == wanted
    assert all(len(row) == 2 and row[1] for row in _rows(_section("Dependencies")))


def test_every_dependency_is_imported_and_every_import_a_dependency(project: dict[str, Any]) -> None:
    own = {"models", "app", "cluster", "bench"}
    roots = set()
    for path in (p for package in own for p in (HOUSE / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots.add(node.module.split(".")[0])
    imported = {IMPORT_NAMES.get(root.lower(), root.lower()) for root in roots - own - sys.stdlib_module_names}
    assert imported == {_name(r) for r in project["project"]["dependencies"]}


def test_every_dependency_is_pinned(project: dict[str, Any]) -> None:
    pins = {_name(line) for line in (HOUSE / "constraints.txt").read_text().splitlines() if "==" in line}
    extras = project["project"]["optional-dependencies"].values()
    assert {_name(r) for r in [*project["project"]["dependencies"], *(r for extra in extras for r in extra)]} <= pins


def test_the_tree_is_the_tree() -> None:
    """Every path that the tree names is there, and every module of models/ and app/ is in the tree."""
    folders: list[str] = []
    named = set()
    for line in _section("The tree").split("```text\n")[1].split("```")[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        words = re.split(r"\s{2,}", line.strip())[0].split()
        for word in words:
            named.add("/".join([*folders[:depth], word.rstrip("/")]))
        if words[0].endswith("/"):
            folders[depth:] = [words[0].rstrip("/")]
    missing = sorted(path for path in named if not (HOUSE / path).exists())
    assert not missing
    modules = [*HOUSE.glob("models/*.py"), *HOUSE.glob("app/*.py"), *HOUSE.glob("docs/*.md")]
    untold = sorted({str(m.relative_to(HOUSE)) for m in modules if m.name != "__init__.py"} - named)
    assert not untold


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """A link to a file of this repository; those that lead out of it are not followed."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    broken = [t for t in targets if not re.match(r"\w+:", t) and not (page.parent / t).exists()]
    assert not broken


def test_the_configuration_is_told_whole() -> None:
    text = _section("Configuration")
    assert {row[0].strip("`") for row in _rows(text)} == set(ModelSettings.model_fields)
    others = {*CardDefaults.model_fields, *GatewaySettings.model_fields, *CatalogueSettings.model_fields}
    assert others <= set(re.findall(r"`([^`]+)`", text))


def test_the_api_is_told_whole() -> None:
    text = (HOUSE / "docs" / "api.md").read_text().split("## The fields")[1].split("## ")[0]
    assert {name for row in _rows(text) for name in re.findall(r"`(\w+)`", row[0])} == {
        field.alias or name for name, field in GenerateBody.model_fields.items()
    }


def test_the_page_of_samplers_lists_them_all() -> None:
    rows = _rows((HOUSE / "docs" / "samplers.md").read_text().split("## Every sampler")[1])
    listed = {row[0].strip("`"): (row[1].strip("`"), tuple(re.findall(r"\w+", row[2]))) for row in rows}
    assert listed == {name: (sampler.scheduler, sampler.schedules) for name, sampler in SAMPLERS.items()}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_are_short(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 25
