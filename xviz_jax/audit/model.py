"""The audited model: a function of parameters, and what it wants of a record."""

import dataclasses
import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xviz_jax import baselines, doctor
from xviz_jax.audit.sources import BadRecord, Buckets, Column, Record

# Tokens of a text for a model that knows no limit.
_LONGEST = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model as an audit takes it.

    Attributes:
      forward: A function of `(parameters, x, *rest)`, of one example.
      parameters: Arrays, arguments of every compiled program; on a mesh, already
        where they belong.
      fingerprint: A hash of the parameters; by default of those here.
      checked: Whether the parameters are known to be finite; else a run looks.
      columns: The columns of a record that become `x, *rest`, in that order; None
        for the one that the data has.
      read: Makes the arguments of a record's columns; by default they are taken as
        they are, with images of bytes brought to the range from 0 to 1.
      schema: What columns must hold.
      buckets: Lengths that arguments are padded to; None explains every length in a
        program of its own. A padded model takes a mask after the tokens.
      pads: What each argument after the mask is padded with.
      query: The position that attention methods explain; negative from the last
        token of the record.
      defaults: Options of methods that have them, such as a baseline.
      classes: Names of the classes.
      mesh: The devices that the parameters are spread over, if they are.
    """

    forward: Callable[..., jax.Array]
    parameters: Any = None
    fingerprint: str = ""
    checked: bool = False
    columns: tuple[str, ...] | None = None
    read: Callable[[Mapping[str, Any]], tuple[np.ndarray, ...]] | None = None
    schema: Mapping[str, Column] | None = None
    buckets: Buckets | None = None
    pads: tuple[int, ...] = ()
    query: int = 0
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    mesh: Mesh | None = None

    def arguments(
        self, record: Record, columns: Sequence[str]
    ) -> tuple[tuple[np.ndarray, ...], int | None]:
        """What the model is given of a record, and its length before padding.

        Raises:
          BadRecord: If the record is none for this model.
        """
        given = {name: record.columns.get(name) for name in columns}
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise BadRecord("MISSING", f"there is no column {missing}", record.id)
        for name, column in (self.schema or {}).items():
            if name in given:
                given[name] = column.check(name, given[name], loose=False)
        if self.read is None:
            args = tuple(plain(name, value) for name, value in given.items())
        else:
            args = tuple(map(np.asarray, self.read(given)))
        for each in args:
            if each.size == 0:
                raise BadRecord("EMPTY", f"an argument is {list(each.shape)}")
            if each.dtype.kind == "f" and not np.isfinite(each).all():
                raise BadRecord("NONFINITE_INPUT", "an argument is NaN or infinite")
        if self.buckets is None:
            return args, None
        return self._padded(args, record.id)

    def _padded(
        self, args: tuple[np.ndarray, ...], name: str
    ) -> tuple[tuple[np.ndarray, ...], int]:
        assert self.buckets is not None
        tokens, pad = args[0], self.buckets.pad
        record = Record(name, {self.buckets.column: tokens})
        if self.read is None:
            length = self.buckets.length_of(record)
            bucket = self.buckets.bucket_of(record)
        else:
            # A tokenizer adds no padding: the last token is one, whichever it is.
            length = len(tokens)
            fits = [each for each in self.buckets.all() if each >= length]
            if not fits:
                longest = self.buckets.all()[-1]
                raise BadRecord(
                    "TOO_LONG", f"{length} tokens, the longest bucket is {longest}"
                )
            bucket = fits[0]
        fill = lambda each, value: np.concatenate(
            [each[:length], np.full(bucket - length, value, each.dtype)]
        )
        rest = [fill(*pair) for pair in zip(args[1:], self.pads, strict=True)]
        return (fill(tokens, pad), np.arange(bucket) < length, *rest), length


def plain(name: str, value: Any) -> np.ndarray:
    """A column as an argument: numbers in 32 bits, images from 0 to 1.

    Raises:
      BadRecord: If it is no array of numbers.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise BadRecord("WRONG_DTYPE", f"{name!r} is {array.dtype}, wanted numbers")
    if name == "image" and array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    if name == "image" and array.dtype.kind in "iu":
        raise BadRecord(
            "WRONG_DTYPE", f"{name!r} is {array.dtype}, wanted uint8 or floats"
        )
    if name == "tokens":
        if array.dtype.kind not in "iu":
            raise BadRecord(
                "WRONG_DTYPE", f"{name!r} is {array.dtype}, wanted integers"
            )
        if array.size and array.min() < 0:
            raise BadRecord("NEGATIVE_ID", f"{name!r} holds token {array.min()}")
    if array.dtype == np.float64:
        return array.astype(np.float32)
    if array.dtype.kind in "iu" and array.dtype.itemsize > 4:
        if array.size and (array.max() >= 2**31 or array.min() < -(2**31)):
            raise BadRecord("WRONG_DTYPE", f"{name!r} does not fit in 32 bits")
        return array.astype(np.int32)
    return array


