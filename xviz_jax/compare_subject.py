"""What `xviz-jax compare` compares methods on: a model and its records."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import arrays, baselines, doctor, metrics, models
from xviz_jax.attribution import Attribution
from xviz_jax.explain.target import cosine
from xviz_jax.metrics.imputers import Imputer
from xviz_jax.models import embedded
from xviz_jax.perturbation import patches

# The side of a feature of the embedded model's images, in pixels.
PATCH = 4
_BLUR = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and the records that its explanations are compared on.

    Attributes:
      forward: A function of `(*shared, x, *rest)`.
      shared: Its parameters, or nothing.
      records: A row for each record.
      padding: Which tokens only fill a text up, bool `[records, length]`, or None; its
        opposite is the model's argument after the records, where there is any.
      imputers: What takes the place of absent features.
      baseline: Where a path starts.
      query: The position that attention methods explain; of padded texts, -1 is the
        last one that is no padding.
      patch: The side of a feature, of images.
      slices: A label for each record, or None.
      targets: A class for each record; None for the predicted ones; a function of the
        features of a model without classes.
    """

    forward: Callable[..., jax.Array]
    shared: tuple[Any, ...]
    records: np.ndarray
    padding: np.ndarray | None = None
    imputers: Sequence[Imputer] | None = None
    baseline: Any = None
    query: int | str = 0
    patch: int | None = None
    slices: np.ndarray | None = None
    targets: np.ndarray | Callable[[jax.Array], jax.Array] | None = None

    @property
    def rest(self) -> tuple[np.ndarray, ...]:
        """The model's further arguments: the attention mask of padded texts."""
        if self.padding is None or not self.padding.any():
            return ()
        return (~self.padding,)


def subject_of(
    model: str, data: Path | None, limit: int | None, against: str | None = None
) -> Subject:
    """Finds the model and reads the records.

    Args:
      model: `embedded`, a checkpoint's folder, or `package.module:function`.
      data: A file of records, or None for the embedded model's own.
      limit: How many records, the first ones; None for all.
      against: A text or image file, whose cosine with the features is explained.

    Raises:
      ValueError: If there is no such model, or the file holds something else.
    """
    named = model == "embedded" or (":" in model and not Path(model).exists())
    if named and against is not None:
        raise ValueError("`--against` is for a checkpoint without classes")
    if model == "embedded":
        return of_embedded(data, limit)
    if data is None:
        raise ValueError("pass `--data`: only the embedded model has its own")
    found = _read(data, limit)
    if named:
        forward, _ = doctor.find_model(model)
        return Subject(forward=forward, shared=(), **_without_mask(found))
    return _of_checkpoint(Path(model), found, against)


def of_embedded(data: Path | None, limit: int | None) -> Subject:
    """The embedded model and its own images, or others."""
    forward, parameters = embedded.functional()
    if data is None:
        records, labels = embedded.images()
        records = records[:limit]
        names = np.array(embedded.card()["classes"])[labels[: len(records)]]
        # A slice of fewer records says nothing of its own.
        counts = dict(zip(*np.unique(names, return_counts=True), strict=True))
        given: dict[str, Any] = {"records": records}
        if min(counts.values()) >= 8:
            given["slices"] = names
    else:
        given = _without_mask(_read(data, limit))
    return Subject(
        forward=forward,
        shared=(parameters,),
        imputers=[
            metrics.imputers.baseline(name="black"),
            metrics.imputers.blur(_BLUR),
        ],
        patch=PATCH,
        **given,
    )


def _of_checkpoint(path: Path, found: dict[str, Any], against: str | None) -> Subject:
    # A loop over the layers compiles in the time of one layer.
    loaded = models.load(path, scan=True)
    if (loaded.gives == "features") != (against is not None):
        raise ValueError(
            "a model without classes is explained by the cosine of its features with "
            f"those of `--against`, and no other; {path} gives {loaded.gives}"
        )
    if against is not None and "targets" in found:
        raise ValueError("with `--against` there are no `targets`")
    reads, kind = "position" in loaded.options, found["records"].dtype
    if reads != np.issubdtype(kind, np.integer):
        wanted = "token ids, integers" if reads else "pixels, floats"
        raise ValueError(f"the model reads {wanted}; the data hold {kind}")
    if not reads:
        forward, parameters = loaded.functional()
        # All vision models here cut images into patches, square in most.
        subject = Subject(
            forward=forward,
            shared=(parameters,),
            patch=max(loaded.config.patch),
            **_without_mask(found),
        )
        read = lambda source: models.image(path)(source).pixels
    else:
        words = models.text(path)
        subject = _of_texts(loaded, words, found)
        read = lambda source: words(source).ids
    if against is not None:
        other = jax.jit(subject.forward)(*subject.shared, jnp.asarray(read(against)))
        subject = dataclasses.replace(subject, targets=cosine(other))
    return subject


