"""Bytes, files made by the tokenizers library, and what transformers makes of the forms that released files have."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dsv3_jax.config import ConfigError
from dsv3_jax.data import ByteTokenizer, load_tokenizer
from dsv3_jax.data.tokenize import Tokenize

GOLDEN = Path(__file__).parents[1] / "golden/tokenizers"

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
    assert ByteTokenizer().decode(ByteTokenizer().encode("a\ud800b")) == "a\ufffdb"


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
    assert (Tokenize(str(tmp_path)).whole(["ab", "ab"], [False] * 2).tokens == tokenizer.eos_id).sum() == 2


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


@pytest.mark.parametrize("name", ["deepseek", "glm", "kimi", "sentencepiece"])
def test_ids_and_text_are_those_of_transformers(name):
    tokenizer = load_tokenizer(GOLDEN / name)
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    assert tokenizer.eos_id == expected["eos_id"]
    assert tokenizer.bos_id == (expected["eos_id"] if expected["bos_id"] is None else expected["bos_id"])
    for case in expected["cases"]:
        ids = tokenizer.encode_prompt(case["text"]).tolist()
        assert ids == (case["ids"] or [tokenizer.bos_id]), case["text"]  # a model can't continue nothing
        assert tokenizer.encode(case["text"]).tolist() == case["plain"], case["text"]
        assert tokenizer.decode(case["plain"]) == case["decoded"]
    assert isinstance(tokenizer.decode([0, tokenizer.eos_id, tokenizer.vocab_size, 2**31 - 1]), str)


@pytest.mark.parametrize("name", ["deepseek", "glm", "kimi", "sentencepiece"])
def test_what_is_saved_is_the_same_tokenizer_with_bos_before_prompts(name, tmp_path):
    tokenizer = load_tokenizer(GOLDEN / name)
    tokenizer.save(tmp_path)
    saved = load_tokenizer(tmp_path)
    assert (saved.bos_id, saved.eos_id, saved.vocab_size) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size)
    for case in json.loads((GOLDEN / name / "expected.json").read_text())["cases"]:
        assert saved.encode(case["text"]).tolist() == case["plain"]
        plain = tokenizer.encode("x" + case["text"]).tolist()
        assert saved.encode_prompt("x")[0] == saved.bos_id
        assert saved.decode(plain) == tokenizer.decode(plain)
    if name != "kimi":  # the library alone, as transformers loads it, says so too
        theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert theirs.encode("x").ids == saved.encode_prompt("x").tolist()


@given(st.text(st.characters()))
def test_saved_bytes_are_bytes(saved_bytes, text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert saved_bytes.encode(text).tolist() == ids.tolist()
    assert saved_bytes.encode_prompt(text).tolist() == tokenizer.encode_prompt(text).tolist()
    assert saved_bytes.decode(ids) == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def saved_bytes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bytes")
    ByteTokenizer().save(directory)
    return load_tokenizer(directory)


@pytest.mark.parametrize("add", [True, False, None])
@pytest.mark.parametrize("template", [True, False])
def test_add_bos_token_decides_before_the_template(add, template, tmp_path):
    """Released DeepSeek files say `add_bos_token` and have no template; transformers 4 makes one of it."""
    made = make_tokenizer(tmp_path)
    if not template:
        made.post_processor = None
        made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": add}))
    tokenizer = load_tokenizer(tmp_path)
    begins = template if add is None else add
    body = tokenizer.encode("main").tolist()
    assert tokenizer.encode_prompt("main").tolist() == [tokenizer.bos_id] * begins + body
    assert tokenizer.encode_prompt("<s>main").tolist() == [tokenizer.bos_id, *body]  # never twice


def test_lone_surrogates_are_replaced(tmp_path):
    make_tokenizer(tmp_path)
    for tokenizer in (ByteTokenizer(), load_tokenizer(tmp_path), load_tokenizer(GOLDEN / "kimi")):
        for text, kept in (
            ("a\ud83d \udce9b", "a\ufffd \ufffdb"),
            ("\ud83d\ude00", "\N{GRINNING FACE}"),
        ):  # a pair is one
            for ids in (tokenizer.encode(text), tokenizer.encode_prompt(text), tokenizer.encode_batch(["a", text])[1]):
                assert tokenizer.decode(ids) == kept


def test_long_runs_are_cut_as_the_released_code_cuts_them(monkeypatch):
    from dsv3_jax.data import tiktoken_tokenizer

    monkeypatch.setattr(tiktoken_tokenizer, "_CHUNK", 40)
    monkeypatch.setattr(tiktoken_tokenizer, "_RUN", 5)
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(list("ab \n"), rng.integers(0, 120), p=[0.5, 0.2, 0.2, 0.1]))
        expected = []
        for start in range(0, len(text), 40):
            run = 0
            for i, char in enumerate(chunk := text[start : start + 40]):
                same = i > 0 and chunk[i - 1].isspace() == char.isspace()
                run = run + 1 if same else 1
                if i == 0 or run > 5:
                    run = 1
                    expected.append("")
                expected[-1] += char
        assert list(tiktoken_tokenizer._pieces(text)) == expected


@pytest.fixture
def kimi(tmp_path):
    shutil.copytree(GOLDEN / "kimi", tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_tiktoken_files_of_other_models_are_refused(kimi):
    config = json.loads((kimi / "tokenizer_config.json").read_text())
    for other in (None, {}, {"AutoTokenizer": ["tokenization_other.TikTokenTokenizer", None]}, [1]):
        (kimi / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": other}))
        with pytest.raises(ConfigError, match=r"auto_map\.AutoTokenizer in .*tokenizer_config\.json is (missing|tok)"):
            load_tokenizer(kimi)
    (kimi / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "[END]"}))
    with pytest.raises(ConfigError, match=r"eos_token '\[END\]' is none of"):
        load_tokenizer(kimi)


def test_a_tiktoken_file_that_has_changed_is_read_anew(kimi):
    """tiktoken's reader would return the copy that it made at first."""
    before = load_tokenizer(kimi)
    lines = (kimi / "tiktoken.model").read_text().splitlines()
    (kimi / "tiktoken.model").write_text("".join(line + "\n" for line in lines[:-1]))  # without the last token
    assert load_tokenizer(kimi).token_bytes()[: len(lines) - 1] == before.token_bytes()[: len(lines) - 1]
    assert load_tokenizer(kimi).vocab_size == before.vocab_size - 1


