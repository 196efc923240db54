"""Adapters on disk: a folder of `.safetensors` files, found by name without a restart and pinned by content. No torch.

A name is a file's stem and a key of what the folder holds; it is never joined to a path.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar
from weakref import WeakValueDictionary

from models.errors import NotFound

NAME = re.compile(r"[a-z0-9._-]{1,64}")
SUFFIX = ".safetensors"
LARGEST_HEADER = 32 * 2**20  # bytes; trainers put tags of whole data sets into it
LORA_WORDS = ("lora", "hada_", "lokr_", "oft_", "dora_scale", ".diff")
TEXTUAL_INVERSION_KEYS = ({"emb_params"}, {"clip_l"}, {"clip_g"}, {"clip_l", "clip_g"})
BASE_KEYS = ("ss_base_model_version", "modelspec.architecture")
SETTLED_S = 2.0  # a file changed more recently than this may change again within one tick of its clock

Kind = Literal["lora", "textual_inversion"]
_Identity = tuple[int, int, int]  # size, time of change in ns, inode


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """One usable adapter, pinned by its content. `base` is the model it says it was made for, or empty."""

    name: str
    path: Path
    sha256: str
    kind: Kind
    base: str
    size_bytes: int

    def read(self) -> bytes:
        """The content that `sha256` stands for. Raises NotFound where the file has gone or is another one now."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise NotFound(f"adapter {self.name!r} was removed while it was asked for") from error
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise NotFound(f"adapter {self.name!r} was replaced while it was asked for; ask again for the new one")
        return data


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One file of the folder as anybody may see it; `problem` says why it cannot be used, and is empty if it can."""

    name: str
    kind: Kind | None
    base: str
    size_bytes: int
    problem: str = ""


@dataclass
class _Seen:
    """What is remembered of a file as long as it stays the same one."""

    identity: _Identity
    listed: Listed
    sha256: str = ""


class Registry:
    """The adapters in one folder, as they are at the moment of asking. May be used from any thread."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._seen: dict[Path, _Seen] = {}
        self._lock = threading.Lock()

    def listing(self) -> list[Listed]:
        """Every `.safetensors` file of the folder, by name; the unusable ones with their reason."""
        with self._lock:
            return sorted((seen.listed for seen in self._look().values()), key=lambda listed: listed.name)

    def find(self, name: str, kind: Kind | None = None) -> AdapterFile:
        """The adapter of that name, and of that kind if one is given. Raises NotFound, which lists what there is."""
        with self._lock:
            found = self._look()
            for path, seen in found.items():
                listed = seen.listed
                if listed.name != name or (kind and listed.kind and listed.kind != kind):
                    continue
                if listed.problem:
                    raise NotFound(f"adapter {name!r} cannot be used: {listed.problem}")
                assert listed.kind is not None
                sha256, size = self._hash(path, seen)
                return AdapterFile(
                    name=name, path=path, sha256=sha256, kind=listed.kind, base=listed.base, size_bytes=size
                )
        usable = [seen.listed for seen in found.values() if not seen.listed.problem]
        names = sorted(listed.name for listed in usable if kind in (None, listed.kind))
        what = {"lora": "LoRA", "textual_inversion": "textual inversion", None: "adapter"}[kind]
        raise NotFound(f"there is no {what} {name[:64]!r}; there is: {', '.join(names) or 'none'}")

    def _look(self) -> dict[Path, _Seen]:
        """What the folder holds now; headers are read only of files that are new or have changed."""
        found = {}
        for path, facts in self._files():
            identity = _identity(facts)
            seen = self._seen.get(path)
            found[path] = seen if seen and seen.identity == identity else _Seen(identity, _listed(path, facts.st_size))
        self._seen = found
        return found

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        if self._folder is None or not self._folder.is_dir():
            return
        for path in sorted(self._folder.iterdir()):
            try:
                if path.suffix == SUFFIX and path.is_file():
                    yield path, path.stat()
            except FileNotFoundError:
                continue  # removed since the folder was read

    def _hash(self, path: Path, seen: _Seen) -> tuple[str, int]:
        """SHA-256 and size. Remembered once the file has been left alone for a while, so that no change is missed."""
        if seen.sha256:
            return seen.sha256, seen.listed.size_bytes
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                facts = os.fstat(stream.fileno())
        except FileNotFoundError as error:
            raise NotFound(f"adapter {seen.listed.name!r} was removed while it was asked for") from error
        settled = abs(time.time() - facts.st_mtime) > SETTLED_S
        seen.sha256 = digest if settled and _identity(facts) == seen.identity else ""
        return digest, facts.st_size


