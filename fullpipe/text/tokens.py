"""From a prompt to chunks of CLIP tokens with a weight each, exactly as ComfyUI makes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from fullpipe.errors import SetupError

START, END = "<|startoftext|>", "<|endoftext|>"

# A stretch of fewer tokens than this is never split between two chunks (ComfyUI 0.3.75).
WHOLE_BELOW = 8

# CLIP's word pattern, from OpenAI's CLIP, clip/simple_tokenizer.py (MIT licence).
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
    r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)

# A token id, or the vector of a textual inversion: [C] fp32.
Token = int | torch.Tensor


@dataclass(frozen=True)
class Group:
    """Tokens under one weight that came from one stretch of text or one textual inversion."""

    tokens: Sequence[Token]
    weight: float


@dataclass(frozen=True)
class Chunk:
    """What CLIP encodes at a time: `length` tokens, start and end and padding included."""

    tokens: list[Token]
    weights: list[float]

    @property
    def is_weighted(self) -> bool:
        """Whether any weight differs from 1."""
        return any(weight != 1.0 for weight in self.weights)


class ClipTokenizer:
    """Byte-pair encoding with the vocabulary of a checkpoint's `tokenizer` folder.

    The steps are those of `CLIPTokenizer` in transformers 5, built here without transformers, which
    takes seconds to import. In transformers 4 ComfyUI's `CLIPTokenizer` is another one (the slow
    one), which differs in what is not Latin: it sets every Chinese character and kanji apart and
    drops control characters.

    Attributes:
        start: id of `<|startoftext|>`.
        end: id of `<|endoftext|>`.
        size: number of ids.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
        bpe = BPE(
            vocab=vocab,
            merges=merges,
            unk_token=END,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
        )
        self._tokenizer = Tokenizer(bpe)
        self._tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Replace(Regex(r"\s+"), " "),
                normalizers.Lowercase(),
            ]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        # A prompt can spell these two, the first one in any case.
        self._tokenizer.add_special_tokens(
            [
                AddedToken(START, normalized=True, special=True),
                AddedToken(END, normalized=False, special=True),
            ]
        )
        self.start, self.end = vocab[START], vocab[END]
        self.size = max(vocab.values()) + 1

    @classmethod
    def from_folder(cls, folder: Path) -> ClipTokenizer:
        """Read `vocab.json` and `merges.txt`, or the same two out of `tokenizer.json`.

        Raises:
            SetupError: a file is missing or not what it should be.
        """
        path = folder / "vocab.json"
        try:
            if path.is_file():
                vocab = json.loads(path.read_text(encoding="utf-8"))
                path = folder / "merges.txt"
                lines = path.read_text(encoding="utf-8").splitlines()
                merges = [tuple(line.split()) for line in lines if not line.startswith("#version")]
            else:
                path = folder / "tokenizer.json"
                model = json.loads(path.read_text(encoding="utf-8"))["model"]
                vocab = model["vocab"]
                merges = [
                    tuple(pair.split() if isinstance(pair, str) else pair)
                    for pair in model["merges"]
                ]
            return cls(vocab, [pair for pair in merges if len(pair) == 2])
        except FileNotFoundError:
            remedy = "copy the checkpoint's tokenizer folder (vocab.json and merges.txt) there"
            raise SetupError(f"{path} is missing: {remedy}") from None
        except Exception as error:  # the Rust side raises bare Exception for a bad vocabulary
            remedy = "copy the checkpoint's tokenizer folder again"
            raise SetupError(f"{path} is not a CLIP vocabulary ({error!r}): {remedy}") from error

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without start and end."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def make_chunks(
    groups: Sequence[Group], length: int, start: int, end: int, pad: int
) -> list[Chunk]:
    """Lay groups of tokens into chunks.

    A group that does not fit moves to the next chunk whole if it has fewer than 8 tokens, and
    is split at the border otherwise. Start, end and padding weigh 1.

    Args:
        groups: in the order of the prompt.
        length: tokens of a chunk, start and end included (77).
        start: id before the tokens of a chunk.
        end: id after them.
        pad: id of the rest (CLIP-L: the end id, CLIP-G: 0).
    Returns:
        at least one chunk.
    """
    room = length - 2
    bodies: list[tuple[list[Token], list[float]]] = [([], [])]
    for group in groups:
        is_divisible = len(group.tokens) >= WHOLE_BELOW
        done = 0
        while done < len(group.tokens):
            body, weights = bodies[-1]
            free, left = room - len(body), len(group.tokens) - done
            if left > free:
                bodies.append(([], []))
            taken = min(free, left) if is_divisible or left <= free else 0
            body.extend(group.tokens[done : done + taken])
            weights.extend([group.weight] * taken)
            done += taken
    return [
        Chunk(
            tokens=[start, *body, end, *[pad] * (room - len(body))],
            weights=[1.0, *weights, *[1.0] * (length - 1 - len(body))],
        )
        for body, weights in bodies
    ]
