"""Prompt syntax, token ids and chunks, checked by hand and against transformers."""

from __future__ import annotations

import pytest
import transformers
from transformers import CLIPTokenizer

from fullpipe.text.prompt import split_prompt, weighted_segments
from fullpipe.text.tokens import Chunk, ClipTokenizer, Group, make_chunks

# What each prompt weighs, worked out by hand from ComfyUI's rules.
SYNTAX = {
    "": [],
    "a cat": [("a cat", 1.0)],
    "(cat)": [("cat", 1.1)],
    "((cat))": [("cat", 1.1 * 1.1)],
    "(cat:1.3)": [("cat", 1.3)],
    "((cat:1.3))": [("cat", 1.3)],
    "((cat):1.3)": [("cat", 1.3 * 1.1)],
    "a (b) c": [("a ", 1.0), ("b", 1.1), (" c", 1.0)],
    "(a (b:0.5) c:2)": [("a ", 2.0), ("b", 0.5), (" c", 2.0)],
    "(cat: 1.3 )": [("cat", 1.3)],
    "(cat:-1)": [("cat", -1.0)],
    "(cat:)": [("cat:", 1.1)],
    "(cat:x)": [("cat:x", 1.1)],
    "(:1.3)": [(":1.3", 1.1)],
    "(a:b:1.3)": [("a:b", 1.3)],
    "((a:1.5) b)": [("a", 1.5), (" b", 1.1)],
    "12:30": [("12:30", 1.0)],
    "()": [],
    r"\(cat\)": [("(cat)", 1.0)],
    r"(cat\):1.2)": [("cat)", 1.2)],
    r"(cat \(big\))": [("cat (big)", 1.1)],
    # Brackets without a partner.
    "(cat": [("(cat", 1.0)],
    "cat)": [("cat)", 1.0)],
    "((cat)": [("(cat", 1.1)],
    "(cat))": [("cat", 1.1), (")", 1.0)],
    ")(cat)": [(")(cat)", 1.0)],
    ")(a)(b)": [(")(a)(b)", 1.0)],
    "(a))(b)(c)": [("a", 1.1), (")(b)(c)", 1.0)],
    "((b) cat": [("((b) cat", 1.0)],
    "(a (b:1.3)": [("a ", 1.3), ("(b", 1.3)],
    ")(": [(")(", 1.0)],
}


@pytest.mark.parametrize("prompt", SYNTAX)
def test_weights_of_the_syntax(prompt):
    assert [(piece.text, piece.weight) for piece in split_prompt(prompt)] == SYNTAX[prompt]


def test_embedding_references_are_found_where_comfyui_finds_them():
    pieces = split_prompt("embedding:a, b\nembedding:c (embedding:d:1.2) x,embedding:e")
    assert [(p.text, p.weight, p.is_embedding) for p in pieces] == [
        ("a, b", 1.0, True),
        ("c ", 1.0, True),
        ("d", 1.2, True),
        (" x,embedding:e", 1.0, False),
    ]


@pytest.mark.parametrize(
    ("hostile", "segments"),
    [
        ("(" * 300_000, 1),
        (")" * 300_000, 1),
        ("(" * 150_000 + "a" + ")" * 150_000, 1),
        ("(" * 150_000 + "a:1.2" + ")" * 149_999, 1),
        ("(:" * 75_000 + "a" + ":1)" * 75_000, 75_000),
        ("(a (b)" * 50_000, 3),
        (")(" * 150_000, 1),
        ("(a)" * 100_000, 100_000),
        ("(" * 1000 + ":" * 300_000 + ")" * 1000, 1),
    ],
    ids=lambda value: f"{value[:3]}...{value[-3:]}" if isinstance(value, str) else "",
)
def test_deep_and_hostile_brackets_are_read(hostile, segments):
    # A parser that recurses dies here, and one that copies the text at each level never ends.
    assert len(weighted_segments(hostile)) == segments


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="the CLIPTokenizer of transformers 4 differs in what is not Latin",
)
def test_tokenizer_gives_the_ids_of_transformers(checkpoint):
    reference = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    ours = ClipTokenizer.from_folder(checkpoint / "tokenizer")
    texts = [
        "a photo of a cat, 8k!!",
        "DON'T can't we'll",
        "naïve café cafe\u0301 ß İ",
        "日本語 😀 👩‍👧 ½ ﬁ",
        "a\tb\r\nc\u3000d\x00e",
        "&lt;b&gt; <|endoftext|> x",
        "   ",
        "x" * 500,
    ]
    assert ours.ids(texts) == [reference(text)["input_ids"][1:-1] for text in texts]


def test_tokenizer_reads_a_folder_with_tokenizer_json_alone(checkpoint, tmp_path):
    CLIPTokenizer.from_pretrained(checkpoint / "tokenizer").save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    text = ["a photo of an astronaut"]
    whole = ClipTokenizer.from_folder(checkpoint / "tokenizer")
    assert ClipTokenizer.from_folder(tmp_path).ids(text) == whole.ids(text)


def chunked(*lengths, pad=0):
    """Text ids of each chunk, from groups of the given lengths with ids 100, 200, ..."""
    groups = [Group([100 * (i + 1)] * n, 1.0 + i) for i, n in enumerate(lengths)]
    return make_chunks(groups, length=77, start=1, end=2, pad=pad)


def test_an_empty_prompt_is_one_chunk_of_padding():
    assert chunked(pad=9) == [Chunk([1, 2, *[9] * 75], [1.0] * 77)]


def test_75_tokens_fill_a_chunk_and_the_76th_starts_another():
    assert [c.tokens for c in chunked(75)] == [[1, *[100] * 75, 2]]
    assert [c.tokens for c in chunked(76)] == [
        [1, *[100] * 75, 2],
        [1, 100, 2, *[0] * 74],
    ]


def test_seven_tokens_move_whole_and_eight_are_split():
    assert [c.tokens for c in chunked(70, 7)] == [
        [1, *[100] * 70, 2, *[0] * 5],
        [1, *[200] * 7, 2, *[0] * 68],
    ]
    first, second = chunked(70, 8)
    assert first.tokens == [1, *[100] * 70, *[200] * 5, 2]
    assert first.weights == [1.0] * 71 + [2.0] * 5 + [1.0]
    assert second.tokens == [1, *[200] * 3, 2, *[0] * 72]
    assert second.weights == [1.0, *[2.0] * 3, *[1.0] * 73]
