"""Prompts through ComfyUI 0.3.75's own text classes and through ours: equal.

Tiny random CLIP models with the real vocabulary, in both layouts of encoders, with the same weights
on both sides. Token ids, weights and chunk borders are compared for equality, embeddings to 1e-5.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import comfy_text
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fullpipe.text import PromptEncoder
from fullpipe.text.prompt import split_prompt

pytestmark = pytest.mark.comfyui

TOKENIZER = Path(__file__).parents[2] / "demo" / "checkpoint" / "tokenizer"
WIDTH = {"clip_l": 48, "clip_g": 64, "clip_h": 64}
LAYERS = {"clip_l": 3, "clip_g": 4, "clip_h": 24}
KINDS = ("sd1", "sd2", "sdxl")

WRITTEN_PROMPTS = [
    "",
    " ",
    "\n\t ",
    "a red circle",
    "A Photo Of A CAT, Best Quality; 8k!!",
    "(masterpiece:1.2), best quality, (a cat:0.8) on a ((red)) mat",
    "((a:1.5) b)",
    "(((a)))",
    "((((((((deep))))))))",
    "(a (b (c:0.5) d:1.3) e:0.7)",
    "(a:0)",
    "(a:0.0) (b:-1)",
    "(a:-0.5) b",
    "(a:1.0) b",
    "(a:1e0)",
    "(a: 1.2 )",
    "(a:1_0)",
    "(a:١.٢)",
    "(a:+1.1)",
    "(a:.5)(b:5.)",
    "(:1.2)",
    "(:)",
    "()",
    "(())",
    "(a:)",
    "(a:b:1.2)",
    "(a:1.2:1.4)",
    "(a:1,2)",
    "(a:1.2 b)",
    "(time 12:30)",
    "12:30 (noon)",
    "(",
    ")",
    "((",
    "))",
    ")(",
    "(a",
    "a)",
    "((a)",
    "(a))",
    "(((a))",
    "(a (b) (c)",
    "(a (b) (c:1.3)",
    "((b) a",
    ")a(b)(c)",
    "a)(b)(c:1.2)",
    "(a:1.3))(b:1.2)",
    "\\(escaped\\)",
    "(a \\(b\\):1.3)",
    "(a \\(b:1.3)",
    "\\\\(a)",
    "\\((a)\\)",
    "a \\ b",
    "\0\1 \0\2",
    "BREAK",
    "a BREAK b",
    "a AND b",
    "[a:b:0.5] [a|b] {a|b} <lora:x:1>",
    "don't can't we're I'm they'll you'd he's I've",
    "DON'T CAN'T",
    "don’t",
    "1234567890 3.14159 1,000,000",
    "a1b2c3",
    "...---...!!!???",
    "_under_score_ hy-phen",
    "C++ & C#",
    "<html> &amp; &lt;b&gt; &#39; &nbsp;",
    "https://example.org/a?b=c&d=e",
    "email@example.org #tag @name",
    "<|startoftext|>",
    "<|endoftext|>",
    "a <|endoftext|> b (c:1.4)",
    "<|ENDOFTEXT|> <|StartOfText|>x",
    "<|endoftext",
    "naïve café Ångström",
    "nai\u0308ve cafe\u0301",
    "ÀÉÎÕÜ ß ẞ ﬁ ﬀ",
    "İstanbul ıI",
    "ΣΊΣΥΦΟΣ ΟΔΟΣ",
    "Привет, мир",
    "日本語のテキスト",
    "中文 提示词,测试",
    "한국어 프롬프트",
    "العربية עברית",
    "हिन्दी ไทย",
    "😀 😀😀 👩‍👩‍👧 🇩🇪 ✨",
    "a\u200bb\u00a0c\u2003d\u3000e\ufefff",
    "a\x00b\x07c\x1b[31md\x7f",
    "a\r\nb\tc\x0bd\x0ce\x85f\u2028g",
    "\ufffd \ue000 \U0010fffd",
    "①②③ ½ ⅷ 𝔉𝔯𝔞𝔨𝔱𝔲𝔯 ｆｕｌｌ",
    "z\u0338\u0321\u0327\u032b\u0349a\u0311\u0342l\u0300\u0301g",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "x" * 300,
    "pneumonoultramicroscopicsilicovolcanoconiosis " * 12,
    ", ".join(["word"] * 37),
    ", ".join(["word"] * 38),
    " ".join(["cat"] * 74),
    " ".join(["cat"] * 75),
    " ".join(["cat"] * 76),
    " ".join(["cat"] * 150),
    " ".join(["cat"] * 151),
    " ".join(["cat"] * 74) + " (a red dog:1.2) and more",
    " ".join(["cat"] * 70) + " (one two three four five six seven:1.2) after",
    " ".join(["cat"] * 70) + " (one two three four five six seven eight:1.2) after",
    " ".join(["cat"] * 68) + " (one two three four five six seven:1.2)(eight:0.8)",
    "(" + " ".join(["dog"] * 160) + ":1.3) tail",
    " ".join(f"(w{i}:{0.5 + i / 50})" for i in range(60)),
]

EMBEDDING_PROMPTS = [
    "embedding:plain",
    "embedding:plain.safetensors",
    "a embedding:plain b",
    "a embedding:plain, b",
    "a embedding:plain,, b",
    "a,embedding:plain b",
    "a\nembedding:plain\nb",
    "a\tembedding:plain b",
    "(embedding:plain:1.3) b",
    "(embedding:plain)",
    "(a embedding:plain b:0.7)",
    "embedding:plain embedding:plain",
    "embedding:PLAIN",
    "embedding:comma,",
    "embedding:missing",
    "embedding:missing, a cat",
    "a embedding:missing b (embedding:missing:1.2)",
    "embedding:,missing, x",
    "embedding:,,,",
    "a embedding:both_lengths b",
    "embedding:both (dog:1.2)",
    "(embedding:both:0.5) dog",
    "embedding:a1111 x",
    "embedding:a1111.pt x",
    "embedding:listed x",
    "embedding:one_dimensional x",
    "embedding:bundled x",
    "embedding:bundled_xl x",
    "embedding:broken x",
    "embedding:wide x (y:1.3)",
    "(embedding:wide:1.3) x",
    "a embedding:wide b embedding:plain c (d:1.2)",
    "a embedding:mixed (c:1.4) d",
    "embedding:inside x",
    "embedding:long x",
    " ".join(["cat"] * 70) + " (embedding:long:1.2) x",
    " ".join(["cat"] * 73) + " embedding:plain x",
    " ".join(["cat"] * 73) + " embedding:wide x (y:1.5)",
    "a <|endoftext|> embedding:plain b",
    "embedding:plain" + " and so on" * 40,
    "embedding:\u00a0plain x",
    "embedding:pickled x (y:1.1)",
    "\\(embedding:plain\\)",
    "embedding:preferred x",
]


RANDOM_WORDS = (
    "cat dog red a the photo portrait 1girl 8k masterpiece, (best) quality :1.2 :0.8 :1.1) "
    "( ) (( )) \\( \\) : , . - ' \n embedding:plain embedding:both, embedding:nope "
    "café 日本 😀 don't x_y (a:1.3) ((b)) (c:0.5 [d] <e> 3.5 longerword hyper-realistic"
)


def _random_prompts(count: int, seed: int) -> list[str]:
    """Prompts of words, brackets, weights, escapes and odd characters, well-formed or not."""
    generator = random.Random(seed)
    words = RANDOM_WORDS.split(" ")
    prompts = []
    for _ in range(count):
        length = generator.choice([3, 6, 12, 30, 90])
        glue = generator.choice([" ", " ", " ", ""])
        prompts.append(glue.join(generator.choice(words) for _ in range(length)))
    return prompts


def _random_syntax(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    alphabet = "(((())))ab:1.5 \\-e"
    return [
        "".join(generator.choice(alphabet) for _ in range(generator.randint(0, 24)))
        for _ in range(count)
    ]


PROMPTS = WRITTEN_PROMPTS + EMBEDDING_PROMPTS + _random_prompts(200, seed=1)
SYNTAX = WRITTEN_PROMPTS + _random_syntax(4000, seed=2)
CLIP_SKIPS = [-1, -2, -3, -4, -5, -24]
CLIP_SKIP_PROMPTS = ["a red circle", "(a (b (c:0.5) d:1.3) e:0.7)", "embedding:both (dog:1.2)"]


def _save_clip(folder: Path, key: str, *, act: str, projection: bool, seed: int) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=WIDTH[key],
        intermediate_size=2 * WIDTH[key],
        projection_dim=WIDTH[key],
        num_hidden_layers=LAYERS[key],
        num_attention_heads=4,
        hidden_act=act,
        eos_token_id=49407,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight")
        parameter.data = 1 + 0.1 * noise if is_norm else 0.15 * noise
    model.save_pretrained(folder)


def _save_embeddings(folder: Path) -> None:
    generator = torch.Generator().manual_seed(5)

    def vectors(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=generator)

    small, large = WIDTH["clip_l"], WIDTH["clip_g"]
    (folder / "sub" / "deeper").mkdir(parents=True)
    save_file({"emb_params": vectors(3, small)}, folder / "plain.safetensors")
    save_file({"emb_params": vectors(2, small)}, folder / "comma,.safetensors")
    both = {"clip_g": vectors(2, large), "clip_l": vectors(2, small)}
    save_file(both, folder / "both.safetensors")
    uneven = {"clip_g": vectors(80, large), "clip_l": vectors(2, small)}
    save_file(uneven, folder / "both_lengths.safetensors")
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(4, small)}}
    torch.save({**a1111, "name": "x", "step": 9}, folder / "a1111.pt")
    torch.save(
        [{"a": vectors(2, small), "b": vectors(1, large)}, {"c": vectors(1, small)[0]}],
        folder / "listed.bin",
    )
    save_file({"vector": vectors(1, small)[0]}, folder / "one_dimensional.safetensors")
    bundle = {"bundle_emb.x.string_to_param.*": vectors(2, small), "lora.up": vectors(4, 4)}
    save_file(bundle, folder / "bundled.safetensors")
    bundle = {"bundle_emb.x.clip_l": vectors(2, small), "bundle_emb.x.clip_g": vectors(2, large)}
    save_file(bundle, folder / "bundled_xl.safetensors")
    (folder / "broken.safetensors").write_bytes(b"not safetensors at all")
    save_file({"emb_params": vectors(3, 96)}, folder / "wide.safetensors")
    mixed = {"clip_g": vectors(2, 96), "clip_l": vectors(2, small)}
    save_file(mixed, folder / "mixed.safetensors")
    save_file({"x": vectors(2, small)}, folder / "sub" / "deeper" / "inside.safetensors")
    save_file({"x": vectors(30, small)}, folder / "long.safetensors")
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors(2, 768))})
    torch.save({"string_to_param": parameters}, folder / "pickled.pt")
    torch.save({"x": vectors(1, small)}, folder / "preferred.pt")
    save_file({"x": vectors(2, small)}, folder / "preferred.safetensors")


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Our encoders by kind, and ComfyUI's results."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("text")
    embeddings_folder = root / "embeddings"
    embeddings_folder.mkdir()
    _save_embeddings(embeddings_folder)
    for kind in KINDS:
        shutil.copytree(TOKENIZER, root / kind / "tokenizer")
    _save_clip(root / "sd1/text_encoder", "clip_l", act="quick_gelu", projection=False, seed=1)
    _save_clip(root / "sd2/text_encoder", "clip_h", act="gelu", projection=False, seed=4)
    _save_clip(root / "sdxl/text_encoder", "clip_l", act="quick_gelu", projection=False, seed=2)
    _save_clip(root / "sdxl/text_encoder_2", "clip_g", act="gelu", projection=True, seed=3)
    skips = [(PROMPTS.index(p), skip) for p in CLIP_SKIP_PROMPTS for skip in CLIP_SKIPS]
    plain = [(index, None) for index in range(len(PROMPTS))]
    job = {
        "checkpoints": {kind: str(root / kind) for kind in KINDS},
        "embeddings_folder": str(embeddings_folder),
        "prompts": PROMPTS,
        "encodings": plain + skips,
        "syntax": SYNTAX,
    }
    theirs = comfy_text.run_comfyui(job, root)
    ours = {
        kind: PromptEncoder.from_folder(root / kind, embeddings_folder=embeddings_folder)
        for kind in KINDS
    }
    return ours, theirs, job


def test_syntax_gives_the_same_weights(sides):
    _, theirs, _ = sides
    for text, expected in zip(SYNTAX, theirs["syntax"], strict=True):
        words = [
            (word, weight)
            for segment, weight in expected
            for word in segment.replace("\nembedding:", " embedding:").split(" embedding:")
            if word
        ]
        assert [(p.text, p.weight) for p in split_prompt(text)] == words, repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_weights_and_chunk_borders_are_equal(sides, kind):
    ours, theirs, _ = sides
    names = {"sd1": ["l"], "sd2": ["h"], "sdxl": ["l", "g"]}[kind]
    for prompt, expected in zip(PROMPTS, theirs["tokens"][kind], strict=True):
        for name, chunks in zip(names, ours[kind].chunks(prompt), strict=True):
            got = [
                [
                    [comfy_text.token_name(token), weight]
                    for token, weight in zip(chunk.tokens, chunk.weights, strict=True)
                ]
                for chunk in chunks
            ]
            assert got == expected[name], repr(prompt)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_equal(sides, kind):
    ours, theirs, job = sides
    worst = 0.0
    for index, skip in job["encodings"]:
        got = ours[kind].encode(PROMPTS[index], clip_skip=skip)
        for name, key in (("prompt_embeds", ""), ("pooled_prompt_embeds", ".pooled")):
            if kind == "sd2" and key:
                continue  # SD2's UNet takes none
            expected = theirs["arrays"][f"{kind}.{index}.{skip}{key}"]
            assert got[name].shape == expected.shape, (PROMPTS[index], skip, name)
            difference = float(np.abs(got[name].numpy() - expected).max())
            # A weight multiplies the rounding of what it weighs, as it does the value itself.
            difference /= max(1.0, _largest_weight(ours[kind], PROMPTS[index]))
            assert difference < 1e-5, (PROMPTS[index], skip, name, difference)
            worst = max(worst, difference)
    print(f"{kind}: max abs difference {worst:.2e} over {len(job['encodings'])} encodings")


def _largest_weight(encoder: PromptEncoder, prompt: str) -> float:
    return max(abs(weight) for chunk in encoder.chunks(prompt)[0] for weight in chunk.weights)
