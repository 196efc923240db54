"""A hub of models: the files that a model has at a commit, and downloads that go on where they were cut off.

The addresses are those of the Hugging Face Hub, which its library makes; the download is ours, because the library's
begins a large file anew after every interruption.
"""

import fnmatch
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers

from models.errors import InvalidRequest, Unavailable

TRIES = 6
SILENCE_S = 60.0  # without a byte; then the connection counts as lost


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository. The hub knows the SHA-256 of its large files."""

    path: str
    bytes: int
    sha256: str | None


class Hub:
    """One hub; without an endpoint the one that huggingface_hub is set up for, with its token."""

    def __init__(self, endpoint: str | None = None):
        self._endpoint = endpoint
        self._api = HfApi(endpoint=endpoint)
        self._client = httpx2.Client(follow_redirects=True, timeout=SILENCE_S, headers=build_hf_headers())

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def files(self, model: str, commit: str, patterns: Iterable[str]) -> list[RemoteFile]:
        """The files of a model whose paths match one of the patterns. Raises InvalidRequest where there is no such
        model or commit, and for a path that leads out of its folder."""
        try:
            tree = list(self._api.list_repo_tree(model, recursive=True, revision=commit))
        except (HfHubHTTPError, OSError) as error:
            raise InvalidRequest("model", f"{model}@{commit} cannot be listed: {error}") from error
        entries = [entry for entry in tree if isinstance(entry, RepoFile)]
        found = [entry for entry in entries if any(fnmatch.fnmatch(entry.path, pattern) for pattern in patterns)]
        for entry in found:
            if ".." in PurePosixPath(entry.path).parts or entry.path.startswith("/"):
                raise InvalidRequest("model", f"{model}@{commit} has a path that leads out of it: {entry.path}")
        return [RemoteFile(path=e.path, bytes=e.size, sha256=e.lfs.sha256 if e.lfs else None) for e in found]

    def download(self, model: str, commit: str, file: RemoteFile, to: Path, on_bytes: Callable[[int], None]) -> None:
        """Writes the file, or what of it is not there yet. `on_bytes` hears how much of it there is.

        Raises Unavailable where the hub does not give it, and InvalidRequest where it gives too much.
        """
        address = hf_hub_url(model, file.path, revision=commit, endpoint=self._endpoint)
        to.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, TRIES + 1):
            try:
                self._go_on(address, file, to, on_bytes)
                return
            except httpx2.HTTPError as error:
                if attempt == TRIES:
                    raise Unavailable(60.0, f"{address} does not come: {error}") from error
            time.sleep(2.0**attempt / 8)

    def _go_on(self, address: str, file: RemoteFile, to: Path, on_bytes: Callable[[int], None]) -> None:
        there = to.stat().st_size if to.exists() else 0
        on_bytes(there)
        if there == file.bytes and to.exists():
            return
        there = there if there < file.bytes else 0  # what is too long is begun anew
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={there}-"} if there else {})
        with self._client.stream("GET", address, headers=headers) as answer:
            answer.raise_for_status()
            if answer.status_code != 206:  # a server that knows no ranges gives it from the beginning
                there = 0
            with to.open("ab" if there else "wb") as out:
                for chunk in answer.iter_raw():
                    out.write(chunk)
                    there += len(chunk)
                    if there > file.bytes:
                        raise InvalidRequest("model", f"{address} is longer than the {file.bytes} bytes it is to have")
                    on_bytes(there)
                out.flush()
                os.fsync(out.fileno())
        if there < file.bytes:
            raise httpx2.RemoteProtocolError(f"{there} of {file.bytes} bytes came")
