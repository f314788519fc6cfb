"""A checkpoint is loaded whole, or refused with all that is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import xviz_jax as xv
from xviz_jax.models import filling, layers, registry
from xviz_jax.models.mapping import Mapping

GOLDENS = Path(__file__).parent / "goldens" / "text"
NAME = "gpt2_lm"
WEIGHTS = "model.safetensors"
TOKENS = np.array([5, 3, 9], np.int32)


@pytest.fixture
def folder(tmp_path):
    """A copy of a good folder, to be spoilt."""
    return Path(shutil.copytree(GOLDENS / NAME, tmp_path / "model"))


def change(folder, **tensors):
    """Replaces tensors; None takes one away."""
    found = load_file(folder / WEIGHTS)
    for name, value in tensors.items():
        found.pop(name, None)
        if value is not None:
            found[name] = value
    save_file(found, folder / WEIGHTS)


def configure(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def quick(function):
    """Compiled in little time, to run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def parameters(model):
    state = nnx.to_flat_state(nnx.state(model.module))
    return {"/".join(map(str, path)): leaf[...] for path, leaf in state}


H = "transformer.h.0."
NAN = np.array([1, np.nan, 2, np.inf, 3, 4, 5, 6], np.float32)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({H + "ln_1.bias": None}, ["missing tensors: h.0.ln_1.bias"]),
        ({"more.weight": np.ones(2)}, ["has no place for: more.weight"]),
        (
            {H + "ln_1.bias": np.ones(9, np.float32)},
            ["wrong shapes: transformer.h.0.ln_1.bias [9] for layers/0/atten", "[8]"],
        ),
        (
            {H + "ln_1.bias": NAN},
            ["not finite: transformer.h.0.ln_1.bias (2 of 8 numbers)"],
        ),
        ({H + "ln_1.bias": np.full(8, 1e300)}, ["not finite", "(8 of 8 numbers)"]),
        ({H + "ln_1.bias": np.ones(8, np.int8)}, ["not floats", "ln_1.bias (I8)"]),
        (
            {"lm_head.weight": np.ones((24, 8), np.float32)},
            ["copies that differ: lm_head.weight is not transformer.wte.weight"],
        ),
        (
            {"wte.weight": np.ones(2)},
            ["'transformer.wte.weight' and 'wte.weight' are the same tensor"],
        ),
        (
            {
                "more.weight": np.ones(2),
                H + "ln_1.bias": None,
                H + "ln_2.bias": NAN,
                "transformer.h.1.ln_1.bias": np.ones(9, np.float32),
            },
            ["missing tensors", "no place for", "not finite", "wrong shapes"],
        ),
    ],
)
def test_faults_of_tensors_come_in_one_error(folder, tensors, said):
    change(folder, **tensors)
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        xv.models.load(folder)
    for each in said:
        assert each in str(caught.value)


def truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def split(folder, **index):
    """Spreads the tensors over two files with an index."""
    found = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    where = {}
    for number, names in enumerate((list(found)[::2], list(found)[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: found[name] for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": where | index}))


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "there is no checkpoint at"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "no JSON object, got list"),
        (lambda f: (f / WEIGHTS).unlink(), "has no model.safetensors"),
        (pickled, "a pickle, which can run code.*\n.*\n.*weights_only=True"),
        (truncate, "model.safetensors is truncated or no safetensors file"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "is truncated or no safetensors"),
        (
            lambda f: split(f, a="b.safetensors"),
            "names b.safetensors, which is missing",
        ),
        (lambda f: split(f, a="model-0.safetensors"), "says 'a' is in model-0.*not"),
        (lambda f: split(f, a="../x.safetensors"), "which are no files"),
        (lambda f: configure(f, model_type="clip"), "'clip' is planned and not read"),
        (lambda f: configure(f, model_type="mamba"), "'mamba' .* is not among"),
        (lambda f: configure(f, architectures=["X"]), r"is \['X'\]; read are"),
        (lambda f: configure(f, n_embd="8"), "`n_embd` .* integer, got '8'"),
        (lambda f: configure(f, n_head=3), "`n_head` is 3, which does not divide .* 8"),
        (lambda f: configure(f, layer_norm_epsilon=-1), "positive number, got -1"),
        (lambda f: configure(f, activation_function="no"), "is 'no'; read are"),
        (lambda f: configure(f, add_cross_attention=True), "True; only False"),
    ],
)
def test_bad_folders(folder, spoil, said):
    spoil(folder)
    with pytest.raises(ValueError, match=f"(?s){said}"):
        xv.models.load(folder)


