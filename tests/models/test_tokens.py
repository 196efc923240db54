"""Chunks: exactly diffusers' ids where a prompt fits, no word cut in two, the same spans for every encoder."""

import pytest

from models.prompt import parse
from models.tokens import CHUNKS, Wording, cut
from tests.models.conftest import pipeline


def tokenizers(model: str) -> list:
    pipe = pipeline(model)
    return [pipe.tokenizer, pipe.tokenizer_2] if model == "sdxl" else [pipe.tokenizer]


def wording(prompt: str) -> Wording:
    [part] = parse("prompt", prompt)
    return Wording(part.at(0, 1))


def content(tokenizer, chunk) -> str:
    """What a chunk says, without its frame."""
    end = chunk.ids.index(tokenizer.eos_token_id)
    return tokenizer.decode(chunk.ids[1:end]).strip()


@pytest.mark.parametrize("model", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize(
    "prompt",
    ["", "a red circle", "  A  Red\n\tCIRCLE!!! ", "don't 1girl, (o_o) Ünïcode 中文 é", "<|endoftext|> a", "red " * 75],
    ids=["empty", "plain", "spaces", "unicode", "special", "full"],
)
def test_a_prompt_that_fits_has_exactly_the_tokenizers_own_ids(model, prompt):
    for k, tokenizer in enumerate(tokenizers(model)):
        expected = tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        [chunk] = cut(tokenizers(model), Wording.plain(prompt)).chunks[k]
        assert chunk.ids == expected
        assert set(chunk.weights) == {1.0}


def test_weights_stand_at_their_tokens():
    [tokenizer] = tokenizers("sd15")
    [[chunk]] = cut([tokenizer], wording("a (red:1.5) [circle] on (a (blue)) x")).chunks
    told = list(zip(tokenizer.convert_ids_to_tokens(chunk.ids), chunk.weights, strict=True))
    expected = [("a", 1), ("red", 1.5), ("circle", 1 / 1.1), ("on", 1), ("a", 1.1), ("blue", 1.21), ("x", 1)]
    assert told[1:8] == [(f"{word}</w>", pytest.approx(weight, abs=1e-6)) for word, weight in expected]
    assert {weight for _, weight in told[8:]} == {1.0}, "start, end and padding weigh 1"


def test_a_long_prompt_goes_on_in_further_chunks():
    cutting = cut(tokenizers("sd15"), Wording.plain("a red circle , " * 50))
    assert (cutting.report.tokens, cutting.report.chunks, cutting.report.truncated) == (200, 3, "")
    said = [content(tokenizers("sd15")[0], chunk).split() for chunk in cutting.chunks[0]]
    assert [len(words) for words in said] == [75, 75, 50]
    assert [word for words in said for word in words] == ["a", "red", "circle", ","] * 50


def test_a_word_goes_whole_into_the_next_chunk_and_only_a_longer_one_is_cut():
    [tokenizer] = tokenizers("sd15")
    word = "xylophone"  # not in the little vocabulary: several tokens
    pieces = len(tokenizer(word, add_special_tokens=False).input_ids)
    assert pieces > 4
    first, second = cut([tokenizer], Wording.plain("red " * 73 + word)).chunks[0]
    assert content(tokenizer, first) == "red " * 72 + "red"
    assert content(tokenizer, second) == word
    endless = cut([tokenizer], Wording.plain("red " + "xz" * 100))
    assert [len(content(tokenizer, chunk)) for chunk in endless.chunks[0]] == [3, 75, 75, 50]


def test_break_starts_a_chunk_and_empty_sections_are_none():
    [tokenizer] = tokenizers("sd15")
    chunks = cut([tokenizer], wording("BREAK a red circle BREAK BREAK (blue BREAK green) BREAK")).chunks[0]
    assert [content(tokenizer, chunk) for chunk in chunks] == ["a red circle", "blue", "green"]
    assert len(cut([tokenizer], wording("BREAK BREAK")).chunks[0]) == 1


def test_what_is_beyond_the_last_chunk_is_told_as_it_was_written():
    prompt = "red " * (75 * CHUNKS) + "Green Circle, (BLUE:1.2) star"
    cutting = cut(tokenizers("sd15"), wording(prompt))
    assert (cutting.report.tokens, cutting.report.chunks) == (75 * CHUNKS, CHUNKS)
    assert cutting.report.truncated == "Green Circle, BLUE star"


def test_all_encoders_get_the_same_spans():
    first, second = tokenizers("sdxl")
    second = type(second)(vocab=second.get_vocab(), merges=first._merges, model_max_length=77, pad_token="re")
    words = "a red circle , " * 30
    assert len(second("red").input_ids) > len(first("red").input_ids)
    cutting = cut([first, second], Wording.plain(words))
    ours, theirs = cutting.chunks
    assert len(ours) == len(theirs) == cutting.report.chunks
    for one, other in zip(ours, theirs, strict=True):
        said = [content(t, chunk).replace(" ", "") for t, chunk in ((first, one), (second, other))]
        assert said[0] == said[1]
        assert len(one.ids) == len(other.ids) == 77
