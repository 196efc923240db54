"""The gateway's process stays light: nothing that it imports brings torch along, and dialects see no Ray."""

import subprocess
import sys

import pytest

CHECK = "import sys; import {modules}; assert not set(sys.modules) & {forbidden}, 'imported'"


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("app.main, app.ingress, app.router, app.dialects.native", {"torch", "diffusers", "transformers"}),
        ("app.service, app.wire, app.dialects.native, app.ingress", {"torch", "ray"}),
        ("app.cli", {"torch", "ray", "fastapi", "pydantic"}),
    ],
)
def test_an_import_stays_light(modules: str, forbidden: set[str]):
    subprocess.run([sys.executable, "-c", CHECK.format(modules=modules, forbidden=forbidden)], check=True)
