"""From what the command line asks to an attribution, printed and drawn."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console

from xviz_jax.attribution import Attribution
from xviz_jax.explain import show
from xviz_jax.explain.subject import Subject, of_checkpoint, of_function
from xviz_jax.explain.target import choose
from xviz_jax.methods import methods

_SUFFIXES = (".png", ".pdf", ".svg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks.

    Attributes:
      model: A checkpoint's folder, a GGUF file, `embedded`, or
        `package.module:function`.
      text: A text to explain; one of this, `image` and `array`.
      pair: A second text, for a model of pairs.
      image: An image file.
      array: A `.npy` file that holds a function's input.
      prepare: A folder whose tokenizer or image processor prepares a function's
        input.
      method: The name of a method in `xviz_jax`.
      options: `NAME=VALUE` for the method, values as JSON.
      target: A class, its label, or a word; None for the predicted one.
      versus: Another, whose logit is subtracted.
      against: A text or an image file, whose cosine with the features is explained.
      position: The token whose logits are read.
      granularity: `token` or `word`.
      seed: Of random methods.
      out: A picture to write.
    """

    model: str
    text: str | None = None
    pair: str | None = None
    image: Path | None = None
    array: Path | None = None
    prepare: Path | None = None
    method: str = "integrated_gradients"
    options: Sequence[str] = ()
    target: str | None = None
    versus: str | None = None
    against: str | None = None
    position: int | None = None
    granularity: Literal["token", "word"] = "word"
    seed: int = 0
    out: Path | None = None


def run(request: Request, console: Console) -> Attribution:
    """Explains what is asked, prints it, and writes the picture.

    Raises:
      ValueError: If the request does not fit the model, the method or the input.
    """
    method, options = _method(request)
    _check_picture(request.out)
    subject = _subject(request)
    known = inspect.signature(method).parameters
    given: dict[str, Any] = {"argnums": 1, "query": subject.query}
    if subject.baseline is not None:
        given["baseline"] = subject.baseline
    options = {name: given[name] for name in given if name in known} | options
    if isinstance(options.get("baseline"), jax.Array):
        # Numbers without a point are of the input's kind.
        options["baseline"] = options["baseline"].astype(subject.args[0].dtype)
    explain = method(subject.forward, **options)
    chosen = choose(subject, request.target, request.versus, request.against)

    @jax.jit
    def program(parameters: Any, args: tuple[Any, ...], key: jax.Array) -> Attribution:
        return explain(parameters, *args, target=chosen.target, key=key)

    key = jax.random.key(request.seed)
    attribution = jax.device_get(program(subject.parameters, subject.args, key))
    if chosen.ranked:
        console.print(show.plain(f"predicted: {', '.join(chosen.ranked)}"))
    title = f"{request.method}: {chosen.said}"
    console.print(show.plain(f"{title}, {attribution.output:.4g}"))
    figure = show.attribution(subject, attribution, request.granularity, title, console)
    if request.out is not None:
        figure.savefig(request.out, dpi=150, bbox_inches="tight", pad_inches=0.1)
        console.print(show.plain(f"picture: {request.out}"))
    return attribution


def _method(request: Request) -> tuple[Callable, dict[str, Any]]:
    known = methods()
    if request.method not in known:
        raise ValueError(f"`--method` is one of {list(known)}, got {request.method!r}")
    method = known[request.method]
    _, *parameters = inspect.signature(method).parameters.values()
    names = [p.name for p in parameters if p.name != "argnums"]
    options: dict[str, Any] = {}
    for option in request.options:
        name, given, value = option.partition("=")
        if not given or name not in names:
            raise ValueError(
                f"`--option` is NAME=VALUE with one of {names}, got {option!r}"
            )
        try:
            options[name] = _as_array(name, json.loads(value))
        except ValueError:
            options[name] = value
    if options.get("query", 0) is None:
        raise ValueError("`query` is one position here, or weights: one row is drawn")
    needed = [p.name for p in parameters if p.default is p.empty]
    if missing := [name for name in needed if name not in options]:
        raise ValueError(f"{request.method} needs an `--option` for each of {missing}")
    return method, options


def _as_array(name: str, value: Any) -> Any:
    """Weights and what is laid out like an input are arrays; axes and sizes, lists."""
    if not isinstance(value, list):
        return value
    like_input = name in ("baseline", "baselines", "groups")
    if like_input or any(isinstance(each, float | list) for each in value):
        return jnp.asarray(value)
    return value


def _check_picture(out: Path | None) -> None:
    if out is None:
        return
    if out.suffix not in _SUFFIXES:
        raise ValueError(f"`--out` ends in one of {_SUFFIXES}, got {out}")
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"`--out` is a file in a folder that is there, got {out}")


def _subject(request: Request) -> Subject:
    given = (request.text, request.image, request.array)
    if sum(each is not None for each in given) != 1:
        raise ValueError("explain one of --text, --image and --array")
    if request.pair is not None and request.text is None:
        raise ValueError("`--pair` is a second text, and needs a first")
    source = request.text if request.text is not None else request.image
    model = request.model
    if model == "embedded" or (":" in model and not Path(model).exists()):
        if request.position is not None:
            raise ValueError("`--position` is for a checkpoint, not for a function")
        return of_function(model, source, request.pair, request.array, request.prepare)
    if request.array is not None or request.prepare is not None:
        raise ValueError("`--array` and `--prepare` are for a function")
    assert source is not None
    return of_checkpoint(Path(model), source, request.pair, request.position)
