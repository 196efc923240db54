"""The layers of the house, held by reading the sources: who may import whom, and how long anything may grow.

A rule is a function from the sources to its breaches, one line each: where, what, and what to do about it.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "app", "cluster", "bench")

ENGINE = ("request", "tapes", "conditioning", "sequence", "batcher", "denoiser", "engine")
ENGINE_LINES, FILE_LINES, FUNCTION_LINES = 1500, 400, 60
RAY_FILES = tuple(
    f"app.{name}"
    for name in (
        *("main", "ingress", "router", "replica", "routing", "upscaler", "autoscaling", "exposure_counter"),
        *("cli", "local"),  # local: cli's Ray
    )
)
BRINGS_TORCH = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "safetensors.torch")
TORCH_FREE_MODELS = tuple(
    f"models.{name}"
    for name in (
        *("request", "limits", "parts", "errors", "card", "events", "samplers", "batcher", "canvas"),
        *("images", "decoding", "png", "exif", "infotext", "metadata", "document"),
        *("work", "pace", "load", "turns", "admission"),
    )
)
TORCH_FREE_APP = tuple(
    f"app.{name}"
    for name in (
        *("ingress", "service", "router", "settings", "dialects", "jobs", "stores", "database", "migrations"),
        *("auth", "keys", "metered", "pictures", "secret", "job_runner"),
        *("cache", "drawing", "experiments", "origin", "replay", "results", "strict"),
        *("admission", "autoscaling", "hint", "lobby", "routing", "vitals"),
    )
)

# Who stands above whom. A module imports what stands below it or beside it, never above; what is not named is free.
MODELS_ORDER = (
    (
        *("models.request", "models.errors", "models.card", "models.events", "models.samplers", "models.images"),
        *("models.work", "models.pace", "models.load"),
    ),
    ("models.tapes", "models.conditioning"),
    (
        *("models.turns", "models.batcher", "models.denoiser", "models.sequence", "models.admission"),
        *("models.batch", "models.forward", "models.captured", "models.compiled"),
    ),
    ("models.preparation", "models.delivery", "models.measuring"),
    ("models.engine",),
)
APP_ORDER = (
    ("app.database", "app.migrations"),
    ("app.router", "app.jobs", "app.stores", "app.keys", "app.origin"),
    ("app.cache",),
    ("app.results",),
    ("app.drawing",),
    ("app.experiments",),
    ("app.service",),
    ("app.replay",),
    ("app.dialects",),
    ("app.ingress", "app.replica", "app.upscaler", "app.job_runner"),
    ("app.main",),
)


@dataclass(frozen=True)
class Import:
    """One imported module as one line of a source says it."""

    module: str
    line: int
    runs: bool  # false under `if TYPE_CHECKING:`, which only the type checker reads


@dataclass(frozen=True)
class Source:
    """One Python file: its place, its module name, its syntax tree."""

    path: str
    module: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def imports(self) -> list[Import]:
        unread = {id(n) for guard in ast.walk(self.tree) if _type_checking(guard) for n in ast.walk(guard)}
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [Import(alias.name, node.lineno, id(node) not in unread) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
                found += [Import(name, node.lineno, id(node) not in unread) for name in sorted(names)]
        return found

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())


Sources = dict[str, Source]
Rule = Callable[[Sources], Iterator[str]]


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def read(house: Path) -> Sources:
    """Every source of the house's packages, by module name."""
    sources = {}
    for path in sorted(p for package in PACKAGES for p in (house / package).rglob("*.py")):
        parts = path.relative_to(house).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[module] = Source(str(path.relative_to(house)), module, path.read_text())
    return sources


def inside(module: str, roots: tuple[str, ...]) -> bool:
    return any(module == root or module.startswith(f"{root}.") for root in roots)