def _identity(facts: os.stat_result) -> _Identity:
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def _listed(path: Path, size: int) -> Listed:
    """What the file's name and header say."""
    kind, base = None, ""
    try:
        header = read_header(path, size)
        kind, base = _kind(header), _base(header)
        problem = "" if kind else "it holds neither a LoRA's weights nor a textual inversion's"
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error) or "its header is not that of a .safetensors file"
    if not NAME.fullmatch(path.stem):
        problem = "its name must be of 1 to 64 characters out of a-z, 0-9, dot, underscore and hyphen; rename the file"
    return Listed(name=path.stem, kind=kind, base=base, size_bytes=size, problem=problem)


def read_header(path: Path, size: int) -> dict[str, Any]:
    """The header of a safetensors file of `size` bytes. Raises ValueError for one that is none, or not complete.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(LARGEST_HEADER, size - 8):
            raise ValueError("it is not a complete .safetensors file, or its header is larger than 32 MiB")
        text = stream.read(length)
    try:
        header = json.loads(text)
        tensors = [value for key, value in header.items() if key != "__metadata__"]
        ends = [int(end) for tensor in tensors for _, end in [tensor["data_offsets"]]]
        shapes_known = all(isinstance(tensor["shape"], list) for tensor in tensors)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError("its header is not that of a .safetensors file") from error
    if not shapes_known or 8 + length + max(ends, default=0) != size:
        raise ValueError("it is not a complete .safetensors file")
    return header


def _kind(header: dict[str, Any]) -> Kind | None:
    """Told by the tensors' names; diffusers' textual inversions are one matrix named by its word."""
    names = set(header) - {"__metadata__"}
    if any(word in name for name in names for word in LORA_WORDS):
        return "lora"
    one_matrix = len(names) == 1 and all(len(header[name]["shape"]) in (1, 2) for name in names)
    return "textual_inversion" if names in TEXTUAL_INVERSION_KEYS or one_matrix else None


def _base(header: dict[str, Any]) -> str:
    """What kohya's trainer or the Stability model spec say, if anything."""
    metadata = header.get("__metadata__")
    metadata = metadata if isinstance(metadata, dict) else {}
    return next((str(metadata[key])[:100] for key in BASE_KEYS if metadata.get(key)), "")


class Sized(Protocol):
    """Anything that says how much memory it takes."""

    @property
    def nbytes(self) -> int: ...


Loaded = TypeVar("Loaded", bound=Sized)


class AdapterCache(Generic[Loaded]):
    """Loaded adapters by content, the least recently used leaving first. May be used from any thread.

    Whoever uses one holds a reference to it, so what leaves here is freed only when its last use has ended; until then
    it is found again rather than loaded a second time.
    """

    def __init__(self, capacity_bytes: int):
        self._capacity = capacity_bytes
        self._entries: OrderedDict[tuple[str, str], Future[Loaded]] = OrderedDict()
        self._alive: WeakValueDictionary[tuple[str, str], Loaded] = WeakValueDictionary()
        self._lock = threading.Lock()

    def get(self, file: AdapterFile, load: Callable[[AdapterFile], Loaded]) -> Loaded:
        """The adapter in memory. `load` runs once, however many ask meanwhile; what it raises, all of them get."""
        key = (file.name, file.sha256)
        with self._lock:
            new = key not in self._entries
            if new:
                self._entries[key] = self._revived(key)
            entry = self._entries[key]
            self._entries.move_to_end(key)
        if new:
            if not entry.done():
                self._fill(entry, file, load)
            self._evict()
        return entry.result()

    @property
    def nbytes(self) -> int:
        """What the adapters in here take together."""
        with self._lock:
            return self._size()

    def _revived(self, key: tuple[str, str]) -> Future[Loaded]:
        """An entry for what has left and is still in use, or an empty one."""
        entry: Future[Loaded] = Future()
        living = self._alive.get(key)
        if living is not None:
            entry.set_result(living)
        return entry

    def _fill(self, entry: Future[Loaded], file: AdapterFile, load: Callable[[AdapterFile], Loaded]) -> None:
        key = (file.name, file.sha256)
        try:
            loaded = load(file)
        except BaseException as error:
            with self._lock:
                del self._entries[key]
            entry.set_exception(error)
            raise
        with self._lock:
            self._alive[key] = loaded
        entry.set_result(loaded)

    def _size(self) -> int:
        return sum(entry.result().nbytes for entry in self._entries.values() if entry.done())

    def _evict(self) -> None:
        with self._lock:
            loaded = [key for key, entry in self._entries.items() if entry.done()]
            while loaded and self._size() > self._capacity:
                del self._entries[loaded.pop(0)]
