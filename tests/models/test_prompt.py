"""Prompts are read as people write them: weights, escapes, changes over the steps, compositions, adapters."""

import random
import time
from contextlib import suppress

import pytest

from models.errors import InvalidRequest
from models.prompt import PARTS, extract_loras, parse, timelines

UP, DOWN = 1.1, round(1 / 1.1, 6)

WEIGHTS = {
    "a cat": [("a cat", 1)],
    "": [],
    "(a)": [("a", UP)],
    "((a))": [("a", 1.21)],
    "(((a)))": [("a", 1.331)],
    "(a:1.3)": [("a", 1.3)],
    "(a: 1.3 )": [("a", 1.3)],
    "(a:.5)": [("a", 0.5)],
    "(a:2.)": [("a", 2)],
    "(a:0)": [("a", 0)],
    "[a]": [("a", DOWN)],
    "[[a]]": [("a", round(1 / 1.21, 6))],
    "([a])": [("a", 1)],
    "((a:1.3))": [("a", 1.43)],
    "a (b) c": [("a ", 1), ("b", UP), (" c", 1)],
    "(a)(b)": [("ab", UP)],
    "(a (b:2) c:0.5)": [("a ", 0.5), ("b", 1), (" c", 0.5)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1),
        ("house", 1.573),
        (" ", UP),
        ("on", 1),
        (" a ", UP),
        ("hill", 0.55),
        (", sun, ", UP),
        ("sky", 1.4641),
        (".", UP),
    ],
    "(open to the end": [("open to the end", UP)],
    "[open": [("open", DOWN)],
    "closed) nothing]": [("closed) nothing]", 1)],
    "(crossed] over) it": [("crossed] over", UP), (" it", 1)],
    r"\(a\) \[b\] \\ \: \|": [(r"(a) [b] \ : |", 1)],
    r"(a\:1.3)": [("a:1.3", UP)],
    r"(a \(b\):1.2)": [("a (b)", 1.2)],
    r"a\b \n": [(r"a\b \n", 1)],
    "(a:b)": [("a:b", UP)],
    "(a:1.3.1)": [("a:1.3.1", UP)],
    "(a:1e3)": [("a:1e3", UP)],
    "(12:30:1.5)": [("12:30", 1.5)],
    "[a:b]": [("a:b", DOWN)],
    "[a:b:c:0.5]": [("a:b:c:0.5", DOWN)],
    "a:1.3": [("a:1.3", 1)],
    "a | b": [("a | b", 1)],
    "(a|b)": [("a|b", UP)],
    "()": [],
    "(:1.3)": [],
    "hand and BREAKFAST BRAND": [("hand and BREAKFAST BRAND", 1)],
    "<zorp> <3": [("<zorp> <3", 1)],
}


def spans(prompt: str, step: int = 0, steps: int = 10, syntax: str = "weighted") -> list[tuple[str, float]]:
    """The spans of a prompt with one part and one section."""
    [part] = parse("prompt", prompt, syntax)
    [section] = part.at(step, steps)
    return [(span.text, pytest.approx(span.weight, abs=2e-6)) for span in section if span.text]


def text(prompt: str, step: int, steps: int = 10) -> str:
    return "".join(text for text, _ in spans(prompt, step, steps))


@pytest.mark.parametrize("prompt", WEIGHTS)
def test_weights(prompt):
    assert spans(prompt) == WEIGHTS[prompt]


@pytest.mark.parametrize("prompt", [prompt for prompt in WEIGHTS if prompt])
def test_plain_syntax_takes_every_character_for_itself(prompt):
    assert spans(prompt, syntax="plain") == [(prompt, 1)]


def test_break_starts_a_section_in_any_bracket():
    [part] = parse("prompt", "a BREAK b (c BREAK d)")
    sections = [[(span.text.strip(), span.weight) for span in section] for section in part.at(0, 1)]
    assert sections == [[("a", 1.0)], [("b", 1.0), ("c", 1.1)], [("d", 1.1)]]


