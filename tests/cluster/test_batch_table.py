"""The input of a batch job: what is a row, what is a bad one, and what is no input at all."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.settings import FetchSettings
from cluster.inputs import Pictures
from cluster.table import Row, rows
from models.errors import InvalidRequest

BODY = {"prompt": "a red circle, large", "steps": 4, "guidance_scale": 6.5, "hires": {"scale": 2.0}}


WRONG = [("a.txt", ""), ("a.csv", "prompt,promt\na,b\n"), ("b.csv", "prompt,prompt\na,b\n"), ("a.parquet", "no")]


def jsonl(folder: Path, *lines: Any) -> list[Row]:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return list(rows(path))


def csv(folder: Path, text: str) -> list[Row]:
    path = folder / "rows.csv"
    path.write_text(text)
    return list(rows(path))


def parquet(folder: Path, table: pa.Table) -> list[Row]:
    path = folder / "rows.parquet"
    pq.write_table(table, path)
    return list(rows(path))


def fault(row: Row) -> str:
    assert row.error is not None, row
    return row.error["field"]


def test_the_kinds_of_file_say_the_same(tmp_path: Path):
    [one] = jsonl(tmp_path, {"id": "a"} | BODY)
    text = 'id,prompt,steps,guidance_scale,hires,seed\na,"a red circle, large",4,6.5,"{""scale"": 2.0}",\n'
    [two] = csv(tmp_path, text)
    [three] = parquet(tmp_path, pa.Table.from_pylist([{"id": "a"} | BODY]))
    [four] = parquet(tmp_path, pa.Table.from_pylist([{"id": "a"} | BODY | {"hires": '{"scale": 2.0}'}]))
    assert one == two == three == four == Row(number=0, id="a", body=BODY)


def test_text_stays_text_whatever_it_looks_like(tmp_path: Path):
    [row] = csv(tmp_path, "id,prompt,negative_prompt\n7,1984,true\n")
    assert (row.id, row.body) == ("7", {"prompt": "1984", "negative_prompt": "true"})


def test_what_is_left_empty_is_left_out(tmp_path: Path):
    table = pa.table({"prompt": ["a", "b"], "seed": [7.0, math.nan], "steps": pa.array([None, 3], pa.int64())})
    one, two = parquet(tmp_path, table)
    assert (one.body, two.body) == ({"prompt": "a", "seed": 7}, {"prompt": "b", "steps": 3})


def test_a_row_without_an_id_gets_one_that_its_request_decides(tmp_path: Path):
    lines = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}]
    ids = [row.id for row in jsonl(tmp_path, *lines)]
    assert len(set(ids)) == 3
    assert ids == [row.id for row in jsonl(tmp_path, *lines)]
    assert ids[0].partition("-")[2] == ids[1].partition("-")[2] != ids[2].partition("-")[2]


def test_a_bad_row_stands_among_good_ones(tmp_path: Path):
    found = jsonl(
        tmp_path,
        {"id": "a", "prompt": "a"},
        "{no json",
        [1],
        {"id": "../a", "prompt": "a"},
        {"id": "a", "prompt": "b"},
        {"id": "b", "promt": "a"},
        {"id": "c", "prompt": "a", "stream": True},
        {"id": "d", "prompt": "d"},
    )
    assert [row.number for row in found] == list(range(8))
    assert len({row.id for row in found}) == 8
    assert [row.id for row in found if row.error is None] == ["a", "d"]
    assert [fault(row) for row in found[1:-1]] == ["input", "input", "id", "id", "promt", "stream"]
    too_many, unparsed = csv(tmp_path, "prompt,steps\na,3,4\nb,many\n")
    assert (fault(too_many), fault(unparsed)) == ("input", "steps")


def test_a_bottomless_row_is_a_bad_one(tmp_path: Path):
    deep = "[" * 300 + "]" * 300
    lines = ['{"prompt": "a", "hires": ' + deep + "}", '{"prompt": "b"}']
    assert [row.error and row.error["field"] for row in jsonl(tmp_path, *lines)] == ["input", None]
    assert [row.error and row.error["field"] for row in csv(tmp_path, f"prompt,hires\na,{deep}\nb,\n")] == [
        "input",
        None,
    ]


def test_nobody_can_take_an_id_that_is_given(tmp_path: Path):
    [given] = jsonl(tmp_path, {"prompt": "a"})
    taken, own = jsonl(tmp_path, {"id": given.id, "prompt": "x"}, {"prompt": "a"})
    assert fault(taken) == "id"
    assert own.error is None


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_a_file_that_is_wrong_as_a_whole_is_refused(tmp_path: Path, name: str, text: str):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InvalidRequest):
        list(rows(path))
    with pytest.raises(InvalidRequest, match="no file"):
        list(rows(tmp_path / "missing.jsonl"))


class Evil(pa.ExtensionType):
    """What an attacker's file would have: a type whose reading runs code."""

    read = False

    def __init__(self, length: int):
        self.length = length  # so that the word begins at any of the three places of base64
        super().__init__(pa.string(), "evil." + "x" * length)

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> "Evil":
        cls.read = True
        return cls(0)


@pytest.mark.parametrize("length", range(6))
def test_a_file_with_extension_types_is_refused_before_they_are_read(tmp_path: Path, length: int):
    kind = Evil(length)
    names = ["prompt" + "y" * length, "seed"]
    column = pa.ExtensionArray.from_storage(kind, pa.array(["a"]))
    pq.write_table(pa.table([column, pa.array([1])], names=names), tmp_path / "rows.parquet")
    pa.register_extension_type(kind)
    try:
        with pytest.raises(InvalidRequest, match="extension types"):
            list(rows(tmp_path / "rows.parquet"))
    finally:
        pa.unregister_extension_type(kind.extension_name)
    assert not Evil.read


def test_columns_that_json_does_not_have_are_refused(tmp_path: Path):
    with pytest.raises(InvalidRequest, match="type binary"):
        parquet(tmp_path, pa.table({"prompt": pa.array([b"a"])}))
    with pytest.raises(InvalidRequest, match=r"hires\.scale"):
        parquet(tmp_path, pa.table({"hires": [{"scale": b"2"}]}))


def test_pictures_are_read_below_the_inputs_folder_alone(tmp_path: Path):
    folder = tmp_path / "input"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.png").write_bytes(b"inside")
    (tmp_path / "secret.png").write_bytes(b"outside")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    pictures = Pictures(folder, FetchSettings(max_bytes=1024))
    body = {"prompt": "a", "image": "deep/a.png", "controls": [{"name": "canny", "image": "deep/../deep/a.png"}]}
    read = pictures.read(body)
    assert (read["image"], read["controls"][0]["image"], read["prompt"]) == (b"inside", b"inside", "a")
    assert pictures.read({"mask": "https://example.org/a.png"}) == {"mask": "https://example.org/a.png"}
    absolute = str(tmp_path / "secret.png")
    for outside in ("../secret.png", "link.png", absolute, "missing.png", "deep", "a\0b", "x" * 5000):
        with pytest.raises(InvalidRequest, match=r"^init_image: "):
            pictures.read({"init_image": outside})
    (folder / "large.png").write_bytes(b"x" * 1025)
    with pytest.raises(InvalidRequest, match="1024 bytes"):
        pictures.read({"image": "large.png"})
    with pytest.raises(InvalidRequest, match=r"controls\.0\.image"):
        pictures.read({"controls": [{"name": "canny", "image": "../secret.png"}]})