def test_files_without_an_index(folder):
    split(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"model-1.*and no model.safetensors.index"):
        xv.models.load(folder)
    (folder / "model-1.safetensors").rename(folder / "other.txt")
    with pytest.raises(ValueError, match=r"missing tensors.* more"):
        xv.models.load(folder)
    with pytest.raises(ValueError, match=r"a folder or a \.gguf file"):
        xv.models.load(folder / "config.json")


def test_many_files_are_one_checkpoint(folder):
    one = xv.models.load(folder)
    assert one.gives == "words"
    assert one.labels is None
    split(folder)
    configure(folder, transformers_version="6")
    many = xv.models.load(folder)
    for path, value in parameters(one).items():
        np.testing.assert_array_equal(value, parameters(many)[path])
    assert one.fingerprint == many.fingerprint
    configure(folder, layer_norm_epsilon=1e-4)
    assert xv.models.load(folder).fingerprint != one.fingerprint


def test_one_bit_changes_the_fingerprint(folder):
    before = xv.models.load(folder)
    bias = load_file(folder / WEIGHTS)[H + "ln_1.bias"]
    bias[3] = np.nextafter(bias[3], np.float32(9))
    change(folder, **{H + "ln_1.bias": bias})
    after = xv.models.load(folder)
    assert before.fingerprint != after.fingerprint
    # What is ignored, or there twice, changes nothing.
    change(folder, **{H + "attn.bias": np.tril(np.ones((10, 10), bool))})
    table = load_file(folder / WEIGHTS)["transformer.wte.weight"]
    change(folder, **{"lm_head.weight": table})
    again = xv.models.load(folder)
    assert after.fingerprint == again.fingerprint
    assert again.ignored["lm_head.weight"] == "a copy of 'wte.weight'"
    assert "a buffer" in again.ignored[H + "attn.bias"]


def test_weights_that_are_not_finite_may_be_allowed(folder):
    change(folder, **{H + "ln_1.bias": NAN})
    model = xv.models.load(folder, allow_nonfinite=True)
    np.testing.assert_array_equal(
        parameters(model)["layers/0/attention_norm/bias"], NAN
    )


@pytest.mark.parametrize("stored", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats_are_read(folder, stored):
    found = load_file(folder / WEIGHTS)
    change(folder, **{name: value.astype(stored) for name, value in found.items()})
    value = parameters(xv.models.load(folder))["words/embedding"]
    wanted = found["transformer.wte.weight"].astype(stored).astype(np.float32)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, wanted)


def test_bfloat16_has_float32_norms_and_softmax():
    model = xv.models.load(GOLDENS / NAME, dtype="bfloat16")
    dtypes = {path: value.dtype for path, value in parameters(model).items()}
    norms = {path for path, dtype in dtypes.items() if dtype == jnp.float32}
    assert norms == {path for path in dtypes if "norm" in path}
    assert set(dtypes.values()) == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    logits = model.explainable()(TOKENS)
    assert logits.dtype == jnp.bfloat16
    jaxpr = str(jax.make_jaxpr(model.module)(TOKENS))
    assert "exp" in jaxpr
    assert not [
        line for line in jaxpr.splitlines() if ":bf16" in line and " exp " in line
    ]
    exact = xv.models.load(GOLDENS / NAME).explainable()(TOKENS)
    np.testing.assert_allclose(logits.astype(jnp.float32), exact, atol=0.1)
    with pytest.raises(ValueError, match="'float32' or 'bfloat16', got 'int8'"):
        xv.models.load(GOLDENS / NAME, dtype="int8")  # pyright: ignore[reportArgumentType]


