"""API keys as text, and the hash that is kept of them."""

import hashlib
import hmac

import pytest

from app.keys import secrets

PEPPER = b"p" * 32


def test_a_key_has_an_id_and_160_random_bits():
    made = [secrets.new() for _ in range(200)]
    assert len({text for _, text in made}) == 200
    for id, text in made:
        prefix, shown, secret = text.split("_")
        assert (prefix, shown, len(secret) * 5) == ("hk", id, 160)
        assert secrets.id_of(text) == id


@pytest.mark.parametrize(
    "text", ["", "hk_", "hk_a_b", "sk_" + "a" * 16 + "_" + "b" * 32, "hk_" + "a" * 16 + "_" + "B" * 32]
)
def test_what_is_no_key_has_no_id(text: str):
    assert secrets.id_of(text) is None
    assert secrets.id_of(secrets.new()[1] + text + "\n") is None


def test_what_is_kept_is_a_keyed_hash():
    _, text = secrets.new()
    kept = secrets.digest(PEPPER, text)
    assert kept == hmac.new(PEPPER, text.encode(), hashlib.sha256).hexdigest()
    assert kept != hashlib.sha256(text.encode()).hexdigest()
    assert secrets.agrees(kept, PEPPER, text)
    assert not secrets.agrees(kept, b"q" * 32, text)
    assert not secrets.agrees(kept, PEPPER, secrets.new()[1])


def test_hashes_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch):
    """`==` ends at the first difference; compare_digest is asked, and what it says counts."""
    asked = []
    monkeypatch.setattr(secrets.hmac, "compare_digest", lambda a, b: asked.append((a, b)) or True)
    assert secrets.agrees("kept", PEPPER, "hk_anything")
    assert asked == [("kept", secrets.digest(PEPPER, "hk_anything"))]
