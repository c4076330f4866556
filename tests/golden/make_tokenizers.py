"""Writes tests/golden/tokenizers: small tokenizers with the ids that transformers gives them.

It needs transformers and tiktoken, the first of which the project itself never does:

    python -m pip install transformers tiktoken
    python tests/golden/make_tokenizers.py

Every folder holds a tokenizer's files as a released checkpoint has them, and `expected.json`: bos and eos, and of each
of the texts `ids` (as `AutoTokenizer(text)` gives them), `plain` (special tokens as text, none added) and `decoded`.
"""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

HERE = Path(__file__).parent / "tokenizers"

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock, isn't it?",
    "def main():\n    return 'grüße'  # ünïcode ✓\r\n\t\n\n  x = [1, 22, 333, 4444]\n",
    "深度求索 DeepSeek 的模型,全部开源。日本語とEnglishを混ぜる。한국어도",
    "HTTPServer parseURL iPhone ÀÉÎ ǅungla naïve café e\u0301\u0302 \u0645\u0631\u062d\u0628\u0627 नमस्ते",
    "emoji 👩‍👩‍👧 🤖, ½ Ⅷ ①, \u00a0\u2003spaces\u3000 and   runs    of them   ",
    "<s>a</s> <|user|>hello<|assistant|> [BOS]x[EOS] <|im_end|> <｜begin▁of▁sentence｜>y<｜end▁of▁sentence｜>",
    " leading and trailing ",
    "",
]

# The pattern of Moonlight's and Kimi's tokenizers, as their tokenization_moonshot.py and tokenization_kimi.py have it.
KIMI = "|".join(
    [
        r"""[\p{Han}]+""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)


def byte_level(specials: list[str], pattern: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return tokenizer


def put_before(tokenizer: Tokenizer, tokens: list[str]) -> None:
    ids = [(t, tokenizer.token_to_id(t)) for t in tokens]
    tokenizer.post_processor = processors.TemplateProcessing(single=[*tokens, "$A"], special_tokens=ids)


def deepseek(folder: Path) -> None:
    """bos is added, as tokenizer.json and tokenizer_config.json both say; its names are fields of AddedTokens."""
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    tokenizer = byte_level([bos, eos, "<|user|>"], r"\p{N}{1,3}|[一-龥぀-ゟ゠-ヿ]+|\s?\p{L}+|\s+|[^\s\p{L}\p{N}]+")
    put_before(tokenizer, [bos])
    save(
        folder,
        tokenizer,
        bos=added(bos),
        eos=added(eos),
        add_bos_token=True,
        add_eos_token=False,
        tokenizer_class="LlamaTokenizerFast",
    )


def glm(folder: Path) -> None:
    """There is no bos; two other tokens go before a text; eos is one of several that end one."""
    tokenizer = byte_level(["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"], r"\p{N}|\s?\p{L}+|\s+|.")
    put_before(tokenizer, ["[gMASK]", "<sop>"])
    save(folder, tokenizer, bos=None, eos="<|endoftext|>")


def sentencepiece(folder: Path) -> None:
    """Spaces are characters of words, bytes stand for what isn't known, and nothing is put before a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    train = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    tokenizer.pre_tokenizer, real = train, tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:2], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are no special tokens
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = real
    save(folder, tokenizer, bos="<s>", eos="</s>", add_bos_token=False)


def kimi(folder: Path) -> None:
    """A tiktoken.model: the ranks in order, and special tokens after them, some with names."""
    trained = json.loads(byte_level([], KIMI).to_str())["model"]
    byte_of = {c: b for b, c in enumerate(alphabet())}
    ranks = sorted(trained["vocab"], key=trained["vocab"].get)
    tokens = [bytes(byte_of[c] for c in token) for token in ranks]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_text("".join(lines))
    named = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 254: "[UNK]", 255: "[PAD]"}
    decoder = {len(tokens) + i: {"content": t, "special": True} for i, t in named.items()}
    config = {
        "added_tokens_decoder": decoder,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "tokenizer_class": "TikTokenTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    special = [named.get(i, f"<|reserved_token_{len(tokens) + i}|>") for i in range(256)]
    tokenizer = TikTokenConverter(
        str(folder / "tiktoken.model"), pattern=KIMI, extra_special_tokens=special
    ).converted()
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[BOS]", eos_token="[EOS]")
    describe(folder, theirs)


def alphabet() -> list[str]:
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


def added(token: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": True, "rstrip": False}


def save(folder: Path, tokenizer: Tokenizer, *, bos: Any, eos: Any, **fields: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"bos_token": bos, "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast", **fields}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    describe(folder, AutoTokenizer.from_pretrained(folder))


def describe(folder: Path, tokenizer: Any) -> None:
    cases = []
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        decoded = tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        cases.append({"text": text, "ids": ids, "plain": plain, "decoded": decoded})
    expected = {
        "transformers": transformers.__version__,
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
        "cases": cases,
    }
    (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False) + "\n")


def main() -> None:
    for make in (deepseek, glm, sentencepiece, kimi):
        folder = HERE / make.__name__
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)


if __name__ == "__main__":
    main()