def imports_of(sources: Sources, importers: tuple[str, ...], banned: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(where, what) for each line in which one of the importers names a banned module; said once per line."""
    for source in sources.values():
        if inside(source.module, importers):
            lines = {i.line: i.module for i in reversed(source.imports) if inside(i.module, banned)}
            yield from ((f"{source.path}:{line}", module) for line, module in sorted(lines.items()))


def cluster_app_models(sources: Sources) -> Iterator[str]:
    """cluster -> app -> models, and nobody leans on the benchmarks or the tests."""
    for lower, above in (("models", ("app", "cluster", "bench", "tests")), ("app", ("cluster", "bench", "tests"))):
        for where, module in imports_of(sources, (lower,), above):
            yield f"{where} imports {module}: {lower} lies below it; move what is shared down, or hand it in"


def models_know_no_server(sources: Sources) -> Iterator[str]:
    for where, module in imports_of(sources, ("models",), ("ray", "fastapi", "starlette", "uvicorn")):
        yield f"{where} imports {module}: models/ runs without a server; do this in app/"


def ray_stays_in_its_files(sources: Sources) -> Iterator[str]:
    elsewhere = tuple(m for m in sources if inside(m, ("app", "models")) and m not in RAY_FILES)
    for where, module in imports_of({m: sources[m] for m in elsewhere}, ("app", "models"), ("ray",)):
        yield f"{where} imports {module}: ray is known only to {', '.join(RAY_FILES)} and cluster/; take a callable"


def dialects_jobs_stores_see_no_torch(sources: Sources) -> Iterator[str]:
    for where, module in imports_of(sources, ("app.dialects", "app.jobs", "app.stores"), BRINGS_TORCH):
        yield f"{where} imports {module}: dialects, jobs and stores speak in requests and bytes, not tensors"


def _order(sources: Sources, order: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    for height, floor in enumerate(order):
        above = tuple(module for higher in order[height + 1 :] for module in higher)
        for where, module in imports_of(sources, floor, above):
            yield f"{where} imports {module}, which stands above it: hand the value or a callable down instead"


def the_engine_stands_on_tapes_and_conditioning(sources: Sources) -> Iterator[str]:
    """engine -> {preparation, delivery} -> {batcher, denoiser, sequence} -> {tapes, conditioning} -> contracts."""
    yield from _order(sources, MODELS_ORDER)


def the_ingress_stands_on_the_service(sources: Sources) -> Iterator[str]:
    """main -> {ingress, replica, upscaler} -> dialects -> service -> {router, jobs, stores}."""
    yield from _order(sources, APP_ORDER)


def families_and_adapters_are_leaves(sources: Sources) -> Iterator[str]:
    packages = ("models.families", "models.adapters")
    leaves = tuple(m for m in sources if inside(m, packages) and m not in packages)
    engine = tuple(
        f"models.{name}" for name in ("sequence", "preparation", "batcher", "denoiser", "delivery", "engine")
    )
    for leaf in leaves:
        others = tuple(other for other in leaves if other != leaf and not leaf.startswith(f"{other}."))
        for where, module in imports_of(sources, (leaf,), (*engine, *others)):
            yield f"{where} imports {module}: a leaf knows contracts, no other leaf and not the engine"


def no_torch_below_the_ingress(sources: Sources) -> Iterator[str]:
    """Follows every import that runs, from the modules that a process without torch loads."""
    for start in sources:
        if inside(start, (*TORCH_FREE_MODELS, *TORCH_FREE_APP)):
            yield from _paths_to_torch(sources, start)


def _paths_to_torch(sources: Sources, start: str) -> Iterator[str]:
    seen, waiting = {start}, [(start, sources[start].path)]
    while waiting:
        module, path = waiting.pop()
        for found in (i for i in sources[module].imports if i.runs):
            if inside(found.module, BRINGS_TORCH):
                yield f"{path}:{found.line} imports {found.module}: {start} is promised to load no torch"
                return
            for name in _with_parents(found.module):
                if name in sources and name not in seen:
                    seen.add(name)
                    waiting.append((name, f"{path}:{found.line} -> {sources[name].path}"))


def _with_parents(module: str) -> list[str]:
    """Importing `a.b.c` runs `a` and `a.b` first."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def nothing_imports_in_a_circle(sources: Sources) -> Iterator[str]:
    """Only imports that run count; `from package import module` is an import of the module."""
    done: set[str] = set()
    for start in sources:
        yield from _circles(sources, start, [], done)


def _circles(sources: Sources, module: str, trail: list[str], done: set[str]) -> Iterator[str]:
    if module in trail:
        yield f"{' -> '.join([*trail[trail.index(module) :], module])}: break the circle by moving the shared part down"
    elif module not in done:
        for name in sorted({i.module for i in sources[module].imports if i.runs} & sources.keys() - {module}):
            if not inside(module, (name,)):  # a package's own __init__ is no circle
                yield from _circles(sources, name, [*trail, module], done)
        done.add(module)


def the_environment_is_read_in_settings(sources: Sources) -> Iterator[str]:
    """Setting a variable for a library that reads it is not reading."""
    readers = ("os.environ", "os.getenv", "os.environb")
    for source in (s for s in sources.values() if s.module != "app.settings"):
        written = {id(node) for statement in ast.walk(source.tree) for node in _set(statement)}
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in readers and id(node) not in written:
                yield f"{source.path}:{node.lineno} reads the environment: only app/settings.py does; take an argument"
        for found in source.imports:
            if found.module in readers or inside(found.module, ("pydantic_settings", "dotenv")):
                yield f"{source.path}:{found.line} imports {found.module}: only app/settings.py reads the environment"


def _set(node: ast.AST) -> list[ast.expr]:
    """What is written to by `x[...] = y`, and by `x.update(y)` and `x.setdefault(y)` as statements."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        return [node.value]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
        return [node.value.func.value] if node.value.func.attr in ("update", "setdefault") else []
    return []


def no_relative_imports(sources: Sources) -> Iterator[str]:
    for source in sources.values():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                yield f"{source.path}:{node.lineno} imports relatively: write the module's full name"


def the_engine_fits_in_mind(sources: Sources) -> Iterator[str]:
    sizes = {name: sources[f"models.{name}"].lines for name in ENGINE if f"models.{name}" in sources}
    if sum(sizes.values()) >= ENGINE_LINES:
        parts = ", ".join(f"models/{name}.py {lines}" for name, lines in sizes.items())
        yield f"the engine has {sum(sizes.values())} lines, {ENGINE_LINES} or more: simplify. It is {parts}"


def files_stay_short(sources: Sources) -> Iterator[str]:
    for source in sources.values():
        if source.lines > FILE_LINES:
            yield f"{source.path}:{FILE_LINES} is not the end, there are {source.lines} lines: give a noun its own file"


def functions_stay_short(sources: Sources) -> Iterator[str]:
    """A function's lines without those of the functions inside it, which are counted for themselves."""
    for source in sources.values():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = _span(node) - sum(_span(inner) for inner in _inner(node))
                if lines > FUNCTION_LINES:
                    yield f"{source.path}:{node.lineno} {node.name} has {lines} lines, over {FUNCTION_LINES}: split it"


def _span(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _inner(node: ast.AST) -> Iterator[ast.stmt]:
    """The functions directly inside a node, not those inside these."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _inner(child)


@pytest.fixture(scope="module")
def house() -> Sources:
    return read(HOUSE)


RULES: tuple[Rule, ...] = (
    cluster_app_models,
    models_know_no_server,
    ray_stays_in_its_files,
    dialects_jobs_stores_see_no_torch,
    the_engine_stands_on_tapes_and_conditioning,
    the_ingress_stands_on_the_service,
    families_and_adapters_are_leaves,
    no_torch_below_the_ingress,
    nothing_imports_in_a_circle,
    the_environment_is_read_in_settings,
    no_relative_imports,
    the_engine_fits_in_mind,
    files_stay_short,
    functions_stay_short,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Rule, house: Sources) -> None:
    breaches = list(rule(house))
    assert not breaches, "\n".join(breaches)


# For each rule, a file that breaks it.
OFFENDERS = (
    (cluster_app_models, "models/engine.py", "from app import service"),
    (cluster_app_models, "app/main.py", "import cluster.batch"),
    (models_know_no_server, "models/weights.py", "def load():\n    import ray"),
    (models_know_no_server, "models/events.py", "from starlette.types import Send"),
    (ray_stays_in_its_files, "app/service.py", "from ray import serve"),
    (ray_stays_in_its_files, "app/dialects/native.py", "import ray.serve"),
    (dialects_jobs_stores_see_no_torch, "app/jobs/runner.py", "import torch"),
    (the_engine_stands_on_tapes_and_conditioning, "models/tapes.py", "from models.sequence import Sequence"),
    (the_engine_stands_on_tapes_and_conditioning, "models/batcher.py", "import models.engine"),
    (the_engine_stands_on_tapes_and_conditioning, "models/events.py", "from models import tapes"),
    (the_ingress_stands_on_the_service, "app/jobs/runner.py", "from app.service import Service"),
    (the_ingress_stands_on_the_service, "app/service.py", "from app.dialects import native"),
    (families_and_adapters_are_leaves, "models/families/sd.py", "from models.denoiser import Denoiser"),
    (families_and_adapters_are_leaves, "models/adapters/lora.py", "from models.families import sd"),
    (no_torch_below_the_ingress, "app/ingress.py", "from models.families import sd"),
    (no_torch_below_the_ingress, "models/batcher.py", "def order():\n    import diffusers"),
    (nothing_imports_in_a_circle, "models/weights.py", "from models import tapes"),
    (the_environment_is_read_in_settings, "models/weights.py", "import os\nhome = os.environ['HF_HOME']"),
    (the_environment_is_read_in_settings, "app/auth.py", "from os import getenv"),
    (the_environment_is_read_in_settings, "bench/load.py", "import os\nseed = os.environ.setdefault('SEED', '1')"),
    (no_relative_imports, "app/ingress.py", "from .service import Service"),
    (the_engine_fits_in_mind, "models/engine.py", "\n" * ENGINE_LINES),
    (files_stay_short, "bench/report.py", "\n" * (FILE_LINES + 1)),
    (functions_stay_short, "cluster/batch.py", "def run():" + "\n    pass" * FUNCTION_LINES),
)
NEIGHBOURS = {
    "models/families/sd.py": "import torch\nfrom models.errors import NotFound",
    "models/errors.py": "",
    "models/tapes.py": "import torch, models.weights",
    "models/sequence.py": "import torch",
}


@pytest.mark.parametrize(("rule", "path", "text"), OFFENDERS, ids=[f"{r.__name__}-{path}" for r, path, _ in OFFENDERS])
def test_the_rules_catch(rule: Rule, path: str, text: str, tmp_path: Path) -> None:
    for name, content in (NEIGHBOURS | {path: text}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    breaches = list(rule(read(tmp_path)))
    assert len(breaches) == 1, breaches
    assert path.removesuffix(".py") in breaches[0].replace(".", "/")


def test_the_type_checker_may_read_what_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "batcher.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    )
    assert not list(no_torch_below_the_ingress(read(tmp_path)))


def test_a_process_without_torch_stays_without_torch(house: Sources) -> None:
    modules = [m for m in house if inside(m, (*TORCH_FREE_MODELS, "app.ingress", "app.service", "app.dialects"))]
    program = f"import sys, {', '.join(modules)}\nprint(*sorted({{'torch', 'diffusers'}} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=HOUSE, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stdout.strip(), f"importing {modules} brings in {ran.stdout.strip()}: find who imports it"
