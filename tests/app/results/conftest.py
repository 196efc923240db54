"""The databases of the jobs' tests, a folder for pictures, and drawings that came out in one colour."""

from pathlib import Path

import numpy as np
import pytest

from app.database import Database
from app.results.receipt import Drawn
from app.results.results import Results
from app.stores.folder import Folder
from app.stores.links import Links
from models.card import ModelCard
from models.events import Finished
from models.images import ImageFormat, Picture, encode
from models.prompt import PromptReport
from models.request import GenerationRequest
from tests.app.conftest import CARDS, ORIGIN, TIMINGS
from tests.app.jobs.conftest import blank_file, blank_server, database, server, url

__all__ = ["blank_file", "blank_server", "database", "server", "url"]

SECRET = b"s" * 32
KEEP_S = 7200.0
CARD: ModelCard = CARDS["sd15"]
WHITE = Picture(width=64, height=64, data=b"\xff" * (3 * 64 * 64))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "pictures", Links(SECRET))


@pytest.fixture
def results(database: Database, folder: Folder) -> Results:
    return Results(database, folder, KEEP_S)


def drawn(seed: int = 7, format: ImageFormat = "png", image: Picture | None = None, samples: int = 1) -> Drawn:
    """What came of a request: pictures of the colour of their seed."""
    request = GenerationRequest(
        model="sd15", prompt="a red circle", seed=seed, image=image, output_format=format, samples=samples
    )
    pictures = tuple(
        Finished(
            index=index,
            seed=seed + index,
            data=encode(np.full((128, 128, 3), seed + index, np.uint8), format),
            format=format,
            width=128,
            height=128,
            revision="abc",
            timings=TIMINGS,
            prompts={"prompt": PromptReport(tokens=3, chunks=1)},
            warnings=("a word of warning",),
        )
        for index in range(samples)
    )
    return Drawn(request=request.resolve(CARD), origin=ORIGIN, images=pictures)
