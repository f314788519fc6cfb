"""Texts become tokens, and scores of tokens those of words and characters."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from xviz_jax.models import TextProcessor, text

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "un", "##related", "good"]
WORDS += ["don", "'", "t", ",", "!", "a", "##b", "caf\u00e9"]


def build(folder, *, padding=False, **said):
    """Writes a small tokenizer of BERT's kind."""
    model = tokenizers.models.WordPiece(
        {word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"
    )
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    made.add_special_tokens(WORDS[:4])
    if padding:
        made.enable_padding(length=30)
        made.enable_truncation(4)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return text(folder)


@pytest.fixture
def encode(tmp_path):
    return build(tmp_path, mask_token={"content": "[MASK]"}, pad_token="[PAD]")


def test_ids_mask_and_offsets(encode):
    found = encode("unrelated, good", length=8)
    assert found.tokens == (
        *("[CLS]", "un", "##related", ",", "good", "[SEP]"),
        *("[PAD]", "[PAD]"),
    )
    assert found.ids.tolist() == [1, 5, 6, 11, 7, 2, 0, 0]
    assert found.ids.dtype == np.int32
    assert found.mask.tolist() == [True] * 6 + [False] * 2
    assert found.parts.tolist() == [-1, 0, 0, 0, 0, -1, -1, -1]
    assert found.offsets[1:5].tolist() == [[0, 2], [2, 9], [9, 10], [11, 15]]
    assert encode.mask_id == 3
    assert encode("a [MASK]").ids.tolist() == [1, 13, 3, 2]


def test_pieces_of_tokens_and_words(encode):
    found = encode("unrelated, don't!")
    scores = np.arange(len(found.ids), dtype=np.float32)
    tokens = found.pieces(scores)
    spelled = [piece.text for piece in tokens]
    assert spelled == ["[CLS]", "un", "related", ",", "don", "'", "t", "!", "[SEP]"]
    words = found.pieces(scores, granularity="word")
    assert [(word.text, word.score) for word in words] == [
        ("[CLS]", 0),
        ("unrelated", 1 + 2),
        (",", 3),
        ("don't", 4 + 5 + 6),
        ("!", 7),
        ("[SEP]", 8),
    ]
    assert (words[3].begin, words[3].end, words[3].part) == (11, 16, 0)
    (characters,) = found.characters(scores)
    np.testing.assert_allclose(characters[:2], 0.5)
    np.testing.assert_allclose(characters.sum(), scores.sum() - 8)


def test_pairs_keep_their_texts_apart(encode):
    found = encode("good", "a good")
    assert found.segments.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.parts.tolist() == [-1, 0, -1, 1, 1, -1]
    words = found.pieces(np.ones(6), granularity="word")
    assert [(word.text, word.part) for word in words] == [
        ("[CLS]", -1),
        ("good", 0),
        ("[SEP]", -1),
        ("a", 1),
        ("good", 1),
        ("[SEP]", -1),
    ]
    first, second = found.characters(np.ones(6))
    assert first.shape == (4,)
    assert second.shape == (6,)


LETTERS = "ab'\u2019 \n!\u00e9e\u0301\u0928\u092e\u0938\u094d\u0924\u65e5_3"


@settings(max_examples=60, deadline=None)
@given(st.text(LETTERS, min_size=1, max_size=12))
def test_sums_are_kept(words):
    # Bytes: any text has tokens, and several share a character.
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    symbols = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(symbols))}
    made.model = tokenizers.models.BPE(vocab=vocabulary, merges=[])
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = TextProcessor(made)(words)
    scores = np.random.default_rng(0).standard_normal(len(found.ids))
    for granularity in ("token", "word"):
        pieces = found.pieces(scores, granularity=granularity)
        assert np.isclose(sum(piece.score for piece in pieces), scores.sum())
    for piece in pieces:
        assert piece.text == words[piece.begin : piece.end]
    (characters,) = found.characters(scores)
    assert np.isclose(characters.sum(), scores.sum())


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("e\u0301t\u00e9 is", ["e\u0301t\u00e9", "is"]),
        (
            "\u0928\u092e\u0938\u094d\u0924\u0947!",
            ["\u0928\u092e\u0938\u094d\u0924\u0947", "!"],
        ),
        ("it\u2019s 'so'", ["it\u2019s", "'", "so", "'"]),
        ("a_b3 $5", ["a_b3", "$", "5"]),
    ],
)
def test_what_a_word_is(words, wanted):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    found = TextProcessor(made)(words)
    pieces = found.pieces(np.ones(len(found.ids)), granularity="word")
    assert [piece.text for piece in pieces if not piece.text.isspace()] == wanted


def test_a_token_of_several_words():
    """Signs that one token stands for are one piece, and no character is lost."""
    words = {"good": 0, "...": 1, ":)": 2, " ": 3, "yes": 4, ").": 5, "?": 6}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    signs = tokenizers.Regex(r"\w+|\s|[^\w\s]+")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(signs, "isolated")
    found = TextProcessor(made)("good... :) yes).")
    pieces = found.pieces(np.arange(7.0), granularity="word")
    shown = [(piece.text, piece.score) for piece in pieces if piece.text != " "]
    assert shown == [("good", 0), ("...", 1), (":)", 3), ("yes", 5), (").", 6)]


def test_nothing_is_cut_off_unsaid(tmp_path):
    encode = build(tmp_path, padding=True)
    assert len(encode("good good good good").ids) == 6
    with pytest.raises(ValueError, match="has 6 tokens, more than `length` 4"):
        encode("good good good good", length=4)


def test_wrong_calls(encode, tmp_path):
    with pytest.raises(ValueError, match="a text is a string, got int"):
        encode(3)
    found = encode("good")
    with pytest.raises(ValueError, match=r"one for each of 3 tokens, got shape \(2,\)"):
        found.pieces(np.ones(2))
    with pytest.raises(ValueError, match="'token' or 'word', got 'line'"):
        found.pieces(np.ones(3), granularity="line")
    assert encode.token_id("good") == encode.token_id("[PAD]") + 7
    with pytest.raises(ValueError, match=r"not one token, it is \['un', '##related'\]"):
        encode.token_id("unrelated")
    with pytest.raises(ValueError, match=r"no tokenizer.json; .*writes one"):
        text(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer"):
        text(tmp_path)


def test_a_text_without_tokens():
    empty = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    with pytest.raises(ValueError, match="has no tokens"):
        TextProcessor(empty)("")
