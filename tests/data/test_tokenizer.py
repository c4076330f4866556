"""Bytes, and tokenizer.json files made by the tokenizers library."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dsv3_jax.data import ByteTokenizer, load_tokenizer, tokenize

TEXT = "def main():\n    return 'grüße'  # ünïcode ✓ 汉字\n"


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, 258)))
def test_bytes_decode_never_fails(ids):
    assert ByteTokenizer().decode(ids) == bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def test_bytes_lone_surrogate():
    assert ByteTokenizer().decode(ByteTokenizer().encode("a\ud800b")) == "a?b"


def test_bytes_ids_fit_the_tiny_preset():
    from dsv3_jax import ModelConfig

    tiny = ModelConfig.preset("tiny")
    tokenizer = ByteTokenizer()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (tiny.bos_token_id, tiny.eos_token_id)
    assert max(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) < tokenizer.vocab_size <= tiny.vocab_size


def make_tokenizer(path, specials=("<s>", "</s>"), size=400):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    if len(specials) == 2:  # as many released files do, put a bos before every text
        bos = specials[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


def test_tokenizer_json_round_trip(tmp_path):
    theirs = make_tokenizer(tmp_path)
    theirs.no_truncation()
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        tokenizer = load_tokenizer(path)
        ids = tokenizer.encode(TEXT)
        assert ids.dtype == np.int32
        assert ids.tolist() == theirs.encode(TEXT, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == TEXT
        assert [b.tolist() for b in tokenizer.encode_batch([TEXT, "", "</s>"])] == [
            tokenizer.encode(text).tolist() for text in (TEXT, "", "</s>")
        ]
        assert tokenizer.vocab_size == theirs.get_vocab_size()
        assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.token_to_id("<s>"), theirs.token_to_id("</s>"))
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == TEXT


def test_text_cannot_forge_specials(tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("a</s>b<s>")
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())
    assert tokenizer.decode(ids) == "a</s>b<s>"


def test_vocab_size_counts_gaps(tmp_path):
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    moved = next(iter(sorted(content["model"]["vocab"], key=content["model"]["vocab"].get, reverse=True)))
    content["model"]["vocab"][moved] = 1000
    path.write_text(json.dumps(content))
    assert load_tokenizer(path).vocab_size == 1001


def test_eos_alone_separates_documents(tmp_path):
    make_tokenizer(tmp_path, ["<|endoftext|>"])
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == tokenizer.eos_id
    assert (tokenize(["ab", "ab"], tokenizer).tokens == tokenizer.eos_id).sum() == 2


def test_declared_specials_come_first(tmp_path):
    made = make_tokenizer(tmp_path, ["<s>", "</s>", "<start>", "<end>"])
    declared = {"bos_token": {"content": "<start>", "__type": "AddedToken"}, "eos_token": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (made.token_to_id("<start>"), made.token_to_id("<end>"))


def test_added_tokens_count(tmp_path):
    made = make_tokenizer(tmp_path)
    made.add_special_tokens([AddedToken("<|User|>", special=True)])
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == made.token_to_id("<|User|>") + 1


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"is not a Hugging Face tokenizer\.json"):
        load_tokenizer(path)
    make_tokenizer(tmp_path, ["[weird]"])
    with pytest.raises(ValueError, match="no known end-of-document token"):
        load_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<absent>"}')
    with pytest.raises(ValueError, match=r"eos_token '<absent>' of tokenizer_config.json is not in"):
        load_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"is not a tokenizer_config\.json"):
        load_tokenizer(path)
