"""The lock file of weights: which files a model has at a commit, how long they are, and their SHA-256."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, RootModel, StringConstraints, ValidationError

from models.errors import InvalidRequest


class LockedFile(BaseModel):
    """What a file has to be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=0)
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


Files = Mapping[str, LockedFile]  # by path
_Content = RootModel[dict[str, dict[str, LockedFile]]]


class Lock:
    """A file of JSON that is kept with the configuration: whoever changes it is seen to."""

    def __init__(self, path: Path):
        """Raises InvalidRequest for a file that is no lock."""
        self._path = path
        try:
            self._models = _Content.model_validate_json(path.read_bytes()).root if path.exists() else {}
        except ValidationError as wrong:
            raise InvalidRequest("lock_file", f"{path} is not a lock of weights: {wrong}") from wrong

    def has(self, pinned: str) -> bool:
        """Whether `ORG/NAME@COMMIT` is locked."""
        return pinned in self._models

    def files(self, pinned: str) -> Files:
        """Those of `ORG/NAME@COMMIT`. Raises InvalidRequest where it is not locked."""
        if pinned not in self._models:
            locked = ", ".join(self._models) or "none"
            advice = "run this once with --lock where you trust the hub, and keep the file"
            raise InvalidRequest("model", f"{pinned} is not in {self._path} (there: {locked}); {advice}")
        return self._models[pinned]

    def add(self, pinned: str, files: Files) -> None:
        """Writes the files of a model down; the lock has its old content or the new one, whatever happens."""
        self._models[pinned] = dict(files)
        content = {model: {path: f.model_dump() for path, f in files.items()} for model, files in self._models.items()}
        handle, draft = tempfile.mkstemp(dir=self._path.parent, prefix=".lock-")
        with os.fdopen(handle, "w") as out:
            json.dump(content, out, indent=2, sort_keys=True)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        os.chmod(draft, 0o644)
        os.replace(draft, self._path)
