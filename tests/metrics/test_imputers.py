"""What takes the place of what is taken away, and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.metrics import imputers

KEY = jax.random.key(0)
IMAGE = jax.random.normal(jax.random.key(1), (7, 5, 2))
KNOWN = jax.random.bernoulli(jax.random.key(2), 0.4, (7, 5, 2))
identity = lambda x: x
imputed = lambda imputer, x, present: imputer.prepare(identity, (x,), 0)(present, KEY)


@pytest.mark.parametrize(
    ("imputer", "expected"),
    [
        (imputers.baseline(), lambda x: 0 * x),
        (imputers.baseline(0.5), lambda x: 0 * x + 0.5),
        (imputers.mean((0, 1)), lambda x: x.mean((0, 1), keepdims=True) + 0 * x),
        (imputers.blur(2.0), xv.baselines.blur(2.0)),
        (
            imputers.custom(
                lambda x, present, key: jnp.where(present, x, -x), name="negated"
            ),
            lambda x: -x,
        ),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_what_is_present_stays(imputer, expected):
    found = imputed(imputer, IMAGE, KNOWN)
    with jax.numpy_rank_promotion("allow"):
        wanted = np.where(KNOWN, IMAGE, expected(IMAGE))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert not imputer.random


def solved(image, known):
    """The equations of the neighbours, by a dense solver in float64."""
    height, width = known.shape
    number = np.arange(height * width).reshape(height, width)
    matrix, right = np.eye(known.size), np.where(known, image, 0).ravel()
    for row in range(height):
        for column in range(width):
            if known[row, column]:
                continue
            own, total = number[row, column], 0.0
            for down in (-1, 0, 1):
                for aside in (-1, 0, 1):
                    other = row + down, column + aside
                    if (down, aside) == (0, 0) or min(other) < 0:
                        continue
                    if other[0] >= height or other[1] >= width:
                        continue
                    weight = 1 / 12 if down and aside else 1 / 6
                    matrix[own, number[other]] -= weight
                    total += weight
            matrix[own, own] = total
    return np.linalg.solve(matrix, right.astype(np.float64)).reshape(known.shape)


def test_noisy_linear_solves_its_equations():
    fill = jax.jit(lambda x, known: imputed(imputers.noisy_linear(0.0), x, known))
    # A large hole, too, in one of the channels.
    known = KNOWN.at[1:6, 1:5, 0].set(False)
    found = fill(IMAGE, known)
    for channel in range(2):
        wanted = solved(
            np.asarray(IMAGE)[..., channel], np.asarray(known)[..., channel]
        )
        np.testing.assert_allclose(found[..., channel], wanted, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(found)[known], np.asarray(IMAGE)[known])
    # Of nothing, the mean of each channel; of everything, the image.
    nothing = fill(IMAGE, jnp.zeros_like(known))
    means = jnp.broadcast_to(IMAGE.mean((0, 1), keepdims=True), IMAGE.shape)
    np.testing.assert_allclose(nothing, means, atol=1e-6)
    np.testing.assert_array_equal(fill(IMAGE, jnp.ones_like(known)), IMAGE)
    # Channels first.
    first = imputers.noisy_linear(0.0, axes=(1, 2))
    moved = imputed(first, jnp.moveaxis(IMAGE, 2, 0), jnp.moveaxis(known, 2, 0))
    np.testing.assert_allclose(jnp.moveaxis(moved, 0, 2), found, atol=1e-5)


def test_noise_is_on_what_was_taken_away():
    image, known = jnp.zeros((40, 40)), jnp.arange(40) % 2 == 0
    known = jnp.broadcast_to(known, (40, 40))
    found = np.asarray(imputed(imputers.noisy_linear(0.1), image, known))
    assert (found[known] == 0).all()
    assert 0.09 < found[~np.asarray(known)].std() < 0.11
    assert imputers.noisy_linear().random


TABLE = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
TOKENS, SEEN = jnp.array([2, 5, 1, 3]), jnp.array([1, 1, 1, 0])


def reader(tokens, mask):
    """Adds up the embeddings of the tokens that may be seen."""
    return jnp.sum(
        jnp.asarray(TABLE)[tokens] * mask[:, None].astype(jnp.float32), axis=0
    )


@pytest.mark.parametrize(
    ("imputer", "vector"),
    [
        (imputers.baseline(), np.zeros(4)),
        (imputers.baseline(xv.baselines.tokens(4)), TABLE[4]),
        (imputers.mask_token(4), TABLE[4]),
        (imputers.drop(1), np.zeros(4)),
    ],
    ids=["embeddings", "tokens", "mask_token", "drop"],
)
def test_tokens(imputer, vector):
    """One feature for each token; of integers too, the original is not touched."""
    scores = jnp.array([0.1, 0.3, 0.2, 0.0])
    measure = xv.metrics.deletion(reader, imputer=imputer)
    found = jax.jit(measure)(TOKENS, scores, SEEN, target=2)
    rows = TABLE[np.asarray(TOKENS)] * np.asarray(SEEN)[:, None]
    curve = [rows.sum(0)[2]]
    for place in (1, 2, 0, 3):
        rows[place] = vector * int(SEEN[place])
        curve.append(rows.sum(0)[2])
    np.testing.assert_allclose(found.details["curve"], curve, atol=1e-5)


def test_dropped_positions_are_dropped_whole():
    """Of floats, a position goes when all of its elements are absent."""
    model = lambda x, mask: jnp.sum(x * mask[:, None].astype(x.dtype), axis=0)
    x = jnp.asarray(TABLE[:4])
    measure = xv.metrics.deletion(
        model,
        imputer=imputers.drop(1),
        groups=lambda x: xv.patches(x.shape, (1,)),
    )
    found = measure(x, jnp.arange(4.0), jnp.ones(4, bool), target=0)
    expected = [TABLE[: 4 - n, 0].sum() for n in range(5)]
    np.testing.assert_allclose(found.details["curve"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("imputer", "given", "said"),
    [
        (
            imputers.noisy_linear(),
            (jnp.ones(3), jnp.arange(3.0)),
            "one image of floats",
        ),
        (
            imputers.drop(1),
            (TOKENS, jnp.arange(4.0), jnp.ones(3)),
            r"the mask has shape \(3,\), but the input has shape \(4,\)",
        ),
    ],
)
def test_wrong_imputers_are_refused(imputer, given, said):
    with pytest.raises(ValueError, match=said):
        xv.metrics.deletion(lambda x, *rest: jnp.ones(2), imputer=imputer)(
            *given, target=0, key=KEY
        )


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="`axes` are the two of a grid"):
        imputers.noisy_linear(axes=(0,))
    with pytest.raises(ValueError, match="`noise` is a standard deviation"):
        imputers.noisy_linear(-1.0)
