"""What must not be mistaken for attention, and what must be said not to be read.

The table holds `(name, build, kinds)`: `build` gives `(model, args)`, and `kinds` are
the kinds expected among attention-like sites, routers and unknown sites ("a|b" admits
both).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tests.tracing.cases import (
    BATCH,
    DIM,
    HEADS,
    LENGTH,
    WIDTH,
    normal,
    project,
    tokens,
    weights,
)

CASES = []
EXPERTS, CLASSES = 4, 5


def case(*kinds):
    def register(build):
        CASES.append((build.__name__, build, kinds))
        return build

    return register


def dense(x, w):
    return jnp.einsum("...e,ef->...f", x, w)


# Losses and readouts: a softmax over classes meets no values.


@case()
def classifier():
    def model(x, w):
        return jax.nn.softmax(dense(x.mean(1), w))

    return model, (tokens(), normal(2, WIDTH, CLASSES))


@case()
def tied_classifier():
    """The table that embeds the tokens reads them out again."""

    def model(table, ids):
        return jax.nn.softmax(jnp.tanh(table[ids]) @ table.T)

    return model, (normal(1, 9, WIDTH), jnp.array([[1, 4, 2], [8, 0, 3]]))


@case()
def cross_entropy_by_gather():
    def model(x, w, labels):
        logits = jax.nn.log_softmax(dense(x, w))
        return -jnp.take_along_axis(logits, labels[..., None], axis=-1).mean()

    labels = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % CLASSES
    return model, (tokens(), normal(2, WIDTH, CLASSES), labels)


def _cross_entropy(x, w, labels):
    targets = jax.nn.one_hot(labels, CLASSES)
    return -jnp.sum(targets * jax.nn.log_softmax(dense(x, w)), axis=-1).mean()


_LABELS = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % CLASSES


@case()
def cross_entropy_by_one_hot():
    return _cross_entropy, (tokens(), normal(2, WIDTH, CLASSES), _LABELS)


@case()
def cross_entropy_by_einsum():
    def model(x, w, labels):
        targets = jax.nn.one_hot(labels, CLASSES)
        return -jnp.einsum("btc,btc->bt", targets, jax.nn.log_softmax(dense(x, w)))

    return model, (tokens(), normal(2, WIDTH, CLASSES), _LABELS)


@case()
def cross_entropy_from_probabilities():
    def model(x, w, labels):
        p = jax.nn.softmax(dense(x, w))
        targets = jax.nn.one_hot(labels, CLASSES)
        return -jnp.log(jnp.sum(p * targets, axis=-1) + 1e-9).mean()

    return model, (tokens(), normal(2, WIDTH, CLASSES), _LABELS)


@case()
def cross_entropy_gradient():
    """Backwards, the probabilities do meet a matrix: the weights of the classes."""
    model = jax.grad(_cross_entropy, argnums=(0, 1))
    return model, (tokens(), normal(2, WIDTH, CLASSES), _LABELS)


@case()
def cross_entropy_of_optax():
    import optax

    def model(x, w, labels):
        logits = dense(x, w)
        whole = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return whole + optax.softmax_cross_entropy(logits, jax.nn.softmax(-logits))

    return model, (tokens(), normal(2, WIDTH, CLASSES), _LABELS)


@case()
def entropy():
    def model(x, w):
        p = jax.nn.softmax(dense(x, w))
        return -jnp.sum(p * jnp.log(p + 1e-9), axis=-1)

    return model, (tokens(), normal(2, WIDTH, CLASSES))


@case()
def entropy_by_einsum():
    def model(x, w):
        logits = jax.nn.log_softmax(dense(x, w))
        return -jnp.einsum("btc,btc->bt", jnp.exp(logits), logits)

    return model, (tokens(), normal(2, WIDTH, CLASSES))


@case()
def divergence():
    def model(x, student, teacher):
        p, q = (jax.nn.log_softmax(dense(x, w)) for w in (student, teacher))
        return jnp.sum(jnp.exp(q) * (q - p), axis=-1).mean()

    return model, (tokens(), normal(2, WIDTH, CLASSES), normal(3, WIDTH, CLASSES))


@case()
def expected_reward():
    """Policy gradient: probabilities times what each action is worth."""

    def model(x, policy, worth):
        return jnp.sum(jax.nn.softmax(dense(x, policy)) * dense(x, worth), axis=-1)

    return model, (tokens(), normal(2, WIDTH, CLASSES), normal(3, WIDTH, CLASSES))


@case()
def contrastive_loss():
    """Every image against every text, softmax over both; no values follow."""

    def model(images, texts):
        unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        logits = unit(images) @ unit(texts).T / 0.07
        rows = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
        columns = jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
        return -(rows + columns).mean() / 2

    return model, (normal(1, 4, WIDTH), normal(2, 4, WIDTH))


@case()
def attention_map_without_values():
    """A pointer network: the map itself is the answer."""

    def model(x, w):
        q, k, _ = project(x, w)
        return jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k)).mean(1)

    return model, (tokens(), weights())


# Normalisations and non-linearities: exponentials and sums of other kinds.


def _norm(x, axis):
    centred = x - x.mean(axis, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(axis, keepdims=True) + 1e-6)


def _pointwise(name, function):
    def build():
        def model(x, up, down):
            return x + dense(function(dense(_norm(x, -1), up)), down)

        return model, (tokens(), normal(2, WIDTH, 8), normal(3, 8, WIDTH))

    CASES.append((name, build, ()))


for _name, _function in {
    "gelu_tanh": jax.nn.gelu,
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "own_sigmoid": lambda x: 1 / (1 + jnp.exp(-x)),
    "own_tanh": lambda x: (jnp.exp(x) - jnp.exp(-x)) / (jnp.exp(x) + jnp.exp(-x)),
    "gaussian": lambda x: jnp.exp(-(x**2)),
    "gated": lambda x: jax.nn.silu(x) * jnp.flip(x, -1),
}.items():
    _pointwise(f"mlp_{_name}", _function)


@case()
def layer_normalisation():
    return lambda x, w: dense(_norm(x, -1), w), (tokens(), normal(2, WIDTH, WIDTH))


@case()
def batch_normalisation():
    return lambda x, w: dense(_norm(x, (0, 1)), w), (tokens(), normal(2, WIDTH, 4))


@case()
def group_normalisation():
    def model(x, w):
        groups = x.reshape(BATCH, LENGTH, 2, WIDTH // 2)
        return dense(_norm(groups, (1, 3)).reshape(x.shape), w)

    return model, (tokens(), normal(2, WIDTH, 4))


@case()
def root_mean_square_normalisation():
    def model(x, w):
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
        return dense(x, w)

    return model, (tokens(), normal(2, WIDTH, 4))


@case()
def sum_normalisation():
    """Positive scores divided by their sum, without an exponential."""

    def model(x, w):
        p = jnp.abs(x) / jnp.abs(x).sum(-1, keepdims=True)
        return dense(p, w)

    return model, (tokens(), normal(2, WIDTH, 4))


@case()
def variance_by_exponential():
    """A variational sample: exp of a log variance, added, not normalised."""

    def model(x, mean, variance, key):
        noise = jax.random.normal(key, (BATCH, LENGTH, 4))
        return dense(x, mean) + jnp.exp(0.5 * dense(x, variance)) * noise

    args = (normal(2, WIDTH, 4), normal(3, WIDTH, 4), jax.random.key(0))
    return model, (tokens(), *args)


# Linear attention has no probabilities.


@case()
def linear_attention():
    def model(x, w):
        q, k, v = project(x, w)
        q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
        state = jnp.einsum("bkhd,bkhe->bhde", k, v)
        total = jnp.einsum("bqhd,bhd->bqh", q, k.sum(1))
        return jnp.einsum("bqhd,bhde->bqhe", q, state) / total[..., None]

    return model, (tokens(), weights())


@case()
def linear_attention_with_exponential_features():
    """Performer: positive random features, exponentials that no sum divides."""

    def model(x, w, features):
        q, k, v = project(x, w)

        def phi(y):
            y = jnp.einsum("bthd,dm->bthm", y, features)
            return jnp.exp(y - 0.5 * jnp.square(y).sum(-1, keepdims=True))

        q, k = phi(q), phi(k)
        state = jnp.einsum("bkhm,bkhe->bhme", k, v)
        total = jnp.einsum("bqhm,bhm->bqh", q, k.sum(1))
        return jnp.einsum("bqhm,bhme->bqhe", q, state) / total[..., None]

    return model, (tokens(), weights(), normal(3, DIM, 7, scale=0.5))


@case()
def linear_attention_causal():
    def model(x, w):
        q, k, v = project(x, w)
        q, k = jax.nn.relu(q) + 0.1, jax.nn.relu(k) + 0.1

        def step(carry, inputs):
            state, total = carry
            q, k, v = inputs
            state = state + jnp.einsum("bhd,bhe->bhde", k, v)
            total = total + k
            out = jnp.einsum("bhd,bhde->bhe", q, state)
            return (state, total), out / jnp.sum(q * total, -1, keepdims=True)

        start = (
            jnp.zeros((BATCH, HEADS, DIM, DIM)),
            jnp.zeros((BATCH, HEADS, DIM)),
        )
        return lax.scan(step, start, tuple(y.swapaxes(0, 1) for y in (q, k, v)))[1]

    return model, (tokens(), weights())


@case("unknown")
def linear_attention_unnormalised():
    """Retention: a decayed product of queries and keys, and no softmax."""

    def model(x, w):
        q, k, v = project(x, w)
        gap = jnp.arange(1.0 * LENGTH)[:, None] - jnp.arange(1.0 * LENGTH)[None]
        decay = jnp.where(gap >= 0, jnp.exp(-0.1 * gap), 0.0)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * decay[None, None]
        return jnp.einsum("bhqk,bkhd->bqhd", s, v)

    return model, (tokens(), weights())


# Convolutions and recurrences.


@case()
def convolutions():
    def model(image, first, second, head):
        conv = functools.partial(
            lax.conv_general_dilated,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(conv(image, first))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        x = jax.nn.gelu(conv(x, second)).mean((1, 2))
        return jax.nn.softmax(dense(x, head))

    return model, (
        normal(1, BATCH, 6, 6, 3),
        normal(2, 3, 3, 3, 4),
        normal(3, 3, 3, 4, 5),
        normal(4, 5, CLASSES),
    )


@case()
def convolution_by_patches():
    def model(image, kernel):
        patches = lax.conv_general_dilated_patches(image, (2, 2), (2, 2), "VALID")
        return jax.nn.relu(jnp.einsum("bcij,cf->bijf", patches, kernel))

    return model, (normal(1, BATCH, 3, 4, 4), normal(2, 12, 5))


@case()
def gated_recurrence():
    def model(x, wx, wh):
        def step(h, x):
            gate, candidate = jnp.split(dense(x, wx) + dense(h, wh), 2, axis=-1)
            gate = jax.nn.sigmoid(gate)
            h = gate * h + (1 - gate) * jnp.tanh(candidate)
            return h, h

        return lax.scan(step, jnp.zeros((BATCH, 4)), x.swapaxes(0, 1))[1]

    return model, (tokens(), normal(2, WIDTH, 8), normal(3, 4, 8))


@case()
def state_space():
    """A diagonal recurrence with exponentials of learned rates."""

    def model(x, rate, inward, outward):
        decay = jnp.exp(-jnp.exp(rate))

        def step(h, x):
            h = h * decay[None] + dense(x, inward)
            return h, dense(h, outward)

        return lax.scan(step, jnp.zeros((BATCH, 4)), x.swapaxes(0, 1))[1]

    return model, (tokens(), normal(2, 4), normal(3, WIDTH, 4), normal(4, 4, WIDTH))


@case()
def mixing_by_tokens():
    """MLP-Mixer: tokens meet through fixed weights."""

    def model(x, first, second):
        x = x + jnp.einsum("bte,ts->bse", jax.nn.gelu(_norm(x, -1)), first)
        return x + dense(jax.nn.gelu(_norm(x, -1)), second)

    return model, (tokens(), normal(2, LENGTH, LENGTH), normal(3, WIDTH, WIDTH))


@case()
def sampled_tokens():
    def model(x, w, key):
        logits = dense(x, w)
        p = jnp.sort(jax.nn.softmax(logits), axis=-1, descending=True)
        mass = jnp.cumsum(p, axis=-1)
        return jax.random.categorical(key, jnp.where(mass < 0.9, logits, -1e9))

    return model, (tokens(), normal(2, WIDTH, CLASSES), jax.random.key(0))


# Mixtures of experts are routers.


def _experts(x, w):
    return jnp.einsum("bte,xef->btxf", x, w)


def _router_arguments():
    return tokens(), normal(2, WIDTH, EXPERTS), normal(3, EXPERTS, WIDTH, WIDTH)


@case("router")
def experts_all():
    def model(x, gate, w):
        p = jax.nn.softmax(dense(x, gate))
        return jnp.einsum("btx,btxf->btf", p, _experts(x, w))

    return model, _router_arguments()


@case("router")
def experts_all_by_multiply_and_sum():
    def model(x, gate, w):
        p = jax.nn.softmax(dense(x, gate))
        return jnp.sum(p[..., None] * jax.nn.gelu(_experts(x, w)), axis=-2)

    return model, _router_arguments()


@case("router|pooling")
def experts_all_of_one_example():
    """Without a token axis nothing tells experts from the keys of a pooling."""

    def model(x, gate, w):
        p = jax.nn.softmax(x @ gate)
        return p @ jnp.einsum("e,xef->xf", x, w)

    return model, (normal(1, WIDTH), *_router_arguments()[1:])


@case("router")
def experts_best_two():
    """Softmax, the best two kept and renormalised."""

    def model(x, gate, w):
        p = jax.nn.softmax(dense(x, gate))
        best = lax.top_k(p, 2)[0][..., -1:]
        p = jnp.where(p >= best, p, 0.0)
        p = p / p.sum(-1, keepdims=True)
        return jnp.einsum("btx,btxf->btf", p, _experts(x, w))

    return model, _router_arguments()


@case("router")
def experts_dispatched():
    """Switch: one-hot dispatch into experts, combined with the probability."""

    def model(x, gate, w):
        p = jax.nn.softmax(dense(x, gate))
        hot = jax.nn.one_hot(jnp.argmax(p, -1), EXPERTS)
        inward = jnp.einsum("btx,bte->xbte", hot, x)
        outward = jax.nn.relu(jnp.einsum("xbte,xef->xbtf", inward, w))
        return jnp.einsum("btx,xbtf->btf", p * hot, outward)

    return model, _router_arguments()


@case("router")
def experts_in_a_scan_over_layers():
    def model(x, gates, ws):
        def step(x, layer):
            gate, w = layer
            p = jax.nn.softmax(dense(x, gate))
            return x + jnp.einsum("btx,btxf->btf", p, _experts(x, w)), None

        return lax.scan(step, x, (gates, ws))[0]

    return model, (
        tokens(),
        normal(2, 3, WIDTH, EXPERTS),
        normal(3, 3, EXPERTS, WIDTH, WIDTH, scale=0.3),
    )


@case("attention", "router")
def experts_after_attention():
    """Both in one layer: each is what it is."""

    def model(x, w, gate, experts):
        q, k, v = project(x, w)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5)
        out = jnp.einsum("bhqk,bkhd->bqhd", a, v)
        x = x + jnp.einsum("bqhd,hde->bqe", out, w["o"])
        p = jax.nn.softmax(dense(x, gate))
        return x + jnp.einsum("btx,btxf->btf", p, _experts(x, experts))

    x, gate, experts = _router_arguments()
    return model, (x, weights(), gate, experts)


# Attention that cannot be read is unknown, with a reason; never zeros, never nothing.


@case("unknown")
def loop_of_unknown_length():
    def model(x, w, steps):
        def body(state):
            i, x = state
            q, k, v = project(x, w)
            a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5)
            out = jnp.einsum("bhqk,bkhd->bqhd", a, v)
            return i + 1, x + 0.1 * jnp.einsum("bqhd,hde->bqe", out, w["o"])

        return lax.while_loop(lambda s: s[0] < steps, body, (jnp.int32(0), x))[1]

    return model, (tokens(), weights(), jnp.int32(2))


@case("unknown")
def loop_until_converged():
    def model(x, w):
        def body(state):
            x, _ = state
            q, k, v = project(x, w)
            s = jnp.einsum("bqhd,bkhd->bhqk", q, k)
            out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v)
            new = 0.1 * jnp.einsum("bqhd,hde->bqe", out, w["o"])
            return new, jnp.abs(new - x).max()

        return lax.while_loop(lambda s: s[1] > 1e-3, body, (x, jnp.float32(1)))[0]

    return model, (tokens(), weights())


@case("unknown")
def online_softmax_over_key_blocks():
    """Blockwise attention: no block holds a normalised probability."""

    def model(x, w):
        q, k, v = project(x, w)
        blocks = tuple(
            jnp.moveaxis(y.reshape(BATCH, 3, 2, HEADS, DIM), 1, 0) for y in (k, v)
        )

        def step(carry, block):
            top, total, out = carry
            k, v = block
            s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5
            new = jnp.maximum(top, s.max(-1))
            e, shrink = jnp.exp(s - new[..., None]), jnp.exp(top - new)
            total = total * shrink + e.sum(-1)
            mixed = jnp.einsum("bhqk,bkhd->bhqd", e, v)
            return (new, total, out * shrink[..., None] + mixed), None

        shape = (BATCH, HEADS, 6)
        start = (
            jnp.full(shape, -jnp.inf),
            jnp.zeros(shape),
            jnp.zeros((*shape, DIM)),
        )
        (_, total, out), _ = lax.scan(step, start, blocks)
        return out / total[..., None]

    return model, (tokens(6), weights())