def _of_texts(
    loaded: models.Pretrained, words: models.TextProcessor, found: dict[str, Any]
) -> Subject:
    position = loaded.options["position"]
    each = getattr(loaded.config, "head", None) in ("masked_lm", "tokens")
    if position is None and each:
        raise ValueError(
            f"{loaded.path} has logits for each token: name a function that reads one"
        )
    options = {} if position is None else {"position": position}
    forward, parameters = loaded.functional(**options)
    pools = getattr(loaded.config, "pooling", None) == "mean" and position is None
    special = {
        number
        for number, token in words.tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    mask = found.pop("mask", None)
    if mask is None and words.pad_id in special:
        # Real tokens come first.
        real = np.logical_or.accumulate((found["records"] != words.pad_id)[:, ::-1], 1)
        mask = real[:, ::-1]
    nothing = words.pad_id if words.mask_id is None else words.mask_id
    return Subject(
        forward=forward,
        shared=(parameters,),
        padding=None if mask is None else ~mask,
        imputers=[
            metrics.imputers.mask_token(nothing),
            metrics.imputers.baseline(baselines.mean(0), name="mean"),
        ],
        baseline=baselines.tokens(
            words.pad_id, keep=sorted(special - {words.pad_id, words.mask_id})
        ),
        query="pooled" if pools else position or 0,
        **found,
    )


def groups_of(subject: Subject) -> np.ndarray | None:
    """The feature of each element of an image, whose patches are features."""
    if subject.patch is None:
        return None
    shape = subject.records.shape[1:]
    groups = patches(_grid(shape), subject.patch)
    groups = groups.reshape(*groups.shape, *(1,) * (len(shape) - 2))
    return np.broadcast_to(groups, shape).copy()


def positions_of(
    subject: Subject, methods: dict[str, Callable[..., Attribution]]
) -> np.ndarray | None:
    """The feature of each position that attention methods score.

    The last positions are the model's own grid of patches, or its tokens; those before
    them, a class token and registers, are no feature.
    """
    shape = subject.records.shape[1:]
    of = lambda each: jax.ShapeDtypeStruct(each.shape[1:], each.dtype)
    row = tuple(map(of, (subject.records, *subject.rest)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    lengths = set()
    for method in methods.values():
        ask = lambda shared, row, key, method=method: (
            method(*shared, *row, key=key).scores
        )
        scores = jax.eval_shape(ask, subject.shared, row, key)
        if getattr(scores, "shape", shape) not in (shape, shape[:1]):
            lengths.add(scores.shape)
    if not lengths:
        return None
    if len(lengths) > 1 or len(min(lengths)) != 1:
        raise ValueError(f"scores of shapes {sorted(lengths)} fit no one input {shape}")
    (count,) = lengths.pop()
    if subject.patch is None:
        length = shape[0]
        return np.concatenate([np.full(count - length, -1), np.arange(length)])
    height, width = _grid(shape)
    side = int(np.sqrt(count))
    if height != width or height % side or subject.patch % (height // side):
        raise ValueError(
            f"{count} positions are no square grid that patches of {subject.patch} "
            f"pixels cut evenly, in an image of {list(shape)}; choose another --patch"
        )
    inner = patches((side, side), subject.patch // (height // side)).ravel()
    return np.concatenate([np.full(count - side**2, -1), inner])


def _read(path: Path, limit: int | None) -> dict[str, Any]:
    """Records, and targets, slices and a mask where there are any."""
    try:
        found = arrays.load(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no arrays: {error}") from error
    if "" in found:
        found = {"records": found[""]}
    if "records" not in found:
        raise ValueError(f"{path} has no `records`, only {sorted(found)}")
    records = found["records"]
    if records.ndim < 2 or len(records) < 2:
        raise ValueError(f"{path} holds no rows of records: {list(records.shape)}")
    cast = np.int32 if np.issubdtype(records.dtype, np.integer) else np.float32
    kept = {"records": records[:limit].astype(cast)}
    for name in ("targets", "slices", "mask"):
        if name in found:
            kept[name] = found[name][:limit]
    if "mask" in kept:
        mask = kept["mask"].astype(bool)
        if mask.shape != kept["records"].shape or not mask[:, 0].all():
            raise ValueError(
                f"`mask` is true for each real token of the records, which come first, "
                f"got {list(mask.shape)} for {list(records.shape)}"
            )
        kept["mask"] = mask
    return kept


def _without_mask(found: dict[str, Any]) -> dict[str, Any]:
    if "mask" in found:
        raise ValueError("`mask` is for a checkpoint that reads texts")
    return found


def _grid(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) not in (2, 3):
        raise ValueError(
            f"`--patch` is for images [height, width] or with channels, got "
            f"{list(shape)}"
        )
    return shape[0], shape[1]
