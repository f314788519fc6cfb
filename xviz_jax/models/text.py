"""Texts as a checkpoint's tokens, and scores of tokens as scores of words."""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xviz_jax.models.checkpoint import gguf_file, read_json
from xviz_jax.models.extra import require
from xviz_jax.models.gguf_header import read_header

# Letters (w) with what an apostrophe (a) joins to them, or one other sign (p).
_WORDS = re.compile("w+(?:aw+)*|[ap]")
# How a GGUF file marks a token that no text is split into.
_CONTROL = 3


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a text, and its score.

    Attributes:
      text: Its characters; the name of a token that stands for none, such as [CLS].
      score: The sum over its tokens.
      begin: Where it begins in its text, in characters.
      end: The character after it; `begin` where it stands for none.
      part: Which of the texts it is from; -1 where it stands for none.
    """

    text: str
    score: float
    begin: int
    end: int
    part: int


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Encoding:
    """A text, or a pair, as a model takes it.

    Attributes:
      texts: One text or two.
      tokens: Names of the tokens, as the tokenizer has them.
      ids: int32 [length].
      mask: bool [length], True for real tokens, which come first.
      segments: int32 [length], which of two texts a token is from, as the model was
        trained to be told.
      parts: int32 [length], the same in fact; -1 for a token that stands for no
        characters, such as [CLS].
      offsets: int32 [length, 2], where a token begins and ends in its text.
    """

    texts: tuple[str, ...]
    tokens: tuple[str, ...]
    ids: np.ndarray
    mask: np.ndarray
    segments: np.ndarray
    parts: np.ndarray
    offsets: np.ndarray

    def pieces(
        self, scores: Any, *, granularity: Literal["token", "word"] = "token"
    ) -> list[Piece]:
        """Scores of tokens as scores of stretches of the text; sums are kept.

        A word is a run of letters, marks and digits, with what an apostrophe joins;
        any other sign is one of its own. A token belongs to the word that its first
        character other than a space is in; what lies in several makes one of them.

        Args:
          scores: [length], one for each token; padding's are left out.
          granularity: `token`, or `word`, which sums the tokens of each word.

        Raises:
          ValueError: If the scores are not one for each token.
        """
        scores = self._checked(scores)
        if granularity not in ("token", "word"):
            raise ValueError(f"`granularity` is 'token' or 'word', got {granularity!r}")
        pieces: list[Piece] = []
        for index in np.flatnonzero(self.mask):
            part, score = int(self.parts[index]), float(scores[index])
            begin, end = map(int, self.offsets[index])
            if part < 0:
                pieces.append(Piece(self.tokens[index], score, begin, begin, part))
                continue
            if granularity == "word":
                begin, end = _word(self.texts[part], begin, end)
                last = pieces[-1] if pieces else None
                if last and last.part == part and begin < last.end and begin < end:
                    score, begin = last.score + score, min(begin, last.begin)
                    end = max(end, last.end)
                    pieces.pop()
            pieces.append(Piece(self.texts[part][begin:end], score, begin, end, part))
        return pieces

    def characters(self, scores: Any) -> tuple[np.ndarray, ...]:
        """Scores of tokens spread evenly over their characters.

        Args:
          scores: [length], one for each token.

        Returns:
          For each text, float64 [characters]. They sum to the scores of the tokens
          that stand for characters.

        Raises:
          ValueError: If the scores are not one for each token.
        """
        scores = self._checked(scores)
        spread = tuple(np.zeros(len(text)) for text in self.texts)
        for index in np.flatnonzero(self.mask & (self.parts >= 0)):
            begin, end = self.offsets[index]
            if end > begin:
                share = scores[index] / (end - begin)
                spread[self.parts[index]][begin:end] += share
        return spread

    def _checked(self, scores: Any) -> np.ndarray:
        scores = np.asarray(scores, np.float64)
        if scores.shape != self.ids.shape:
            raise ValueError(
                f"`scores` are one for each of {len(self.ids)} tokens, got shape "
                f"{scores.shape}"
            )
        return scores


def _word(text: str, begin: int, end: int) -> tuple[int, int]:
    """The words that a token is in; a token of spaces stays what it is."""
    seen = [i for i in range(begin, end) if not text[i].isspace()]
    if not seen:
        return begin, end
    kinds = "".join(map(_kind, text))
    spans = [found.span() for found in _WORDS.finditer(kinds)]
    own = [span for span in spans if span[0] <= seen[-1] and seen[0] < span[1]]
    return own[0][0], own[-1][1]


def _kind(character: str) -> str:
    if character.isspace():
        return " "
    if character in "'\u2019":
        return "a"
    letter = character == "_" or unicodedata.category(character)[0] in "LMN"
    return "w" if letter else "p"


@dataclasses.dataclass(frozen=True, eq=False)
class TextProcessor:
    """Turns texts into tokens for one checkpoint; `text` reads it from a folder.

    Attributes:
      tokenizer: The `tokenizers.Tokenizer`.
      pad_id: What fills up a text of fixed length.
      mask_id: The token a masked-LM fills in; None where there is none.
    """

    tokenizer: Any
    pad_id: int = 0
    mask_id: int | None = None

    def __call__(
        self, text: str, pair: str | None = None, *, length: int | None = None
    ) -> Encoding:
        """Encodes one text, or a pair of them; nothing is cut off.

        Args:
          text: The text.
          pair: A second one, for a model of pairs.
          length: How many tokens it is padded to; by default as many as it has.

        Raises:
          ValueError: If it is not a string, has no token, or more than `length`.
        """
        texts = (text,) if pair is None else (text, pair)
        for each in texts:
            if not isinstance(each, str):
                raise ValueError(f"a text is a string, got {type(each).__name__}")
        done = self.tokenizer.encode(*texts)
        count = len(done.ids)
        if count == 0:
            raise ValueError("the text has no tokens")
        if length is not None and count > length:
            raise ValueError(
                f"the text has {count} tokens, more than `length` {length}"
            )
        size = count if length is None else length
        parts = [-1 if part is None else part for part in done.sequence_ids]
        # A token inside the text may still stand for none of its characters.
        parts = [
            part if end > begin else -1
            for part, (begin, end) in zip(parts, done.offsets, strict=True)
        ]
        fill = size - count
        padding = self.tokenizer.id_to_token(self.pad_id) or ""
        return Encoding(
            texts=texts,
            tokens=(*done.tokens, *[padding] * fill),
            ids=np.array(done.ids + [self.pad_id] * fill, np.int32),
            mask=np.arange(size) < count,
            segments=np.array(done.type_ids + [0] * fill, np.int32),
            parts=np.array(parts + [-1] * fill, np.int32),
            offsets=np.array(done.offsets + [(0, 0)] * fill, np.int32).reshape(-1, 2),
        )

    def token_id(self, text: str) -> int:
        """The id of one token: its name, or a text that is one token.

        Raises:
          ValueError: If it is neither.
        """
        known = self.tokenizer.token_to_id(text)
        if known is not None:
            return known
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) != 1:
            names = [self.tokenizer.id_to_token(each) for each in ids]
            raise ValueError(f"{text!r} is not one token, it is {names}")
        return ids[0]

    def decode(self, ids: Iterable[Any]) -> str:
        """The text that ids stand for, special tokens included."""
        return self.tokenizer.decode(
            [int(each) for each in ids], skip_special_tokens=False
        )


def text(path: str | Path) -> TextProcessor:
    """Reads how a published checkpoint splits its texts.

    Args:
      path: A folder with `tokenizer.json` (and `tokenizer_config.json`), or a GGUF
        file with its vocabulary, or a folder that holds one.

    Raises:
      ValueError: If it is missing, malformed or not read.
    """
    tokenizers = require("tokenizers")
    path = Path(path)
    packed = gguf_file(path)
    file = (path if packed is None else packed.parent) / "tokenizer.json"
    if packed is not None and not file.exists():
        return _from_gguf(packed)
    if not file.is_file():
        raise ValueError(
            f"{file.parent} has no tokenizer.json; `AutoTokenizer.from_pretrained("
            "folder).save_pretrained(folder)` of transformers writes one"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # What it raises has no class of its own.
        raise ValueError(f"{file} is no tokenizer: {error}") from error
    # A length is the caller's to choose, and nothing is cut off unsaid.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    names = file.parent / "tokenizer_config.json"
    said = read_json(names) if names.exists() else {}
    return TextProcessor(
        tokenizer,
        pad_id=_special(tokenizer, said, "pad_token", ("[PAD]", "<pad>")) or 0,
        mask_id=_special(tokenizer, said, "mask_token", ("[MASK]", "<mask>")),
    )


def _special(tokenizer: Any, said: dict, key: str, usual: Sequence[str]) -> int | None:
    name = said.get(key)
    if isinstance(name, dict):
        name = name.get("content")
    names = [name] if isinstance(name, str) else usual
    found = (tokenizer.token_to_id(each) for each in names)
    return next((each for each in found if each is not None), None)


def _from_gguf(file: Path) -> TextProcessor:
    """A tokenizer from a GGUF file's vocabulary and merges."""
    tokenizers = require("tokenizers")
    fields = read_header(file).fields

    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{key}", default)

    kind, splits = get("model"), get("pre", "gpt-2")
    if kind != "gpt2" or splits not in ("gpt-2", "smollm"):
        raise ValueError(
            f"the tokenizer of {file.name} is {kind!r} split as {splits!r}; 'gpt2' "
            "split as 'gpt-2' or 'smollm' is read: put a tokenizer.json beside it"
        )
    names, merges = get("tokens"), get("merges")
    if not names or merges is None:
        raise ValueError(f"{file.name} has no vocabulary")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=pairs)
    )
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if splits == "smollm":
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        split = tokenizers.pre_tokenizers.Sequence([digits, split])
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    steps = [tokenizers.processors.ByteLevel(trim_offsets=True)]
    if get("add_bos_token", False):
        name, index = names[get("bos_token_id")], get("bos_token_id")
        steps.append(
            tokenizers.processors.TemplateProcessing(
                single=f"{name} $A",
                pair=f"{name} $A {name} $B:1",
                special_tokens=[(name, index)],
            )
        )
    tokenizer.post_processor = tokenizers.processors.Sequence(steps)
    control = [
        name
        for name, kind in zip(names, get("token_type", []), strict=False)
        if kind == _CONTROL
    ]
    tokenizer.add_special_tokens(control)
    return TextProcessor(tokenizer, pad_id=get("padding_token_id", 0))
