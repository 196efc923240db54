"""Adapters on disk: found by name, pinned by content, loaded once, and nothing of a client becomes a path."""

import gc
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from models.adapters.registry import LARGEST_HEADER, AdapterCache, AdapterFile, Registry
from models.errors import InvalidRequest, NotFound

KOHYA = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"


def write(folder: Path, name: str, fill: float = 0.0, key: str = KOHYA, **metadata: str) -> Path:
    path = folder / f"{name}.safetensors"
    save_file({key: np.full((4, 8), fill, np.float16)}, path, metadata=metadata or None)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_found_by_its_stem_and_says_what_it_is(tmp_path):
    path = write(tmp_path, "moon.v2", ss_base_model_version="sd_v1")
    found = Registry(tmp_path).find("moon.v2")
    assert found == AdapterFile(
        name="moon.v2", path=path, sha256=sha256(path), kind="lora", base="sd_v1", size_bytes=path.stat().st_size
    )
    assert found.read() == path.read_bytes()


@pytest.mark.parametrize("key", ["emb_params", "clip_g", "<a-cat>"])
def test_textual_inversions_are_told_from_loras(tmp_path, key):
    write(tmp_path, "word", key=key)
    write(tmp_path, "style")
    registry = Registry(tmp_path)
    assert registry.find("word").kind == registry.find("word", "textual_inversion").kind == "textual_inversion"
    with pytest.raises(NotFound, match=r"no LoRA 'word'; there is: style$"):
        registry.find("word", "lora")


def test_new_files_are_found_and_removed_ones_are_gone_without_a_restart(tmp_path):
    registry = Registry(tmp_path)
    with pytest.raises(NotFound, match="there is: none"):
        registry.find("late")
    path = write(tmp_path, "late")
    found = registry.find("late")
    path.unlink()
    with pytest.raises(NotFound):
        registry.find("late")
    with pytest.raises(NotFound, match="removed"):
        found.read()


def test_no_folder_holds_nothing(tmp_path):
    assert Registry(None).listing() == Registry(tmp_path / "nowhere").listing() == []


@pytest.mark.parametrize("settled", [True, False])
def test_a_replaced_file_has_another_hash_and_the_old_one_cannot_be_read(tmp_path, settled):
    path, registry = write(tmp_path, "moon", 1.0), Registry(tmp_path)
    if settled:
        os.utime(path, (1, 1))
    old = registry.find("moon")
    assert registry.find("moon") == old
    write(tmp_path, "moon", 2.0)
    new = registry.find("moon")
    assert new.sha256 == sha256(path) != old.sha256
    with pytest.raises(NotFound, match="replaced"):
        old.read()


def test_a_change_within_one_tick_of_the_clock_is_seen(tmp_path):
    path, registry = write(tmp_path, "moon", 1.0), Registry(tmp_path)
    before, facts = registry.find("moon"), path.stat()
    write(tmp_path, "moon", 2.0)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert registry.find("moon").sha256 != before.sha256


def test_a_settled_file_is_hashed_once(tmp_path):
    path, registry = write(tmp_path, "moon", 1.0), Registry(tmp_path)
    os.utime(path, (1, 1))
    first = registry.find("moon")
    with path.open("r+b") as stream:  # same size, same inode; and the same time again
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    os.utime(path, (1, 1))
    assert registry.find("moon").sha256 == first.sha256
    with pytest.raises(NotFound, match="replaced"):  # and yet never other weights under that hash
        first.read()


@pytest.mark.parametrize(
    "name",
    [
        "../moon",
        "/etc/passwd",
        "moon/../moon",
        "Moon",
        "moon\0",
        "",
        ".",
        "..",
        "mo on",
        "mo\u2024on",
        "%2e%2e",
        "C:\\x",
    ],
)
def test_what_is_no_name_is_not_found(tmp_path, name):
    (tmp_path / "in").mkdir()
    write(tmp_path, "moon")
    write(tmp_path / "in", "other")
    with pytest.raises(NotFound, match=r"there is: other$"):
        Registry(tmp_path / "in").find(name)


@pytest.mark.parametrize("stem", ["My LoRA", "x" * 65, "Ünder", "a+b"])
def test_a_file_with_no_valid_name_is_listed_with_the_reason(tmp_path, stem):
    write(tmp_path, stem)
    [listed] = Registry(tmp_path).listing()
    assert listed.name == stem
    assert "rename the file" in listed.problem
    with pytest.raises(NotFound, match="rename the file"):
        Registry(tmp_path).find(stem)