def test_names_of_tiktoken_tokens_that_are_too_long_are_refused(kimi):
    config = json.loads((kimi / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["422"]["content"] = "x" * 10**6
    (kimi / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"tiktoken\.model can't be used: .*regex"):
        load_tokenizer(kimi)


@pytest.mark.parametrize("content", ["", "x", "YQ== 0 1\n", "YQ== 0\n", "YQ== a\n", "\x00"])
def test_damaged_tiktoken_files_are_named(kimi, content):
    (kimi / "tiktoken.model").write_text(content)
    with pytest.raises(ConfigError, match=r"tiktoken\.model is not a tiktoken\.model"):
        load_tokenizer(kimi)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[" * 100000, "nested too deeply"),
        ("1" * 10000, "isn't valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"eos_token": 5}', "eos_token is 5: it must be a string"),
        ('{"bos_token": ["<s>"]}', r"bos_token is \['<s>'\]"),
        ('{"bos_token": {"text": "<s>"}}', "bos_token.content"),
        ('{"bos_token": {"content": 1}}', "bos_token.content is 1"),
        ('{"add_bos_token": "false"}', "add_bos_token is 'false': it must be true or false"),
        ('{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
    ],
)
@pytest.mark.parametrize("kind", ["tokenizer.json", "kimi"])
def test_impossible_tokenizer_configs_name_file_and_field(kind, content, named, tmp_path):
    if kind == "kimi":
        shutil.copytree(GOLDEN / "kimi", tmp_path, dirs_exist_ok=True)
    else:
        make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"tokenizer_config.json.*{named}") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (("model", "vocab"), {}),
        (("model", "vocab", "a"), 2**31),
        (("model", "vocab", "a"), -1),
        (("model", "merges"), [["a", "no such"]]),
        (("model", "continuing_subword_prefix"), "xxxxxxxxxx"),  # makes the library panic
        (("post_processor", "special_tokens"), {}),  # as this does, when a text is encoded
        (("added_tokens",), [[]]),
        (("version",), [[[[]]]]),
    ],
)
def test_damaged_tokenizer_json_is_named(part, value, tmp_path):
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    inner = content = json.loads(path.read_text())
    for key in part[:-1]:
        inner = inner[key]
    inner[part[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(path)


def test_a_name_with_a_line_break_is_named_in_one_line(tmp_path):
    shutil.copytree(GOLDEN / "sentencepiece", tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    del content["model"]["vocab"]["]\n"]  # which a merge needs
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"Token `.*\\n.*` out of vocabulary") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["deepseek", "glm", "sentencepiece"])
def test_a_prefix_that_merges_lack_is_refused(name, tmp_path):
    """With deepseek's file the library would end the process: it cuts a character of several bytes."""
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "x"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="doesn't go on with continuing_subword_prefix, 'x'"):
        load_tokenizer(tmp_path)


