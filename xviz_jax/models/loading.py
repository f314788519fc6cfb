"""Fill a Flax NNX model from a published checkpoint, or say all that is wrong."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from xviz_jax.models import filling, registry
from xviz_jax.models.checkpoint import open_checkpoint
from xviz_jax.models.fingerprint import fingerprint

# A mesh, one sharding for all parameters, or one for each path and shape.
Placement = Mesh | Sharding | Callable[[str, tuple[int, ...]], Sharding] | None


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A published model, ready to be explained.

    Attributes:
      module: The Flax NNX module, of one example.
      config: The architecture's own configuration.
      raw: `config.json`, or what stands for it.
      path: Where it was read.
      fingerprint: sha256 over the configuration and every tensor that was used: its
        name, dtype, shape and bytes.
      ignored: Tensors of the files that the model does without, each with the reason.
    """

    module: nnx.Module
    config: Any
    raw: dict[str, Any]
    path: Path
    fingerprint: str
    ignored: dict[str, str]

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of the logits, where they are known."""
        named = self.raw.get("id2label")
        if not isinstance(named, dict) or self.gives != "classes":
            return None
        return tuple(str(named[i]) for i in sorted(named, key=int))

    @property
    def gives(self) -> Literal["classes", "words", "features"]:
        """What the logits are of: classes, words of the vocabulary, or no classes.

        Features are explained by a callable target.
        """
        name = self.raw["architectures"][0]
        if name.endswith(("LMHeadModel", "LM", "ForPreTraining")):
            return "words"
        return "features" if name.endswith("Model") else "classes"

    @property
    def options(self) -> dict[str, Any]:
        """What `explainable` takes, and its defaults."""
        output = inspect.signature(registry.find(self.raw).output)
        return {
            name: option.default
            for name, option in output.parameters.items()
            if option.kind == option.KEYWORD_ONLY
        }

    def explainable(self, **options: Any) -> Callable[..., jax.Array]:
        """The model as a function of one example, for the methods to take.

        Its parameters become constants of whatever program is compiled from it;
        `functional` keeps a large model's as arguments.

        Args:
          **options: The architecture's own: see `output` in its package.

        Returns:
          A function `(x, *rest) -> logits [classes]`.

        Raises:
          ValueError: If an option does not fit.
        """
        output, module = self._output(options), self.module
        return lambda x, *rest: output(module, x, *rest)

    def functional(self, **options: Any) -> tuple[Callable[..., jax.Array], Any]:
        """The model as `forward(parameters, x, *rest)`, and its parameters.

        Explain it with `argnums=1`: the parameters stay arguments of the compiled
        program.

        Args:
          **options: As for `explainable`.
        """
        output = self._output(options)
        graph, parameters = nnx.split(self.module)

        def forward(parameters: Any, x: Any, *rest: Any) -> jax.Array:
            return output(nnx.merge(graph, parameters), x, *rest)

        return forward, parameters

    def _output(self, options: dict[str, Any]) -> Callable[..., jax.Array]:
        known = self.options
        if unknown := sorted(options.keys() - known.keys()):
            name = self.raw["architectures"][0]
            raise ValueError(f"{name} takes the options {[*known]}, got {unknown}")
        return registry.find(self.raw).output(self.config, **options)


def load(
    path: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    scan: bool = False,
    sharding: Placement = None,
    allow_nonfinite: bool = False,
) -> Pretrained:
    """Reads a published checkpoint into a Flax NNX model.

    Every tensor of the files is used or named as ignored, and every parameter is
    filled; nothing is ever unpickled. Costs one pass over the files.

    Args:
      path: A folder with `config.json` and `*.safetensors`, or a GGUF file.
      dtype: Of parameters and activations. Norms and the softmax are computed in
        float32 with either.
      scan: Run the layers as one loop: compiles faster, and a site inside has a
        leading layer axis.
      sharding: Where parameters go: a mesh, over all of whose devices each one's
        longest axis that divides evenly is split; a sharding for all; or a function
        of a parameter's path and shape. Each device gets its part only. By default
        the first device gets all.
      allow_nonfinite: Take weights that hold NaN or infinity.

    Returns:
      The model.

    Raises:
      ValueError: If the folder is incomplete or malformed, the architecture is not
        known, or tensors are missing, left over, of the wrong shape or not finite:
        all of them in one error.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"`dtype` is 'float32' or 'bfloat16', got {dtype!r}")
    checkpoint = open_checkpoint(path)
    architecture = registry.find(checkpoint.config)
    config = architecture.configure(checkpoint.config)
    blank = nnx.eval_shape(
        lambda: architecture.build(
            config, dtype=jnp.dtype(dtype), scan=scan, rngs=nnx.Rngs(0)
        )
    )
    graph, state = nnx.split(blank)
    leaves = {"/".join(map(str, p)): leaf for p, leaf in nnx.to_flat_state(state)}
    planned = filling.plan(checkpoint.tensors, architecture.mapping(config), leaves)
    arrays, digests, faults = filling.fill(
        planned,
        {path: leaf.dtype for path, leaf in leaves.items()},
        _placing(sharding),
        allow_nonfinite=allow_nonfinite,
    )
    faults = [*planned.faults, *faults]
    if faults:
        raise ValueError("\n- ".join([f"{path} cannot be loaded", *faults]))
    filled = [
        (path, leaf.replace(arrays["/".join(map(str, path))]))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return Pretrained(
        module=nnx.merge(graph, nnx.from_flat_state(filled)),
        config=config,
        raw=dict(checkpoint.config),
        path=checkpoint.path,
        fingerprint=fingerprint(checkpoint.config, digests),
        ignored=planned.ignored,
    )


def _placing(sharding: Placement) -> filling.Place:
    if sharding is None:
        return lambda path, value: jnp.asarray(value)
    if isinstance(sharding, Mesh):
        # The compiler, and not the model's code, decides where activations go.
        automatic = (AxisType.Auto,) * len(sharding.axis_names)
        mesh = Mesh(sharding.devices, sharding.axis_names, axis_types=automatic)
        chosen = lambda path, shape: NamedSharding(mesh, _split(shape, mesh))
    elif isinstance(sharding, Sharding):
        chosen = lambda path, shape: sharding
    else:
        chosen = sharding

    def place(path: str, value: np.ndarray) -> jax.Array:
        where = chosen(path, value.shape)
        return jax.make_array_from_callback(value.shape, where, value.__getitem__)

    return place


def _split(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The longest axis that divides evenly goes over all devices."""
    fitting = [axis for axis, size in enumerate(shape) if size % mesh.size == 0]
    if not fitting:
        return PartitionSpec()
    longest = max(fitting, key=lambda axis: shape[axis])
    names = [None] * len(shape)
    return PartitionSpec(*names[:longest], mesh.axis_names)
