"""One input of one model, read from files: what is explained."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import arrays, doctor, models
from xviz_jax.models import embedded
from xviz_jax.models.image_view import ImageView
from xviz_jax.models.text import Encoding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """One input of one model.

    Attributes:
      forward: A function of `(parameters, *args)`.
      parameters: Of the model; None for a function.
      args: The explained input, and what the model takes besides.
      view: What the input was read as; None for an array.
      read: Arguments made from another text or image file.
      baseline: Where a path starts: for a text, its words replaced by padding, because
        a network that normalises has no finite gradient at zero.
      query: The position that attention methods explain, or `pooled`.
      features: Whether the output is not of classes.
      name: What a class is called.
      find: The class that is called so.
    """

    forward: Callable[..., jax.Array]
    parameters: Any
    args: tuple[Any, ...]
    view: Encoding | ImageView | None
    read: Callable[[str], tuple[Any, ...]] | None = None
    baseline: jax.Array | None = None
    query: int | str = 0
    features: bool = False
    name: Callable[[int], str] = str
    find: Callable[[str], int] | None = None


def of_function(
    name: str,
    source: str | Path | None,
    pair: str | None,
    array: Path | None,
    folder: Path | None,
) -> Subject:
    """A JAX function and its input.

    Args:
      name: `embedded`, or `package.module:function`.
      source: A text, or an image's path; None for an array.
      pair: A second text.
      array: A `.npy` file.
      folder: Whose tokenizer or image processor reads the source.

    Raises:
      ValueError: If there is no such function or input.
    """
    model, _ = doctor.find_model(name)
    forward = lambda _, *args: model(*args)
    if array is not None:
        args = (jnp.asarray(_array(array)),)
        named: dict[str, Any] = {}
        if name == "embedded":
            classes = tuple(embedded.card()["classes"])
            named["name"] = classes.__getitem__
            named["find"] = lambda label: _label(classes, label)
        return Subject(forward=forward, parameters=None, args=args, view=None, **named)
    if folder is None or source is None:
        raise ValueError(
            "a function's text or image is read as a checkpoint reads it: pass "
            "--prepare FOLDER; or pass an --array"
        )
    view, args, read = _prepare(folder, source, pair)
    baseline = None
    if isinstance(view, Encoding):
        baseline = _padded(models.text(folder), view)
    return Subject(
        forward=forward,
        parameters=None,
        args=args,
        view=view,
        read=read,
        baseline=baseline,
    )


def of_checkpoint(
    path: Path, source: str | Path, pair: str | None, position: int | None
) -> Subject:
    """A published model and its input.

    Args:
      path: The folder, or a GGUF file.
      source: A text, or an image's path.
      pair: A second text.
      position: The token whose logits are read; by default the model's own choice,
        or the masked token.

    Raises:
      ValueError: If the folder is bad, or the input is none for such a model.
    """
    # A loop over the layers compiles in the time of one layer.
    model = models.load(path, scan=True)
    reads = "position" in model.options
    if reads != isinstance(source, str) or (position is not None and not reads):
        kind = "texts" if reads else "images"
        raise ValueError(f"the model reads {kind}; `--position` is for texts")
    words = models.text(path) if reads else None
    view, args, read = _prepare(path, source, pair)
    if position is None and reads:
        position = model.options["position"]
        if position is None and model.gives == "words":
            assert words is not None and isinstance(view, Encoding)
            position = _masked(words, view)
    forward, parameters = model.functional(
        **({} if position is None else {"position": position})
    )
    if pair is not None:
        try:
            jax.eval_shape(forward, parameters, *args)
        except TypeError as error:
            raise ValueError("the model takes no pair of texts") from error
    baseline = None
    if words is not None and isinstance(view, Encoding):
        baseline = _padded(words, view)
    pools = getattr(model.config, "pooling", None) == "mean"
    query = "pooled" if pools and position is None else position or 0
    name, find = str, None
    labels = model.labels
    if model.gives == "words" and words is not None:
        name, find = (lambda index: repr(words.decode([index]))), words.token_id
    elif labels is not None:
        name, find = labels.__getitem__, lambda label: _label(labels, label)
    return Subject(
        forward=forward,
        parameters=parameters,
        args=args,
        view=view,
        read=read,
        baseline=baseline,
        query=query,
        features=model.gives == "features",
        name=name,
        find=find,
    )


def _array(path: Path) -> np.ndarray:
    try:
        found = arrays.load(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no array: {error}") from error
    if "" not in found:
        raise ValueError(f"{path} holds several arrays, wanted a .npy file")
    if not found[""].size or not found[""].ndim:
        raise ValueError(
            f"{path} holds an array of {list(found[''].shape)}, wanted some numbers "
            "along an axis or more"
        )
    return found[""]


def _prepare(
    folder: Path, source: str | Path, pair: str | None
) -> tuple[Encoding | ImageView, tuple[Any, ...], Callable[[str], tuple[Any, ...]]]:
    """What a source is read as, the arguments, and how others are read."""
    if isinstance(source, Path):
        process = models.image(folder)
        view = process(source)
        read = lambda other: (jnp.asarray(process(other).pixels),)
        return view, (jnp.asarray(view.pixels),), read
    encode = models.text(folder)
    view = encode(source, pair)
    return view, _arguments(view), lambda other: _arguments(encode(other))


def _arguments(encoding: Encoding) -> tuple[Any, ...]:
    ids = jnp.asarray(encoding.ids)
    if len(encoding.texts) == 1:
        return (ids,)
    return ids, jnp.asarray(encoding.mask), jnp.asarray(encoding.segments)


def _padded(words: models.TextProcessor, encoding: Encoding) -> jax.Array:
    """The same tokens with padding in place of those that stand for characters."""
    ids = np.where(encoding.parts >= 0, words.pad_id, encoding.ids)
    return jnp.asarray(ids, jnp.int32)


def _masked(words: models.TextProcessor, encoding: Encoding) -> int:
    found = np.flatnonzero(encoding.ids == words.mask_id)
    if words.mask_id is None or found.size == 0:
        raise ValueError("the text has no masked token; pass `--position`")
    return int(found[0])


def _label(labels: tuple[str, ...], label: str) -> int:
    if label not in labels:
        raise ValueError(f"a class is a number or one of {labels}, got {label!r}")
    return labels.index(label)
