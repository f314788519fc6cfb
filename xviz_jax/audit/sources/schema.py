"""What a column must hold, checked record by record.

JAX does not check an index: looking up token 7 of a table of 5 reads the last row, in
silence. So token ids, shapes and kinds of numbers are checked here, where the record
can still be refused.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from xviz_jax.audit.sources.record import BadRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """What one column of a record must hold.

    Integers may be stored wider than wanted, and floats too: they are converted where
    the value fits. Integers are never taken for floats, except from text formats,
    which know no difference: an image of bytes is not one of floats from 0 to 1.

    Attributes:
      dtype: `"text"`, or numpy's name of a number; None takes what comes.
      shape: Of the array; None for an axis of any length, None for any shape.
      vocabulary: Values are token ids from 0 up to this, exclusive.
      min_length: Of the first axis, or of a text in characters.
      max_length: The same.
      finite: Refuses NaN and infinities.
      decode: `"image"`: the value is an encoded image, or names one in the folder of
        the data. It becomes uint8 [height, width, 3]; gray, by its luminance, where
        `shape` has two axes, [height, width], or one channel, [height, width, 1].
    """

    dtype: str | None = None
    shape: tuple[int | None, ...] | None = None
    vocabulary: int | None = None
    min_length: int = 1
    max_length: int | None = None
    finite: bool = True
    decode: Literal["image"] | None = None

    def __post_init__(self):
        """Refuses what no value can meet."""
        if self.dtype not in (None, "text") and np.dtype(self.dtype).kind not in "biuf":
            raise ValueError(f"`dtype` is 'text' or a number's, got {self.dtype!r}")
        if self.dtype == "text" and (self.shape or self.vocabulary or self.decode):
            raise ValueError("a text has no `shape`, `vocabulary` or `decode`")
        if self.vocabulary is not None and self.vocabulary < 1:
            raise ValueError(f"`vocabulary` is positive, got {self.vocabulary}")
        if self.max_length is not None and self.max_length < max(self.min_length, 1):
            raise ValueError(
                f"`max_length` {self.max_length} is below `min_length` "
                f"{self.min_length}"
            )

    def check_kind(self, dtype: np.dtype, shape: tuple[int, ...] | None) -> None:
        """Refuses a whole column by its dtype and the shape of its rows, if known.

        Raises:
          ValueError: With what was got and wanted.
        """
        if not _convertible(dtype, self.dtype):
            raise ValueError(f"holds {dtype}, {self.dtype} is wanted")
        if shape is not None and not _fits(shape, self.shape):
            raise ValueError(f"has rows {list(shape)}, {_spell(self.shape)} are wanted")

    def check(self, name: str, value: Any, *, loose: bool) -> Any:
        """The value as wanted: a text or an array.

        Args:
          name: Of the column, for the error.
          value: A text, an array, a number or nested lists of numbers.
          loose: From a text format, where an integer may stand for a float.

        Raises:
          BadRecord: If it is not as wanted.
        """
        if isinstance(value, str) or self.dtype == "text":
            return self._text(name, value)
        array = self._converted(name, _array(name, value), loose)
        if not _fits(array.shape, self.shape):
            raise BadRecord(
                "WRONG_SHAPE",
                f"{name!r} is {list(array.shape)}, {_spell(self.shape)} is wanted",
            )
        if array.ndim:
            self._length(name, len(array))
        if array.size == 0:
            raise BadRecord("EMPTY", f"{name!r} is {list(array.shape)}, without values")
        if self.finite and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadRecord("NONFINITE_INPUT", f"{name!r} holds a NaN or an infinity")
        return array

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str | bytes) or self.dtype not in (None, "text"):
            wanted = self.dtype or "an array"
            raise BadRecord(
                "WRONG_DTYPE", f"{name!r} is {type(value).__name__}, {wanted} is wanted"
            )
        value = utf8(name, value)
        self._length(name, len(value))
        return value

    def _length(self, name: str, length: int) -> None:
        if length < self.min_length:
            reason = "EMPTY" if length == 0 else "WRONG_SHAPE"
            raise BadRecord(
                reason, f"{name!r} has length {length}, {self.min_length} is the least"
            )
        if self.max_length is not None and length > self.max_length:
            raise BadRecord(
                "TOO_LONG",
                f"{name!r} has length {length}, {self.max_length} is the most",
            )

    def _converted(self, name: str, array: np.ndarray, loose: bool) -> np.ndarray:
        dtype = np.dtype(self.dtype) if self.dtype else array.dtype
        known = _convertible(array.dtype, self.dtype)
        as_float = loose and dtype.kind == "f" and array.dtype.kind in "iu"
        tokens = self.vocabulary is None or array.dtype.kind in "iu"
        if array.size and not (tokens and (known or as_float)):
            wanted = self.dtype or "token ids"
            raise BadRecord(
                "WRONG_DTYPE", f"{name!r} is {array.dtype}, {wanted} is wanted"
            )
        if array.size and array.dtype.kind in "iu":
            self._range(name, array, dtype)
        # A float too large for the wanted dtype becomes infinite, which is refused.
        with np.errstate(over="ignore"):
            return array.astype(dtype, copy=False)

    def _range(self, name: str, array: np.ndarray, dtype: np.dtype) -> None:
        low, high = int(array.min()), int(array.max())
        if self.vocabulary is not None:
            if low < 0:
                raise BadRecord("NEGATIVE_ID", f"{name!r} holds token {low}")
            if high >= self.vocabulary:
                raise BadRecord(
                    "OUT_OF_VOCABULARY",
                    f"{name!r} holds token {high}, of a vocabulary of "
                    f"{self.vocabulary}",
                )
        if dtype.kind in "iu":
            span = np.iinfo(dtype)
            if low < span.min or high > span.max:
                raise BadRecord(
                    "WRONG_DTYPE",
                    f"{name!r} runs from {low} to {high}, {dtype} is wanted",
                )


# What a column holds where the schema says nothing.
DEFAULTS = {"image": Column(decode="image"), "text": Column(dtype="text")}
ANY = Column()


def _array(name: str, value: Any) -> np.ndarray:
    """Numbers as an array of the machine's byte order."""
    if value is None:
        raise BadRecord("MISSING", f"{name!r} has no value")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError, TypeError) as error:
        raise BadRecord("WRONG_SHAPE", f"{name!r} is no array: {error}") from None
    if array.dtype.kind not in "biuf":
        raise BadRecord("WRONG_DTYPE", f"{name!r} is {array.dtype}, numbers are wanted")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def utf8(name: str, value: str | bytes) -> str:
    """A text that can be written as UTF-8.

    Raises:
      BadRecord: If it is none, or holds half of a surrogate pair.
    """
    try:
        text = value.decode() if isinstance(value, bytes) else value
        text.encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise BadRecord("BAD_UTF8", f"{name!r}: {error.reason}") from None
    return text


def _convertible(stored: np.dtype, wanted: str | None) -> bool:
    """Whether numbers keep their meaning: integers stay integers, floats floats."""
    if wanted is None:
        return True
    if wanted == "text":
        return stored.kind in "US"
    kinds = {"i": "iu", "u": "iu"}
    kind = np.dtype(wanted).kind
    return stored.kind in kinds.get(kind, kind)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...] | None) -> bool:
    return wanted is None or (
        len(shape) == len(wanted)
        and all(w in (None, n) for n, w in zip(shape, wanted, strict=True))
    )


def _spell(shape: tuple[int | None, ...] | None) -> str:
    return f"[{', '.join('any' if n is None else str(n) for n in shape or ())}]"