def find(
    name: str | Callable | Model,
    *,
    vocabulary: int | None = None,
    buckets: Buckets | None = None,
    split: bool = False,
    weights_sha256: str | None = None,
    allow_nonfinite: bool = False,
) -> Model:
    """The model a name stands for.

    Args:
      name: `embedded`, a checkpoint's folder or GGUF file, `module:function`, or
        `module:name` of a `Model`; or such a function or `Model` itself.
      vocabulary: How many tokens a function knows.
      buckets: Lengths that a function's tokens are padded to; it takes a mask then.
      split: Spread a checkpoint's parameters over all local devices.
      weights_sha256: The fingerprint that a checkpoint must have.
      allow_nonfinite: Take a checkpoint that holds NaN or infinity.

    Raises:
      ValueError: If there is no such model, an option is not for it, or its weights
        are not as wanted.
    """
    if isinstance(name, str) and name != "embedded" and _is_checkpoint(name):
        if vocabulary is not None:
            raise ValueError("`vocabulary` is for a function; a checkpoint knows its")
        loaded, mesh = _loaded(Path(name), split, allow_nonfinite)
        if weights_sha256 not in (None, loaded.fingerprint):
            raise ValueError(
                f"`weights_sha256` is {weights_sha256}, and the weights of {name} are "
                f"{loaded.fingerprint}"
            )
        return _of_checkpoint(Path(name), loaded, mesh, buckets)
    if split:
        raise ValueError("only a checkpoint is split over devices by its name")
    if weights_sha256 is not None:
        raise ValueError("`weights_sha256` is for a checkpoint")
    if isinstance(name, Model):
        return name
    if name == "embedded":
        return _embedded()
    if isinstance(name, str):
        module, _, attribute = name.partition(":")
        if attribute:
            found = _attribute(module, attribute)
            if isinstance(found, Model):
                return found
        name, _ = doctor.find_model(name)
    schema = {} if vocabulary is None else {"tokens": _tokens(vocabulary)}
    function = name
    return Model(
        forward=lambda _, *args: function(*args), schema=schema, buckets=buckets
    )


def _tokens(vocabulary: int) -> Column:
    return Column(dtype="int32", shape=(None,), vocabulary=vocabulary)


def _is_checkpoint(name: str) -> bool:
    return Path(name).exists() or ":" not in name


def _attribute(module: str, attribute: str) -> Any:
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None  # The doctor says what is wrong.


def _embedded() -> Model:
    from xviz_jax.models import embedded

    forward, parameters = embedded.functional()
    return Model(
        forward=forward,
        parameters=parameters,
        checked=True,
        columns=("image",),
        schema={"image": Column(shape=(28, 28), decode="image")},
        read=_gray,
        classes=tuple(embedded.card()["classes"]),
    )


def _gray(columns: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
    image = plain("image", columns["image"])
    if image.shape != (28, 28):
        raise BadRecord(
            "WRONG_SHAPE", f"'image' is {list(image.shape)}, wanted [28, 28]"
        )
    if image.dtype.kind != "f":
        raise BadRecord("WRONG_DTYPE", f"'image' is {image.dtype}, wanted floats")
    return (image.astype(np.float32),)


def _loaded(path: Path, split: bool, allow_nonfinite: bool) -> tuple[Any, Mesh | None]:
    """A checkpoint, and the mesh that it is spread over."""
    from xviz_jax import models

    mesh = None
    if split:
        devices = np.array(jax.local_devices())
        mesh = Mesh(devices, ("model",), axis_types=(AxisType.Auto,))
    loaded = models.load(
        path, scan=True, sharding=mesh, allow_nonfinite=allow_nonfinite
    )
    return loaded, mesh


def _of_checkpoint(
    path: Path, loaded: Any, mesh: Mesh | None, buckets: Buckets | None
) -> Model:
    from xviz_jax import models

    if loaded.gives == "features":
        raise ValueError(f"{path} gives features; an audit explains classes")
    shared = {
        "fingerprint": loaded.fingerprint,
        "checked": True,
        "classes": loaded.labels,
        "mesh": mesh,
    }
    if "position" not in loaded.options:
        if buckets is not None:
            raise ValueError("`buckets` are for a model of tokens")
        process = models.image(path)
        forward, parameters = loaded.functional()

        def pixels(columns: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
            try:
                return (process(columns["image"]).pixels,)
            except ValueError as error:
                raise BadRecord("UNPREPARED", str(error)) from error

        return Model(
            forward=forward,
            parameters=parameters,
            columns=("image",),
            read=pixels,
            **shared,
        )
    words = models.text(path)
    default = loaded.options["position"]
    if default is None and loaded.gives == "words":
        raise ValueError(
            f"{path} fills in a masked word; an audit explains classes, or next words"
        )
    forward, parameters = loaded.functional()
    config = loaded.config
    longest = getattr(config, "positions", None) or _LONGEST
    longest -= getattr(config, "first_position", 0)
    pairs = getattr(config, "segments", 0) > 1
    # The tokens are as much a part of the answer as the weights.
    split_by = hashlib.sha256(words.tokenizer.to_str().encode()).hexdigest()
    shared["fingerprint"] = f"{loaded.fingerprint} {split_by}"

    def ids(columns: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        encoding = words(columns["text"])
        return (encoding.ids, encoding.segments) if pairs else (encoding.ids,)

    # A path starts where the words are padding and what frames them stays.
    frame = words.tokenizer.encode("").ids
    if buckets is None:
        shortest = min(Buckets.shortest, longest)
        buckets = Buckets(
            column="tokens", shortest=shortest, longest=longest, pad=words.pad_id
        )
    return Model(
        forward=forward,
        parameters=parameters,
        columns=("text",),
        schema={"text": Column(dtype="text")},
        read=ids,
        buckets=buckets,
        pads=(0,) if pairs else (),
        query=default or 0,
        defaults={"baseline": baselines.tokens(words.pad_id, keep=frame)},
        **shared,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A record on every device of a mesh."""
    return NamedSharding(mesh, PartitionSpec())
