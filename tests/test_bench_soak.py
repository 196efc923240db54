"""The soak's own honesty: a leak would be seen, requests are of all kinds, and LoRAs really change."""

import random
from collections import Counter
from hashlib import sha256

import pytest

from app.dialects.native.bodies import GenerateBody
from bench.soak import LORAS, WARM, Churn, Reading, request, sheet_of, slope


def test_the_line_sees_a_leak_and_not_what_fills_up_at_first():
    growing = [
        Reading(requests=n, seconds=n, mib={"model": 500 + 0.05 * n, "gateway": 100.0}) for n in range(0, 1001, 50)
    ]
    assert slope(growing, "model") == pytest.approx(50)
    assert slope(growing, "gateway") == pytest.approx(0, abs=1e-6)
    filling = [Reading(requests=n, seconds=n, mib={"model": min(700, 500 + n)}) for n in range(0, 1001, 50)]
    assert WARM * 1000 == 200
    assert sheet_of(filling, 1000).rows == [["model", "700", "700", "700", "+0.0"]]


def test_a_process_that_woke_late_is_judged_from_then_on():
    late = [
        Reading(requests=n, seconds=n, mib={"model": 1.0} | ({"upscaler": 9.0} if n > 500 else {})) for n in range(1001)
    ]
    assert sheet_of(late, 1000).rows[1] == ["upscaler", "9", "9", "9", "+0.0"]


def test_requests_are_of_all_kinds_and_every_one_is_accepted(tmp_path):
    churn = Churn(tmp_path, random.Random(1))
    kinds: Counter[str] = Counter()
    for seed in range(60):
        kind, body = request(random.Random(seed), churn.names)
        GenerateBody.model_validate(body)
        kinds[kind] += 1
    assert len(kinds) == 7


def test_loras_are_replaced_by_others_of_the_same_name(tmp_path):
    churn = Churn(tmp_path, random.Random(1))
    before = hashes(tmp_path)
    assert len(before) == LORAS
    assert len(set(before.values())) == LORAS
    for _ in range(50):
        churn.turn()
    after = hashes(tmp_path)
    assert after.keys() == before.keys()
    assert 3 <= sum(before[name] != after[name] for name in before) <= 20


def hashes(folder) -> dict[str, str]:
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}