@pytest.mark.parametrize(
    ("prompt", "by_step"),
    {
        "[a:b:0.5]": "aaaaabbbbb",
        "[a:b:.25]": "aabbbbbbbb",
        "[a:b:0.29]": "aabbbbbbbb",
        "[a:b:0.0]": "bbbbbbbbbb",
        "[a:b:1.0]": "aaaaaaaaaa",
        "[a:b:3]": "aaabbbbbbb",
        "[a:b:0]": "bbbbbbbbbb",
        "[a:b:40]": "aaaaaaaaaa",
        "[a: b :3]": "aaabbbbbbb",
        "[b:4]": "----bbbbbb",
        "[a::4]": "aaaa------",
        "[a|b]": "ababababab",
        "[a|b|c]": "abcabcabca",
        "[a|]": "a-a-a-a-a-",
        "[[a|b]:c:5]": "ababaccccc",
        "[a:[b:c:6]:3]": "aaabbbcccc",
        "[a|[b:c:6]]": "abababacac",
        "[(a):[b]:3]": "aaabbbbbbb",
        "[a|b:c]": ("a", "b:c") * 5,
    }.items(),
)
def test_changes_over_the_steps(prompt, by_step):
    assert [text(prompt, step).strip() or "-" for step in range(10)] == list(by_step)


def test_weights_reach_into_changes():
    assert spans("([a:(b):0.5]:2)", step=0) == [("a", 2)]
    assert spans("([a:(b):0.5]:2)", step=9) == [("b", 2.2)]


def test_a_timeline_names_the_forwards_at_which_the_text_changes():
    [part] = parse("prompt", "[a:b:2][c|d]")
    numbers = [0, 0, 1, 1, 2, 2, 3, 3]  # two forwards a step
    line = [(first, section[0].text) for first, (section,) in part.timeline(numbers, 4)]
    assert line == [(0, "ac"), (2, "ad"), (4, "bc"), (6, "bd")]
    [constant] = parse("prompt", "[a:b:90]")
    assert len(constant.timeline(range(50), 50)) == 1


@pytest.mark.parametrize(
    ("prompt", "parts"),
    {
        "cat AND dog": [("cat", 1), ("dog", 1)],
        "cat :1.2 AND dog": [("cat", 1.2), ("dog", 1)],
        "cat:0.5 AND dog :-0.5 AND a (tree:2)": [("cat", 0.5), ("dog", -0.5), ("a tree", 1)],
        "12:30 o'clock AND dog": [("12:30 o'clock", 1), ("dog", 1)],
        r"at 12\:30 AND dog": [("at 12:30", 1), ("dog", 1)],
        "cat :1.2": [("cat :1.2", 1)],
        "[a:b:0.5] :2 AND c": [("a", 2), ("c", 1)],
    }.items(),
)
def test_and_composes(prompt, parts):
    read = [("".join(s.text for s in part.at(0, 10)[0]).strip(), part.weight) for part in parse("prompt", prompt)]
    assert read == parts


@pytest.mark.parametrize(
    ("prompt", "why"),
    {
        "(a:11)": "between 0 and 10; 'a' gets 11",
        "(a:-1)": "gets -1",
        "((a:9):2)": "gets 18",
        "(" * 30 + "a": "gets 17.4",
        "(a:" + "9" * 400 + ")": "gets inf",
        "(" * 60 + "a": "nests brackets deeper than 50",
        "[a:b:1.5]": "changes at 1.5",
        "[a:b:-2]": "changes at -2",
        "(cat AND dog)": "outside of brackets",
        "(cat AND dog": "outside of brackets",
        "AND dog": "nothing on one side",
        "cat AND ": "nothing on one side",
        "cat AND :1.5": "nothing on one side",
        "cat :20 AND dog": "must be between -10 and 10, not 20",
        " AND ".join(["a"] * 9): "more than 8 parts",
        "a <lora:x:1>": "adapters stand in the prompt",
    }.items(),
)
def test_what_cannot_be_meant_is_refused(prompt, why):
    with pytest.raises(InvalidRequest, match=why) as refused:
        parse("prompt", prompt)[0].at(0, 10)
    assert refused.value.field == "prompt"


def test_a_negative_prompt_composes_nothing():
    with pytest.raises(InvalidRequest, match="write `and`") as refused:
        parse("negative_prompt", "a cat AND a dog")
    assert refused.value.field == "negative_prompt"
    assert len(parse("negative_prompt", "a cat AND a dog", "plain")) == 1
    assert len(parse("prompt", " AND ".join("a" * PARTS))) == PARTS