def test_sharded_loading_places_parts():
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    plain = xv.models.load(GOLDENS / NAME)
    split = xv.models.load(GOLDENS / NAME, sharding=mesh)
    table = parameters(split)["words/embedding"]
    assert table.shape == (24, 8)
    assert {part.data.shape for part in table.addressable_shards} == {(6, 8)}
    assert len({part.device for part in table.addressable_shards}) == 4
    assert split.fingerprint == plain.fingerprint
    np.testing.assert_array_equal(table, parameters(plain)["words/embedding"])
    forward, weights = split.functional()
    wanted = quick(plain.explainable())(TOKENS)
    np.testing.assert_allclose(quick(forward)(weights, TOKENS), wanted, atol=1e-5)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    for given in (whole, lambda path, shape: rows if path.startswith("w") else whole):
        placed = parameters(xv.models.load(GOLDENS / NAME, sharding=given))
        assert placed["words/embedding"].sharding == (whole if given is whole else rows)
        assert placed["norm/scale"].sharding == whole


def test_functional_keeps_parameters_as_arguments():
    model = xv.models.load(GOLDENS / NAME)
    forward, weights = model.functional(position=1)
    wanted = quick(model.module)(TOKENS)
    batch = np.stack([TOKENS, TOKENS + 1])
    stacked = quick(jax.vmap(forward, in_axes=(None, 0)))(weights, batch)
    np.testing.assert_allclose(stacked[0], wanted[1], atol=1e-5)
    # A batch padded to one length reads each text's own last token.
    padded = np.array([[5, 3, 9], [5, 3, 0]], np.int32)
    mask = np.array([[True, True, True], [True, True, False]])
    last = quick(jax.vmap(model.explainable()))(padded, mask)
    np.testing.assert_allclose(last, wanted[np.array([2, 1])], atol=1e-5)


def test_a_position_beyond_the_text_is_marked():
    states = jnp.arange(8.0).reshape(4, 2)
    mask = jnp.array([True, True, False, False])
    np.testing.assert_array_equal(layers.at(states, -1, mask), states[1])
    np.testing.assert_array_equal(layers.at(states, 0, mask), states[0])
    for position in (2, 3, -3):
        assert np.all(np.isnan(layers.at(states, position, mask)))


def test_options_are_checked():
    model = xv.models.load(GOLDENS / NAME)
    assert model.options == {"position": -1}
    with pytest.raises(ValueError, match=r"options \['position'\], got \['pool'\]"):
        model.explainable(pool=1)
    with pytest.raises(ValueError, match="from -3 to 2 for 3 tokens, got 3"):
        model.explainable(position=3)(TOKENS)
    with pytest.raises(ValueError, match="at most 10 tokens, got 11"):
        model.explainable()(np.zeros(11, np.int32))
    assert xv.models.load(GOLDENS / "bert_tokens").labels == (
        "LABEL_0",
        "LABEL_1",
        "LABEL_2",
    )


def test_a_mapping_must_cover_its_model():
    with pytest.raises(KeyError, match=r"do not both have.*there"):
        filling.plan({}, Mapping(tensors={"there": "x"}), {})


def test_every_architecture_is_a_package():
    for kind in registry.ARCHITECTURES:
        package = registry.find({"model_type": kind})
        assert {"configure", "build", "mapping", "output"} <= set(dir(package))


def test_the_library_waits_for_its_extras():
    code = (
        "import sys, xviz_jax; heavy = {'flax', 'safetensors', 'tokenizers', 'gguf'}; "
        "assert not heavy & set(sys.modules); "
        "sys.modules['safetensors'] = None; import xviz_jax.models as m; "
        "assert not (heavy - {'flax', 'safetensors'}) & set(sys.modules)\n"
        f"try: m.load({str(GOLDENS / NAME)!r})\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "need 'safetensors'" in done.stdout
    assert "pip install 'xviz-jax[models]'" in done.stdout