def test_merges_with_a_prefix_are_read(tmp_path):
    model = {"type": "BPE", "vocab": {"a": 0, "##b": 1, "ab": 2, "</s>": 3}, "continuing_subword_prefix": "##"}
    for merges in (["a ##b"], [["a", "##b"]]):
        content = {"version": "1.0", "model": {**model, "merges": merges}, "added_tokens": []}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        assert load_tokenizer(tmp_path).encode("ab").tolist() == [2]


def test_a_decoder_or_a_model_that_fails_later_is_named(tmp_path):
    """The library raises plain Exceptions here, and panics, which `except Exception` doesn't catch."""
    shutil.copytree(GOLDEN / "sentencepiece", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["decoder"]["decoders"][-1]["stop"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"tokenizer\.json can't decode ids: index out of bounds"):
        load_tokenizer(tmp_path).decode([])
    model = {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "no such"}
    path.write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    (tmp_path / "tokenizer_config.json").unlink()
    for encode in (load_tokenizer(tmp_path).encode, load_tokenizer(tmp_path).encode_prompt):
        with pytest.raises(ConfigError, match=r"tokenizer\.json can't encode a text: .*UNK"):
            encode("b")
    found = Tokenize(str(path)).whole(["a", "b", "a"], [False] * 3)  # only the documents at fault are left out
    assert found.records.tolist() == [0, 2]
    assert [i for i, _ in found.errors] == [1]


def test_null_means_that_nothing_is_said(tmp_path):
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null, "bos_token": "", "add_bos_token": null}')
    assert load_tokenizer(tmp_path).eos_id == 1


def test_special_tokens_map_of_older_files(tmp_path):
    made = make_tokenizer(tmp_path, ["<s>", "</s>", "<start>", "<end>"])
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<start>", "eos_token": {"content": "<end>"}}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (made.token_to_id("<start>"), made.token_to_id("<end>"))


def test_a_folder_without_a_tokenizer_names_what_it_needs(tmp_path):
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)
    (tmp_path / "tokenizer.model").write_text("")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json, only tokenizer\.model \(SentencePiece\)"):
        load_tokenizer(tmp_path)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer in .*neither tokenizer\.json nor"):
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
    with pytest.raises(ValueError, match=r"tokenizer_config\.json isn't valid JSON"):
        load_tokenizer(path)