def header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        (LARGEST_HEADER + 1).to_bytes(8, "little") + b"{}",
        (2**63).to_bytes(8, "little"),
        (5).to_bytes(8, "little") + b"[1,2]",
        (5).to_bytes(8, "little") + b"{'a':",
        (60_000).to_bytes(8, "little") + b"[" * 60_000,
        header(x={"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}),  # and then nothing
        header(x={"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}) + b"too long",
        header(x={"dtype": "F16", "shape": 2, "data_offsets": [0, 0]}),
        header(x={"dtype": "F16", "data_offsets": [0, 0]}),
        header(x={"dtype": "F16", "shape": [2], "data_offsets": [0]}),
        header(x=7),
        header(),
        header(conv_weight={"dtype": "F16", "shape": [1, 1, 1, 1], "data_offsets": [0, 2]}) + b"ab",
    ],
)
def test_a_broken_file_is_listed_with_the_reason_and_not_used(tmp_path, data):
    (tmp_path / "broken.safetensors").write_bytes(data)
    registry = Registry(tmp_path)
    [listed] = registry.listing()
    assert listed.problem
    with pytest.raises(NotFound, match="cannot be used"):
        registry.find("broken")


def test_a_header_is_never_read_beyond_the_cap(tmp_path):
    path = tmp_path / "bomb.safetensors"
    with path.open("wb") as stream:
        stream.write((LARGEST_HEADER + 1).to_bytes(8, "little"))
        stream.truncate(LARGEST_HEADER + 100)  # sparse
    [listed] = Registry(tmp_path).listing()
    assert "32 MiB" in listed.problem


@dataclass(frozen=True)
class Weights:
    nbytes: int
    content: bytes = b""


def test_the_cache_loads_once_when_several_ask_at_once(tmp_path):
    write(tmp_path, "moon")
    file, cache = Registry(tmp_path).find("moon"), AdapterCache(100)
    loads, ready = [], threading.Event()

    def load(file: AdapterFile) -> Weights:
        loads.append(file)
        ready.wait(5)
        return Weights(1)

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(cache.get, file, load) for _ in range(8)]
        ready.set()
    assert len({id(one.result()) for one in asked}) == len(loads) == 1


def test_the_least_recently_used_leaves_first(tmp_path):
    cache: AdapterCache[Weights] = AdapterCache(100)
    for name in "abc":
        write(tmp_path, name)
    a, b, c = (Registry(tmp_path).find(name) for name in "abc")
    loads: list[str] = []

    def load(file: AdapterFile) -> Weights:
        loads.append(file.name)
        return Weights(40, file.name.encode())

    for file in (b, a, b, a, c, a, b):
        cache.get(file, load)
    assert loads == ["b", "a", "c", "b"]
    assert cache.nbytes == 80
    assert cache.get(c, lambda file: Weights(1000)).nbytes == 1000  # larger than everything: used, not kept
    assert cache.nbytes <= 100


def test_what_has_left_and_is_still_in_use_is_found_again_and_not_loaded_twice(tmp_path):
    cache: AdapterCache[Weights] = AdapterCache(50)
    for name in "ab":
        write(tmp_path, name)
    a, b = (Registry(tmp_path).find(name) for name in "ab")
    loads: list[str] = []

    def load(file: AdapterFile) -> Weights:
        loads.append(file.name)
        return Weights(40, file.name.encode())

    in_flight = cache.get(a, load)
    cache.get(b, load)  # and `a` leaves
    assert cache.get(a, load) is in_flight
    assert loads == ["a", "b"]
    assert cache.nbytes == 40, "`b` left in its turn"
    del in_flight
    cache.get(b, load)
    gc.collect()
    cache.get(a, load)
    assert loads == ["a", "b", "b", "a"], "what nobody uses is not kept"


def test_a_failed_load_is_everybodys_who_asked_and_is_tried_again(tmp_path):
    write(tmp_path, "moon")
    file, cache = Registry(tmp_path).find("moon"), AdapterCache(100)

    def fails(file: AdapterFile) -> Weights:
        raise InvalidRequest("adapters", "no")

    with pytest.raises(InvalidRequest):
        cache.get(file, fails)
    assert cache.get(file, lambda file: Weights(1)).nbytes == 1


def test_a_replaced_file_is_loaded_beside_the_old_one(tmp_path):
    registry, cache = Registry(tmp_path), AdapterCache(10**6)

    def load(file: AdapterFile) -> Weights:
        return Weights(1, file.read())

    path = write(tmp_path, "moon", 1.0)
    old = cache.get(registry.find("moon"), load)
    write(tmp_path, "moon", 2.0)
    new = cache.get(registry.find("moon"), load)
    assert old.content != new.content == path.read_bytes()