def test_too_many_different_texts_are_refused():
    [part] = parse("prompt", "[a|b|c|d|e][f|g|h|i|j|k|l]")
    assert len(part.timeline(range(32), 32)) == 32
    with pytest.raises(InvalidRequest, match="more than 32 different texts"):
        part.timeline(range(33), 33)


def test_the_bound_on_different_texts_is_one_for_all_parts_of_a_prompt():
    for parts, texts in ((8, 4), (7, 4), (2, 16)):
        prompt = " AND ".join(["[" + "|".join(map(str, range(texts))) + "]"] * parts)
        lines = timelines(parse("prompt", prompt), range(64), 64)
        assert [len({text for _, text in line}) for line in lines] == [texts] * parts
        with pytest.raises(InvalidRequest, match=r"more than 32 different texts.*counted together") as refused:
            timelines(parse("prompt", f"{prompt} [{'|'.join(map(str, range(40)))}]"), range(64), 64)
        assert refused.value.field == "prompt"
    five = " AND ".join(["[a|b|c|d|e]"] * 8)
    with pytest.raises(InvalidRequest, match="more than 32 different texts"):
        timelines(parse("prompt", five), range(5), 5)


def test_what_changes_in_one_part_counts_in_no_other():
    prompt = "[a|b|c|d|e] AND [f|g|h|i|j|k|l] AND still"  # 35 pairs, and 5 + 7 + 1 texts
    lines = timelines(parse("prompt", prompt), range(40), 40)
    assert [len({text for _, text in line}) for line in lines] == [5, 7, 1]


@pytest.mark.parametrize(
    ("prompt", "rest", "loras"),
    [
        ("a cat", "a cat", ()),
        ("a <lora:ink:0.8> cat", "a  cat", (("ink", 0.8),)),
        ("<lora:ink>a<LoRA:b.c-d_2:-1>", "a", (("ink", 1.0), ("b.c-d_2", -1.0))),
        ("<lora: ink : .5 >", "", (("ink", 0.5),)),
        ("<zorp> <3 <b>", "<zorp> <3 <b>", ()),
    ],
)
def test_loras_are_taken_out(prompt, rest, loras):
    assert extract_loras(prompt) == (rest, loras)


@pytest.mark.parametrize(
    "prompt",
    ["<lora:>", "<lora::1>", "<lora:a:>", "<lora:a:x>", "<lora:a:1:2>", "<lora:a", "<lora:a <lora:b>", "<lora:"],
)
def test_a_broken_lora_tag_is_refused(prompt):
    with pytest.raises(InvalidRequest, match="<lora:name") as refused:
        extract_loras(f"a cat {prompt}")
    assert refused.value.field == "prompt"


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "(",
            "[",
            "()",
            "(a)",
            "[a|b]",
            "[a:b:3]",
            "(a:1.1)",
            "]",
            "([",
            ")",
            "\\",
            ":",
            "|",
            "[|",
            "[:",
            "a",
            "BREAK ",
        ),
        *("<lora:", "<lora:a>", "<", "(a:", "[a:0.5", "!", "9", "9.", ":9", "[[a|b]|c]"),
    ],
)
def test_hostile_prompts_take_no_time(piece):
    prompt = (piece * 10_000)[:9_990] + "[x|y|z]"
    started = time.perf_counter()
    try:
        rest, _ = extract_loras(prompt)
        for part in parse("prompt", rest):
            part.timeline(range(150), 150)
    except InvalidRequest:
        pass
    assert time.perf_counter() - started < 2.0


def test_any_string_is_read_or_refused():
    rng = random.Random(7)
    pieces = [*"()[]:|\\<> a.19", "AND", "BREAK", "0.5", "<lora:", " AND ", "(a:1.2)", "[a|b]", "[a:b:2]"]
    lines = []
    for _ in range(3000):
        prompt = "".join(rng.choices(pieces, k=rng.randint(0, 20)))
        with suppress(InvalidRequest):
            rest, _ = extract_loras(prompt)
            lines += [part.timeline(range(8), 8) for part in parse("prompt", rest)]
    texts = [section for line in lines for _, text in line for section in text]
    assert len(texts) > 1000
    assert all(0 <= span.weight <= 10 for section in texts for span in section if span.text.strip())
