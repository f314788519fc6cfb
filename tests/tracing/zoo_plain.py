"""Attention as people write it by hand with `jax.numpy`."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.tracing.cases import (
    BATCH,
    DIM,
    HEADS,
    LENGTH,
    SOURCE,
    WIDTH,
    attend,
    causal,
    merge,
    normal,
    normalise,
    project,
    registry,
    tokens,
    weights,
)

CASES, case = registry()
SCALE = DIM**-0.5


def explicit_layer(tap, x, w, source=None, **options):
    """The usual layer, for all the models below that compute just this."""
    return merge(attend(tap, *project(x, w, source), **options), w)


# Products in every axis order.


def _einsum(logits, mixed):
    def build():
        def model(x, w):
            q, k, v = project(x, w)
            s = jnp.einsum(f"bqhd,bkhd->{logits}", q * SCALE, k)
            a = jax.nn.softmax(s, axis=logits.index("k"))
            out = jnp.einsum(f"{logits},bkhd->{mixed}", a, v)
            return jnp.einsum(f"{mixed},hde->bqe", out, w["o"])

        return model, (tokens(), weights()), explicit_layer

    return build


for _logits, _mixed in (
    ("bhqk", "bqhd"),
    ("bhkq", "bhqd"),
    ("bqkh", "hdqb"),
    ("hbqk", "qbhd"),
    ("qkbh", "bqhd"),
    ("khqb", "dbqh"),
):
    case(f"einsum_{_logits}_{_mixed}")(_einsum(_logits, _mixed))


@case()
def cross_attention():
    def model(x, source, w):
        q, k, v = project(x, w, source)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    def explicit(tap, x, source, w):
        return explicit_layer(tap, x, w, source)

    return model, (tokens(), tokens(SOURCE, seed=2), weights()), explicit


@case()
def key_times_query():
    def model(x, w):
        q, k, v = project(x, w)
        s = jnp.einsum("bkhd,bqhd->bhqk", k, q) / jnp.sqrt(float(DIM))
        return merge(jnp.einsum("bkhd,bhqk->bqhd", v, jax.nn.softmax(s)), w)

    return model, (tokens(), weights()), explicit_layer


@case()
def matmul():
    def model(x, w):
        q, k, v = (y.transpose(0, 2, 1, 3) for y in project(x, w))
        a = jax.nn.softmax(q @ k.swapaxes(-1, -2) / DIM**0.5, axis=-1)
        return merge((a @ v).transpose(0, 2, 1, 3), w)

    return model, (tokens(), weights()), explicit_layer


@case()
def matmul_of_transposes():
    def model(x, w):
        q, k, v = (y.transpose(0, 2, 3, 1) for y in project(x, w))
        a = jax.nn.softmax(k.swapaxes(-1, -2) @ q * SCALE, axis=-2)
        return merge((v @ a).transpose(0, 3, 1, 2), w)

    return model, (tokens(), weights()), explicit_layer


@case()
def matmul_of_flat_projections():
    def model(x, wqkv, wo):
        qkv = (x @ jnp.broadcast_to(wqkv, (BATCH, *wqkv.shape))).reshape(
            BATCH, LENGTH, 3, HEADS, DIM
        )
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        q, k, v = (jnp.swapaxes(y, 1, 2) for y in (q, k, v))
        a = jax.nn.softmax(jnp.matmul(q, k.mT) * SCALE)
        out = jnp.matmul(a, v).swapaxes(1, 2).reshape(BATCH, LENGTH, -1)
        return jnp.tensordot(out, wo, 1)

    def explicit(tap, x, wqkv, wo):
        qkv = jnp.einsum("bte,ef->btf", x, wqkv)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        q, k, v = (y.reshape(BATCH, LENGTH, HEADS, DIM) for y in (q, k, v))
        return attend(tap, q, k, v).reshape(BATCH, LENGTH, -1) @ jnp.broadcast_to(
            wo, (BATCH, *wo.shape)
        )

    wqkv = normal(3, WIDTH, 3 * HEADS * DIM, scale=0.6)
    return model, (tokens(), wqkv, normal(4, HEADS * DIM, WIDTH)), explicit


@case()
def merged_batch_and_head():
    def model(x, w):
        def merged(y):
            return y.transpose(0, 2, 1, 3).reshape(BATCH * HEADS, LENGTH, DIM)

        q, k, v = (merged(y) for y in project(x, w))
        a = jax.nn.softmax(lax.batch_matmul(q, k.mT) * SCALE)
        out = lax.batch_matmul(a, v).reshape(BATCH, HEADS, LENGTH, DIM)
        return merge(out.swapaxes(1, 2), w)

    def explicit(tap, x, w):
        q, k, v = project(x, w)
        a = normalise(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        a = tap(a.reshape(BATCH * HEADS, LENGTH, LENGTH), "bqk")
        a = a.reshape(BATCH, HEADS, LENGTH, LENGTH)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    return model, (tokens(), weights()), explicit


@case()
def merged_batch_and_head_torch_layout():
    def model(x, w):
        def merged(y):  # [length, batch * head, dim]
            y = y.swapaxes(0, 1).reshape(LENGTH, BATCH * HEADS, DIM)
            return y.swapaxes(0, 1)

        q, k, v = (merged(y) for y in project(x, w))
        a = jax.nn.softmax(jnp.einsum("nqd,nkd->nqk", q * SCALE, k), axis=-1)
        out = jnp.einsum("nqk,nkd->nqd", a, v).swapaxes(0, 1)
        return merge(out.reshape(LENGTH, BATCH, HEADS, DIM).swapaxes(0, 1), w)

    return model, (tokens(), weights()), merged_batch_and_head()[2]


@case()
def single_head_without_head_axis():
    def model(x, w):
        q, k, v = (jnp.einsum("bte,ed->btd", x, w[n][:, 0]) for n in "qkv")
        a = jax.nn.softmax(q @ k.mT * SCALE)
        return (a @ v).sum(1)

    def explicit(tap, x, w):
        w = {n: w[n][:, :1] for n in "qkv"}
        return attend(tap, *project(x, w)).sum((1, 2))

    return model, (tokens(), weights()), explicit


@case()
def one_example_one_head():
    def model(x, wq, wk, wv):
        a = jax.nn.softmax((x @ wq) @ (x @ wk).T * SCALE)
        return a @ (x @ wv)

    def explicit(tap, x, wq, wk, wv):
        w = {"q": wq[:, None], "k": wk[:, None], "v": wv[:, None]}
        return attend(tap, *project(x[None], w))[0, :, 0]

    args = tuple(normal(i, WIDTH, DIM) for i in range(3))
    return model, (normal(5, LENGTH, WIDTH), *args), explicit


@case()
def one_example_many_heads():
    def model(x, w):
        q, k, v = (jnp.einsum("te,ehd->htd", x, w[n]) for n in "qkv")
        a = jax.nn.softmax(jnp.einsum("hqd,hkd->hqk", q * SCALE, k))
        return jnp.einsum("hqk,hkd,hde->qe", a, v, w["o"], optimize=False)

    def explicit(tap, x, w):
        return explicit_layer(tap, x[None], w)[0]

    return model, (normal(5, LENGTH, WIDTH), weights()), explicit


@case()
def raw_arguments():
    def model(q, k, v):
        a = jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", q, k) * SCALE)
        return jnp.einsum("bhqk,bhkd->bhqd", a, v)

    def explicit(tap, q, k, v):
        return attend(tap, *(y.swapaxes(1, 2) for y in (q, k, v))).swapaxes(1, 2)

    args = (
        normal(1, BATCH, HEADS, LENGTH, DIM),
        normal(2, BATCH, HEADS, SOURCE, DIM),
        normal(3, BATCH, HEADS, SOURCE, DIM),
    )
    return model, args, explicit


@case()
def raw_arguments_length_first():
    def model(q, k, v):
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        return jnp.einsum("bhqk,bkhd->bqhd", a, v)

    args = (
        normal(1, BATCH, LENGTH, HEADS, DIM),
        normal(2, BATCH, SOURCE, HEADS, DIM),
        normal(3, BATCH, SOURCE, HEADS, DIM),
    )
    return model, args, attend


@case(kinds=("attention",) * HEADS)
def one_site_per_head():
    def model(x, w):
        out = []
        for h in range(HEADS):
            q, k, v = (jnp.einsum("bte,ed->btd", x, w[n][:, h]) for n in "qkv")
            out.append(jax.nn.softmax(q @ k.mT * SCALE) @ v)
        return merge(jnp.stack(out, axis=2), w)

    def explicit(tap, x, w):
        q, k, v = project(x, w)
        out = [
            attend(tap, q[:, :, h : h + 1], k[:, :, h : h + 1], v[:, :, h : h + 1])
            for h in range(HEADS)
        ]
        return merge(jnp.concatenate(out, axis=2), w)

    return model, (tokens(), weights()), explicit


@case(kinds=("attention",) * 3)
def encoder_and_decoder():
    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)

    def layer(x, w, source=None, mask=None):
        q, k, v = project(norm(x), w, source)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
        if mask is not None:
            s = jnp.where(jnp.broadcast_to(mask, s.shape), s, -jnp.inf)
        a = jax.nn.softmax(s)
        x = x + merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)
        return x + jax.nn.gelu(norm(x))

    def model(x, source, encoder, decoder, cross):
        memory = norm(layer(source, encoder))
        x = layer(x, decoder, mask=causal())
        return jax.nn.log_softmax(layer(x, cross, memory))

    def explicit(tap, x, source, encoder, decoder, cross):
        def layer(x, w, source=None, mask=None):
            x = x + explicit_layer(tap, norm(x), w, source, mask=mask)
            return x + jax.nn.gelu(norm(x))

        memory = norm(layer(source, encoder))
        x = layer(x, decoder, mask=causal())
        return jnp.log(normalise(layer(x, cross, memory)))

    args = (tokens(), tokens(SOURCE, seed=2), *(weights(seed=s) for s in (1, 11, 21)))
    return model, args, explicit


# Masks and biases.


def _masked(apply, mask=None, **options):
    def build():
        def model(x, w, mask):
            q, k, v = project(x, w)
            s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
            return merge(jnp.einsum("bhqk,bkhd->bqhd", apply(s, mask), v), w)

        def explicit(tap, x, w, mask):
            return explicit_layer(tap, x, w, mask=mask)

        chosen = causal() if mask is None else mask()
        return model, (tokens(), weights(), chosen), explicit

    return build


def _key_padding():
    lengths = jnp.array([LENGTH, LENGTH - 2])
    return jnp.arange(LENGTH)[None, None, None] < lengths[:, None, None, None]


def _per_head():
    near = jnp.abs(jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)[None])
    return near[None, None] <= jnp.arange(HEADS)[None, :, None, None]


_MASKS = {
    "additive": lambda s, m: jax.nn.softmax(s + jnp.where(m, 0.0, -1e9)),
    "additive_infinite": lambda s, m: jax.nn.softmax(s + jnp.where(m, 0.0, -jnp.inf)),
    "additive_product": lambda s, m: jax.nn.softmax(
        s - 1e9 * (1.0 - m.astype(s.dtype))
    ),
    "boolean": lambda s, m: jax.nn.softmax(
        jnp.where(jnp.broadcast_to(m, s.shape), s, jnp.finfo(s.dtype).min)
    ),
    "boolean_negated": lambda s, m: jax.nn.softmax(
        jnp.where(jnp.broadcast_to(~m, s.shape), -1e30, s)
    ),
    "boolean_infinite": lambda s, m: jax.nn.softmax(
        jnp.where(jnp.broadcast_to(m, s.shape), s, -jnp.inf)
    ),
    "select": lambda s, m: jax.nn.softmax(
        lax.select(jnp.broadcast_to(m, s.shape), s, jnp.full_like(s, -1e10))
    ),
    "where_argument": lambda s, m: jax.nn.softmax(
        s, where=jnp.broadcast_to(m, s.shape)
    ),
    "before_and_after": lambda s, m: jnp.where(
        jnp.broadcast_to(m, s.shape),
        jax.nn.softmax(jnp.where(jnp.broadcast_to(m, s.shape), s, -1e30)),
        0.0,
    ),
    "inside_the_exponential": lambda s, m: (
        (e := jnp.where(jnp.broadcast_to(m, s.shape), jnp.exp(s), 0.0))
        / e.sum(-1, keepdims=True)
    ),
    "times_the_exponential": lambda s, m: (
        (e := jnp.exp(s - s.max(-1, keepdims=True)) * m.astype(s.dtype))
        / e.sum(-1, keepdims=True)
    ),
}
for _name, _apply in _MASKS.items():
    case(f"mask_{_name}")(_masked(_apply))
case("mask_key_padding")(_masked(_MASKS["boolean"], _key_padding))
case("mask_key_padding_where_argument")(_masked(_MASKS["where_argument"], _key_padding))
case("mask_per_head")(_masked(_MASKS["additive"], _per_head))


@case()
def mask_from_positions():
    def model(x, w, window):
        q, k, v = project(x, w)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
        rows = lax.broadcasted_iota(jnp.int32, s.shape, 2)
        columns = lax.broadcasted_iota(jnp.int32, s.shape, 3)
        inside = (columns <= rows) & (rows - columns < window)
        s = jnp.where(inside, s, -1e30)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v), w)

    def explicit(tap, x, w, window):
        gap = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)[None]
        mask = ((gap >= 0) & (gap < window))[None, None]
        return explicit_layer(tap, x, w, mask=mask)

    return model, (tokens(), weights(), jnp.int32(3)), explicit


@case()
def mask_of_segments():
    def model(x, w, segments):
        q, k, v = project(x, w)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
        same = segments[:, None, :, None] == segments[:, None, None, :]
        s += jnp.where(same, 0.0, -1e30)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v), w)

    def explicit(tap, x, w, segments):
        same = segments[:, None, :, None] == segments[:, None, None, :]
        return explicit_layer(tap, x, w, mask=same)

    segments = jnp.array([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    return model, (tokens(), weights(), segments), explicit


def _biased(name, bias, arguments, scale=SCALE):
    def model(x, w, *rest):
        q, k, v = project(x, w)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
        s = s + jnp.broadcast_to(bias(*rest), s.shape)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v), w)

    def explicit(tap, x, w, *rest):
        return explicit_layer(tap, x, w, bias=bias(*rest), scale=scale)

    case(name)(lambda: (model, (tokens(), weights(), *arguments()), explicit))


def _buckets():
    gap = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)[None]
    return jnp.where(gap > 0, 4, 0) + jnp.minimum(jnp.abs(gap), 3)


_biased(
    "bias_t5",
    lambda table: table[_buckets()].transpose(2, 0, 1)[None],
    lambda: (normal(7, 8, HEADS),),
    scale=1.0,
)
_biased(
    "bias_t5_one_hot",
    lambda table: jnp.einsum("qkn,nh->hqk", jax.nn.one_hot(_buckets(), 8), table)[None],
    lambda: (normal(7, 8, HEADS),),
    scale=1.0,
)
_biased(
    "bias_alibi",
    lambda: (
        -(2.0 ** -jnp.arange(1.0, HEADS + 1))[None, :, None, None]
        * jnp.abs(jnp.arange(5.0)[:, None] - jnp.arange(5.0)[None])[None, None]
    ),
    lambda: (),
)
_biased("bias_learned", lambda b: b, lambda: (normal(7, 1, HEADS, LENGTH, LENGTH),))


def _shift(s):
    """Relative positions to absolute keys, by padding and reshaping."""
    batch, heads, queries, _ = s.shape
    s = jnp.pad(s, ((0, 0), (0, 0), (0, 0), (1, 0)))
    s = s.reshape(batch, heads, s.shape[-1], queries)[:, :, 1:]
    return s.reshape(batch, heads, queries, -1)[..., :queries]


@case()
def bias_transformer_xl():
    def model(x, w, positions, wr, content, place):
        q, k, v = project(x, w)
        r = jnp.einsum("re,ehd->rhd", positions, wr)
        s = jnp.einsum("bqhd,bkhd->bhqk", q + content[None, None], k)
        s = s + _shift(jnp.einsum("bqhd,rhd->bhqr", q + place[None, None], r))
        a = jax.nn.softmax(s * SCALE)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    def explicit(tap, x, w, positions, wr, content, place):
        q, _, _ = project(x, w)
        r = jnp.einsum("re,ehd->rhd", positions, wr)
        rows, columns = jnp.indices((LENGTH, LENGTH))
        gathered = r[columns - rows + LENGTH - 1]
        place_term = jnp.einsum("bqhd,qkhd->bhqk", q + place[None, None], gathered)
        content_term = jnp.einsum("hd,bkhd->bhk", content, project(x, w)[1])
        bias = SCALE * (place_term + content_term[:, :, None])
        return explicit_layer(tap, x, w, bias=bias)

    args = (
        normal(3, 2 * LENGTH - 1, WIDTH),
        normal(4, WIDTH, HEADS, DIM, scale=0.5),
        normal(5, HEADS, DIM),
        normal(6, HEADS, DIM),
    )
    return model, (tokens(), weights(), *args), explicit


@case()
def bias_disentangled():
    """DeBERTa: content to content, content to position, position to content."""
    gap = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)[None] + LENGTH

    def model(x, w, positions):
        q, k, v = project(x, w)
        pq = jnp.einsum("re,ehd->rhd", positions, w["q"])
        pk = jnp.einsum("re,ehd->rhd", positions, w["k"])
        index = jnp.broadcast_to(gap, (BATCH, HEADS, LENGTH, LENGTH))
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        c2p = jnp.einsum("bqhd,rhd->bhqr", q, pk)
        p2c = jnp.einsum("bkhd,rhd->bhkr", k, pq)
        s += jnp.take_along_axis(c2p, index, axis=-1)
        s += jnp.take_along_axis(p2c, index, axis=-1).swapaxes(-1, -2)
        a = jax.nn.softmax(s * (3 * DIM) ** -0.5)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    def explicit(tap, x, w, positions):
        q, k, _ = project(x, w)
        pq = jnp.einsum("re,ehd->rhd", positions, w["q"])[gap]
        pk = jnp.einsum("re,ehd->rhd", positions, w["k"])[gap]
        bias = jnp.einsum("bqhd,qkhd->bhqk", q, pk)
        bias += jnp.einsum("bkhd,kqhd->bhqk", k, pq)
        scale = (3 * DIM) ** -0.5
        return explicit_layer(tap, x, w, bias=bias * scale, scale=scale)

    return model, (tokens(), weights(), normal(3, 2 * LENGTH, WIDTH)), explicit


# What happens to queries and keys before their product, and to the logits after.


def _rotate_halves(x):
    length, half = x.shape[1], x.shape[-1] // 2
    angle = jnp.arange(1.0 * length)[:, None] * 0.1 ** jnp.arange(1.0 * half)[None]
    sin, cos = jnp.sin(angle)[None, :, None], jnp.cos(angle)[None, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _rotate_pairs(x):
    length, half = x.shape[1], x.shape[-1] // 2
    angle = jnp.arange(1.0 * length)[:, None] * 0.1 ** jnp.arange(1.0 * half)[None]
    sin, cos = jnp.sin(angle)[None, :, None], jnp.cos(angle)[None, :, None]
    even, odd = x[..., ::2], x[..., 1::2]
    both = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return both.reshape(x.shape)


def _rotate_complex(x):
    length, half = x.shape[1], x.shape[-1] // 2
    angle = jnp.arange(1.0 * length)[:, None] * 0.1 ** jnp.arange(1.0 * half)[None]
    pairs = lax.complex(x[..., ::2], x[..., 1::2])
    pairs *= jnp.exp(1j * angle.astype(jnp.complex64))[None, :, None]
    return jnp.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def _root_mean_square(x):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _transformed(name, transform, reference=None, **options):
    def model(x, w):
        q, k, v = project(x, w)
        s = jnp.einsum("bqhd,bkhd->bhqk", transform(q), transform(k)) * SCALE
        return merge(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v), w)

    def explicit(tap, x, w):
        q, k, v = project(x, w)
        turn = reference or transform
        return merge(attend(tap, turn(q), turn(k), v), w)

    case(name, **options)(lambda: (model, (tokens(), weights()), explicit))


_transformed("rope_halves", _rotate_halves)
_transformed("rope_pairs", _rotate_pairs)
_transformed("rope_complex", _rotate_complex, _rotate_pairs)
_transformed("query_key_norm", _root_mean_square)


@case()
def cosine_attention():
    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def model(x, w, temperature):
        q, k, v = project(x, w)
        s = jnp.einsum("bqhd,bkhd->bhqk", unit(q), unit(k))
        s *= jnp.exp(jnp.minimum(temperature, 4.6))[None, :, None, None]
        return merge(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v), w)

    def explicit(tap, x, w, temperature):
        q, k, v = project(x, w)
        q = unit(q) * jnp.exp(temperature)[None, None, :, None]
        return merge(attend(tap, q, unit(k), v, scale=1.0), w)

    return model, (tokens(), weights(), jnp.array([0.1, 0.5, 1.0])), explicit


@case()
def soft_cap():
    def model(x, w):
        q, k, v = project(x, w)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
        s = 2.0 * jnp.tanh(s / 2.0)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v), w)

    def explicit(tap, x, w):
        return explicit_layer(tap, x, w, cap=2.0)

    return model, (tokens(), weights()), explicit


@case()
def soft_cap_then_mask():
    def model(x, w):
        q, k, v = project(x, w)
        s = 2.0 * jnp.tanh(jnp.einsum("bqhd,bkhd->bhqk", q * SCALE, k) / 2.0)
        s = jnp.where(jnp.broadcast_to(causal(), s.shape), s, -2.3819763e38)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v), w)

    def explicit(tap, x, w):
        return explicit_layer(tap, x, w, cap=2.0, mask=causal())

    return model, (tokens(), weights()), explicit


# Fewer keys and values than queries.


@case()
def grouped_heads():
    def model(x, w):
        q, k, v = project(x, w)
        q = q.reshape(BATCH, LENGTH, 2, 2, DIM)
        a = jax.nn.softmax(jnp.einsum("bqhgd,bkhd->bhgqk", q, k) * SCALE)
        out = jnp.einsum("bhgqk,bkhd->bqhgd", a, v)
        return merge(out.reshape(BATCH, LENGTH, 4, DIM), w)

    return model, (tokens(), weights(heads=4, kv_heads=2)), explicit_layer


@case()
def grouped_heads_group_first():
    """Groups outside the kv heads in memory; canonical order is kv-major."""

    def model(x, w):
        q, k, v = project(x, w)
        q = q.reshape(BATCH, LENGTH, 3, 2, DIM)
        a = jax.nn.softmax(jnp.einsum("bqghd,bkhd->bghqk", q, k) * SCALE)
        out = jnp.einsum("bghqk,bkhd->bqghd", a, v)
        return merge(out.reshape(BATCH, LENGTH, 6, DIM), w)

    def explicit(tap, x, w):
        q, k, v = project(x, w)
        q = q.reshape(BATCH, LENGTH, 3, 2, DIM)
        a = normalise(jnp.einsum("bqghd,bkhd->bhgqk", q, k) * SCALE)
        out = jnp.einsum("bhgqk,bkhd->bqghd", tap(a, "bhgqk"), v)
        return merge(out.reshape(BATCH, LENGTH, 6, DIM), w)

    return model, (tokens(), weights(heads=6, kv_heads=2)), explicit


@case()
def repeated_heads():
    def model(x, w):
        q, k, v = project(x, w)
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    return model, (tokens(), weights(heads=4, kv_heads=2)), explicit_layer


@case()
def repeated_heads_by_broadcasting():
    def model(x, w):
        q, k, v = (y.swapaxes(1, 2) for y in project(x, w))

        def repeat(y):
            y = jnp.broadcast_to(y[:, :, None], (BATCH, 2, 2, LENGTH, DIM))
            return y.reshape(BATCH, 4, LENGTH, DIM)

        a = jax.nn.softmax(q @ repeat(k).mT * SCALE)
        return merge((a @ repeat(v)).swapaxes(1, 2), w)

    return model, (tokens(), weights(heads=4, kv_heads=2)), explicit_layer


@case()
def multi_query():
    def model(x, w):
        q, k, v = project(x, w)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) * SCALE)
        return merge(jnp.einsum("bhqk,bkd->bqhd", a, v[:, :, 0]), w)

    return model, (tokens(), weights(kv_heads=1)), explicit_layer


@case()
def multi_query_grouped():
    def model(x, w):
        q, k, v = project(x, w)
        a = jax.nn.softmax(
            jnp.einsum("bqhgd,bkhd->bhgqk", q[:, :, None] * SCALE, k), axis=-1
        )
        out = jnp.einsum("bhgqk,bkhd->bqhgd", a, v)
        return merge(out[:, :, 0], w)

    return model, (tokens(), weights(kv_heads=1)), explicit_layer


@case()
def latent_attention():
    """MLA: content and rotary parts of the product, keys and values from a latent."""
    rank, rotary = 3, 2

    def model(x, wq, wqr, down, wkr, uk, uv, wo):
        latent = jnp.einsum("bte,er->btr", x, down)
        q, qr = (jnp.einsum("bte,ehd->bthd", x, y) for y in (wq, wqr))
        kr = jnp.einsum("bte,ed->btd", x, wkr)
        k, v = (jnp.einsum("btr,rhd->bthd", latent, y) for y in (uk, uv))
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        s += jnp.einsum("bqhd,bkd->bhqk", _rotate_halves(qr), kr)
        a = jax.nn.softmax(s * (DIM + rotary) ** -0.5)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), {"o": wo})

    def explicit(tap, x, wq, wqr, down, wkr, uk, uv, wo):
        latent = jnp.einsum("bte,er->btr", x, down)
        q, qr = (jnp.einsum("bte,ehd->bthd", x, y) for y in (wq, wqr))
        q = jnp.concatenate([q, _rotate_halves(qr)], axis=-1)
        kr = jnp.einsum("bte,ed->btd", x, wkr)[:, :, None]
        kr = jnp.broadcast_to(kr, (BATCH, LENGTH, HEADS, rotary))
        k = jnp.concatenate([jnp.einsum("btr,rhd->bthd", latent, uk), kr], axis=-1)
        v = jnp.einsum("btr,rhd->bthd", latent, uv)
        return merge(attend(tap, q, k, v), {"o": wo})

    args = (
        normal(3, WIDTH, HEADS, DIM),
        normal(4, WIDTH, HEADS, rotary),
        normal(5, WIDTH, rank, scale=0.5),
        normal(6, WIDTH, rotary, scale=0.5),
        normal(7, rank, HEADS, DIM),
        normal(8, rank, HEADS, DIM),
        normal(9, HEADS, DIM, WIDTH),
    )
    return model, (tokens(), *args), explicit


@case()
def latent_attention_concatenated():
    rank, rotary = 3, 2

    def model(x, wq, down, wkr, uk, uv, wo):
        latent = jnp.einsum("bte,er->btr", x, down)
        q = jnp.einsum("bte,ehd->bthd", x, wq)
        q = jnp.concatenate([q[..., :DIM], _rotate_halves(q[..., DIM:])], axis=-1)
        kr = jnp.einsum("bte,ed->btd", x, wkr)[:, :, None]
        kr = jnp.broadcast_to(kr, (BATCH, LENGTH, HEADS, rotary))
        k = jnp.einsum("btr,rhd->bthd", latent, uk)
        k = jnp.concatenate([k, _rotate_halves(kr)], axis=-1)
        v = jnp.einsum("btr,rhd->bthd", latent, uv)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), {"o": wo})

    def explicit(tap, x, wq, down, wkr, uk, uv, wo):
        latent = x @ jnp.broadcast_to(down, (BATCH, *down.shape))
        q = jnp.einsum("bte,ehd->bthd", x, wq)
        kr = _rotate_halves(jnp.einsum("bte,ed->btd", x, wkr)[:, :, None])
        rotated = _rotate_halves(q[..., DIM:])
        bias = jnp.einsum("bqhd,bkd->bhqk", rotated, kr[:, :, 0])
        k, v = (jnp.einsum("btr,rhd->bthd", latent, y) for y in (uk, uv))
        out = attend(tap, q[..., :DIM], k, v, bias=bias, scale=1.0)
        return merge(out, {"o": wo})

    args = (
        normal(3, WIDTH, HEADS, DIM + rotary, scale=0.5),
        normal(5, WIDTH, rank, scale=0.5),
        normal(6, WIDTH, rotary, scale=0.5),
        normal(7, rank, HEADS, DIM),
        normal(8, rank, HEADS, DIM),
        normal(9, HEADS, DIM, WIDTH),
    )
    return model, (tokens(), *args), explicit


@case()
def latent_attention_absorbed():
    """MLA as it decodes: the latent itself is both key and value of every head."""
    rank = 3

    def model(x, wq, down, uk, uv, wo):
        latent = jnp.einsum("bte,er->btr", x, down)
        q = jnp.einsum("bte,ehd->bthd", x, wq)
        q = jnp.einsum("bthd,rhd->bthr", q, uk)
        a = jax.nn.softmax(jnp.einsum("bqhr,bkr->bhqk", q, latent) * SCALE)
        out = jnp.einsum("bhqk,bkr->bqhr", a, latent)
        return merge(jnp.einsum("bqhr,rhd->bqhd", out, uv), {"o": wo})

    def explicit(tap, x, wq, down, uk, uv, wo):
        latent = jnp.einsum("bte,er->btr", x, down)
        k, v = (jnp.einsum("btr,rhd->bthd", latent, y) for y in (uk, uv))
        q = jnp.einsum("bte,ehd->bthd", x, wq)
        return merge(attend(tap, q, k, v), {"o": wo})

    args = (
        normal(3, WIDTH, HEADS, DIM),
        normal(5, WIDTH, rank, scale=0.5),
        normal(7, rank, HEADS, DIM),
        normal(8, rank, HEADS, DIM),
        normal(9, HEADS, DIM, WIDTH),
    )
    return model, (tokens(), *args), explicit


# Queries and keys on grids.


def _windows(x, side=2):
    batch, height, width, *rest = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, *rest)
    return jnp.swapaxes(x, 2, 3).reshape(-1, side * side, *rest)


@case()
def swin_windows():
    def model(image, w, table):
        shifted = jnp.roll(image, (-1, -1), axis=(1, 2))
        x = _windows(shifted)
        q, k, v = project(x, w)
        rows, columns = jnp.divmod(jnp.arange(4), 2)
        index = 3 * (rows[:, None] - rows[None] + 1)
        index += columns[:, None] - columns[None] + 1
        bias = table[index.reshape(-1)].reshape(4, 4, HEADS).transpose(2, 0, 1)
        regions = jnp.array([0, 0, 1, 2])
        regions = 3 * regions[:, None] + regions[None]
        regions = _windows(regions[None])
        apart = regions[:, :, None] != regions[:, None]
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE + bias[None]
        s = s.reshape(BATCH, 4, HEADS, 4, 4)
        s = s + jnp.where(apart, -100.0, 0.0)[None, :, None]
        a = jax.nn.softmax(s.reshape(-1, HEADS, 4, 4), axis=-1)
        out = merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)
        out = out.reshape(BATCH, 2, 2, 2, 2, WIDTH).swapaxes(2, 3)
        return jnp.roll(out.reshape(image.shape), (1, 1), axis=(1, 2))

    def explicit(tap, image, w, table):
        rolled = jnp.roll(image, (-1, -1), axis=(1, 2))
        x = jnp.stack(
            [
                rolled[b, r : r + 2, c : c + 2].reshape(4, WIDTH)
                for b in range(BATCH)
                for r in (0, 2)
                for c in (0, 2)
            ]
        )
        bias = jnp.stack(
            [
                jnp.stack(
                    [
                        table[3 * (q // 2 - k // 2 + 1) + q % 2 - k % 2 + 1]
                        for k in range(4)
                    ]
                )
                for q in range(4)
            ]
        ).transpose(2, 0, 1)
        region = [0, 0, 1, 2]
        apart = [
            [
                [
                    (region[r + q // 2], region[c + q % 2])
                    != (region[r + k // 2], region[c + k % 2])
                    for k in range(4)
                ]
                for q in range(4)
            ]
            for r in (0, 2)
            for c in (0, 2)
        ]
        apart = jnp.tile(jnp.where(jnp.array(apart), -100.0, 0.0), (BATCH, 1, 1))
        out = explicit_layer(tap, x, w, bias=bias[None] + apart[:, None])
        image = jnp.zeros_like(image)
        for i, window in enumerate(out):
            b, r, c = i // 4, i // 2 % 2 * 2, i % 2 * 2
            image = image.at[b, r : r + 2, c : c + 2].set(window.reshape(2, 2, WIDTH))
        return jnp.roll(image, (1, 1), axis=(1, 2))

    args = (normal(1, BATCH, 4, 4, WIDTH), weights(), normal(2, 9, HEADS))
    return model, args, explicit


@case()
def window_axis_kept():
    """Two batch-like axes, which the canonical order merges."""

    def model(x, w):
        x = x.reshape(BATCH, 3, 2, WIDTH)
        q, k, v = (jnp.einsum("bwte,ehd->bwthd", x, w[n]) for n in "qkv")
        a = jax.nn.softmax(jnp.einsum("bwqhd,bwkhd->bwhqk", q, k) * SCALE)
        out = jnp.einsum("bwhqk,bwkhd->bwqhd", a, v)
        return merge(out.reshape(BATCH, 6, HEADS, DIM), w)

    def explicit(tap, x, w):
        x = x.reshape(BATCH * 3, 2, WIDTH)
        return explicit_layer(tap, x, w).reshape(BATCH, 6, WIDTH)

    return model, (tokens(6), weights()), explicit


@case(kinds=("attention", "attention"))
def axial_attention():
    def model(image, w):
        q, k, v = (jnp.einsum("brce,ehd->brchd", image, w[n]) for n in "qkv")
        a = jax.nn.softmax(jnp.einsum("brqhd,brkhd->brhqk", q, k) * SCALE)
        rows = jnp.einsum("brhqk,brkhd->brqhd", a, v)
        a = jax.nn.softmax(jnp.einsum("bqchd,bkchd->bchqk", q, k) * SCALE)
        columns = jnp.einsum("bchqk,bkchd->bqchd", a, v)
        return jnp.einsum("brchd,hde->brce", rows + columns, w["o"])

    def explicit(tap, image, w):
        def along(image):
            out = explicit_layer(tap, image.reshape(-1, image.shape[2], WIDTH), w)
            return out.reshape(image.shape)

        return along(image) + along(image.swapaxes(1, 2)).swapaxes(1, 2)

    return model, (normal(1, BATCH, 3, 4, WIDTH), weights()), explicit


@case()
def blocks_and_their_neighbours():
    """Each block of queries sees its own and the previous block of keys."""

    def model(x, w):
        q, k, v = (y.reshape(BATCH, 3, 2, HEADS, DIM) for y in project(x, w))
        k, v = (jnp.concatenate([jnp.roll(y, 1, axis=1), y], axis=2) for y in (k, v))
        s = jnp.einsum("bnqhd,bnkhd->bnhqk", q * SCALE, k)
        first = (jnp.arange(3)[:, None] == 0) & (jnp.arange(4)[None] < 2)
        s = jnp.where(jnp.broadcast_to(first[None, :, None, None], s.shape), -1e9, s)
        out = jnp.einsum("bnhqk,bnkhd->bnqhd", jax.nn.softmax(s), v)
        return merge(out.reshape(BATCH, 6, HEADS, DIM), w)

    def explicit(tap, x, w):
        q, k, v = project(x, w)
        keys = [jnp.array(y) for y in ([4, 5, 0, 1], [0, 1, 2, 3], [2, 3, 4, 5])]
        maps = []
        for n in range(3):
            rows = q[:, 2 * n : 2 * n + 2]
            s = jnp.einsum("bqhd,bkhd->bhqk", rows, k[:, keys[n]]) * SCALE
            s = s.at[..., :2].set(-1e9) if n == 0 else s
            maps.append(normalise(s))
        maps = tap(jnp.stack(maps, axis=1), "bchqk")
        out = [
            jnp.einsum("bhqk,bkhd->bqhd", maps[:, n], v[:, keys[n]]) for n in range(3)
        ]
        return merge(jnp.concatenate(out, axis=1), w)

    return model, (tokens(6), weights()), explicit


@case()
def keys_on_a_grid():
    """Normalised over two axes at once, which are merged into the key axis."""

    def model(x, image, w):
        q = jnp.einsum("bte,ehd->bthd", x, w["q"])
        k, v = (jnp.einsum("brce,ehd->brchd", image, w[n]) for n in "kv")
        s = jnp.einsum("bqhd,brchd->bhqrc", q, k) * SCALE
        a = jax.nn.softmax(s, axis=(-2, -1))
        return merge(jnp.einsum("bhqrc,brchd->bqhd", a, v), w)

    def explicit(tap, x, image, w):
        return explicit_layer(tap, x, w, image.reshape(BATCH, -1, WIDTH))

    return model, (tokens(), normal(2, BATCH, 2, 3, WIDTH), weights()), explicit


# The normalisation, in every algebraic form.


def _logsumexp(s):
    top = s.max(-1, keepdims=True)
    return top + jnp.log(jnp.exp(s - top).sum(-1, keepdims=True))


_SOFTMAXES = {
    "repeated_exponential": lambda s: jnp.exp(s) / jnp.exp(s).sum(-1, keepdims=True),
    "shared_exponential": lambda s: (e := jnp.exp(s)) / e.sum(-1, keepdims=True),
    "max_subtracted": normalise,
    "max_stopped": lambda s: (
        (e := jnp.exp(s - lax.stop_gradient(s.max(-1, keepdims=True))))
        / e.sum(-1, keepdims=True)
    ),
    "global_max": lambda s: (
        (e := jnp.exp(s - s.max())) / jnp.sum(e, axis=-1, keepdims=True)
    ),
    "reciprocal": lambda s: (
        (e := jnp.exp(s - s.max(-1, keepdims=True))) * (1.0 / e.sum(-1, keepdims=True))
    ),
    "power": lambda s: (
        (e := jnp.exp(s - s.max(-1, keepdims=True))) * e.sum(-1, keepdims=True) ** -1
    ),
    "expanded_sum": lambda s: (
        (e := jnp.exp(s - s.max(-1)[..., None])) / e.sum(-1)[..., None]
    ),
    "sum_by_einsum": lambda s: (
        (e := jnp.exp(s)) / jnp.einsum("bhqk->bhq", e)[..., None]
    ),
    "epsilon": lambda s: (e := jnp.exp(s)) / (e.sum(-1, keepdims=True) + 1e-9),
    "clamped_sum": lambda s: (
        (e := jnp.exp(s)) / jnp.maximum(e.sum(-1, keepdims=True), 1e-9)
    ),
    "base_two": lambda s: (
        (e := jnp.exp2(s * 1.4426950408889634)) / e.sum(-1, keepdims=True)
    ),
    "exp_of_log_softmax": lambda s: jnp.exp(jax.nn.log_softmax(s)),
    "exp_minus_logsumexp": lambda s: jnp.exp(
        s - jax.nn.logsumexp(s, axis=-1, keepdims=True)
    ),
    "exp_minus_scipy_logsumexp": lambda s: jnp.exp(
        s - jax.scipy.special.logsumexp(s, axis=-1)[..., None]
    ),
    "exp_minus_own_logsumexp": lambda s: jnp.exp(s - _logsumexp(s)),
    "exp_minus_log_of_sum": lambda s: jnp.exp(
        s - jnp.log(jnp.sum(jnp.exp(s), axis=-1, keepdims=True))
    ),
    "exp_of_own_log_softmax": lambda s: jnp.exp(
        (shifted := s - s.max(-1, keepdims=True))
        - jnp.log(jnp.exp(shifted).sum(-1, keepdims=True))
    ),
    "max_stopped_repeated": lambda s: (
        jnp.exp(s - lax.stop_gradient(s.max(-1, keepdims=True)))
        / jnp.exp(s - lax.stop_gradient(s.max(-1, keepdims=True))).sum(
            -1, keepdims=True
        )
    ),
    "transposed": lambda s: jax.nn.softmax(s.swapaxes(-1, -2), axis=-2).swapaxes(
        -1, -2
    ),
    "flat_rows": lambda s: jax.nn.softmax(s.reshape(-1, s.shape[-1])).reshape(s.shape),
    "named_scope": jax.named_scope("probabilities")(jax.nn.softmax),
}


def _normalised(softmax):
    def build():
        def model(x, w):
            q, k, v = project(x, w)
            a = softmax(jnp.einsum("bqhd,bkhd->bhqk", q * SCALE, k))
            return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

        return model, (tokens(), weights()), explicit_layer

    return build


for _name, _softmax in _SOFTMAXES.items():
    case(f"softmax_{_name}")(_normalised(_softmax))


_ONE_MORE = {
    "plus_one": lambda s: (e := jnp.exp(s)) / (1.0 + e.sum(-1, keepdims=True)),
    "plus_one_max_subtracted": lambda s: (
        (e := jnp.exp(s - (top := jnp.maximum(s.max(-1, keepdims=True), 0.0))))
        / (e.sum(-1, keepdims=True) + jnp.exp(-top))
    ),
    "plus_one_by_padding": lambda s: jax.nn.softmax(
        jnp.pad(s, ((0, 0), (0, 0), (0, 0), (0, 1)))
    )[..., :-1],
}


def _one_more(softmax):
    def build():
        def model(x, w):
            q, k, v = project(x, w)
            a = softmax(jnp.einsum("bqhd,bkhd->bhqk", q * SCALE, k))
            return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

        def explicit(tap, x, w):
            q, k, v = project(x, w)
            e = jnp.exp(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
            a = tap(e / (1 + e.sum(-1, keepdims=True)))
            return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

        return model, (tokens(), weights()), explicit

    return build


for _name, _softmax in _ONE_MORE.items():
    case(f"softmax_{_name}")(_one_more(_softmax))


def _sink_concatenated(s, sink):
    s = jnp.concatenate([s, jnp.broadcast_to(sink, (*s.shape[:-1], 1))], axis=-1)
    return jax.nn.softmax(s)[..., :-1]


def _sink_first(s, sink):
    s = jnp.concatenate([jnp.broadcast_to(sink, (*s.shape[:-1], 1)), s], axis=-1)
    return jax.nn.softmax(s)[..., 1:]


def _sink_in_the_sum(s, sink):
    top = jnp.maximum(s.max(-1, keepdims=True), jnp.max(sink))
    e = jnp.exp(s - top)
    return e / (e.sum(-1, keepdims=True) + jnp.exp(sink - top))


def _sink_in_the_logsumexp(s, sink):
    total = jax.nn.logsumexp(s, axis=-1, keepdims=True)
    return jnp.exp(s - jnp.logaddexp(total, jnp.broadcast_to(sink, total.shape)))


def _sunk(softmax):
    def build():
        def model(x, w, sink):
            q, k, v = project(x, w)
            s = jnp.einsum("bqhd,bkhd->bhqk", q * SCALE, k)
            a = softmax(s, sink[None, :, None, None])
            return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

        def explicit(tap, x, w, sink):
            q, k, v = project(x, w)
            e = jnp.exp(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
            a = e / (jnp.exp(sink)[None, :, None, None] + e.sum(-1, keepdims=True))
            return merge(jnp.einsum("bhqk,bkhd->bqhd", tap(a), v), w)

        return model, (tokens(), weights(), normal(3, HEADS)), explicit

    return build


for _softmax in (
    _sink_concatenated,
    _sink_first,
    _sink_in_the_sum,
    _sink_in_the_logsumexp,
):
    case(_softmax.__name__.removeprefix("_"))(_sunk(_softmax))


@case()
def sink_key_and_value():
    """A learned key with a zero value, joined to the others before the product."""

    def model(x, w, key):
        q, k, v = project(x, w)
        key = jnp.broadcast_to(key, (BATCH, 1, HEADS, DIM))
        k = jnp.concatenate([key, k], axis=1)
        v = jnp.pad(v, ((0, 0), (1, 0), (0, 0), (0, 0)))
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    def explicit(tap, x, w, key):
        q, k, v = project(x, w)
        k = jnp.concatenate([jnp.stack([key[0]] * BATCH), k], axis=1)
        v = jnp.concatenate([jnp.zeros_like(v[:, :1]), v], axis=1)
        return merge(attend(tap, q, k, v), w)

    return model, (tokens(), weights(), normal(3, 1, 1, HEADS, DIM)), explicit


# Division after the product with the values.


def _deferred(divide, dtype=jnp.float32):
    def build():
        def model(x, w):
            q, k, v = project(x, w)
            s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * jnp.asarray(SCALE, dtype)
            e = jnp.exp(s - lax.stop_gradient(s.max(-1, keepdims=True)))
            out = jnp.einsum("bhqk,bkhd->bqhd", e, v)
            return merge(divide(out, e), w)

        args = (tokens(dtype=dtype), weights(dtype=dtype))
        return model, args, explicit_layer

    return build


def _divide(out, e):
    return out / jnp.einsum("bhqk->bqh", e)[..., None]


def _divide_moved(out, e):
    return out / jnp.moveaxis(e.sum(-1, keepdims=True), 1, 2)


def _divide_reciprocal(out, e):
    return out * jnp.reciprocal(e.sum(-1)).swapaxes(1, 2)[..., None]


def _divide_clamped(out, e):
    return out / jnp.maximum(e.sum(-1).swapaxes(1, 2)[..., None], 1e-9)


case("deferred_division")(_deferred(_divide))
case("deferred_division_moved")(_deferred(_divide_moved))
case("deferred_division_reciprocal")(_deferred(_divide_reciprocal))
case("deferred_division_clamped")(_deferred(_divide_clamped))
case("deferred_division_bf16", tolerance=3e-2, bitwise=False)(
    _deferred(_divide_moved, jnp.bfloat16)
)


@case()
def deferred_division_masked_and_grouped():
    """In the manner of MaxText: grouped heads, unnormalised product, division last."""

    def model(x, w):
        q, k, v = project(x, w)
        q = q.reshape(BATCH, LENGTH, 2, 2, DIM)
        s = jnp.einsum("btkgd,bskd->bkgts", q, k)
        seen = jnp.broadcast_to(causal()[:, :, None], s.shape)
        s = jnp.where(seen, s, -0.7 * jnp.finfo(s.dtype).max)
        top = jnp.max(s, axis=-1, keepdims=True)
        e = jnp.exp(s - top)
        total = jnp.sum(e, axis=-1, keepdims=True)
        total = jnp.moveaxis(total, -2, 1).reshape(BATCH, LENGTH, 4, 1)
        out = jnp.einsum("bkgts,bskd->btkgd", e, v).reshape(BATCH, LENGTH, 4, DIM)
        return merge(out / total, w)

    def explicit(tap, x, w):
        return explicit_layer(tap, x, w, mask=causal(), scale=1.0)

    return model, (tokens(), weights(heads=4, kv_heads=2)), explicit


# Other precisions.


@case(tolerance=3e-2, bitwise=False)
def bfloat16():
    def model(x, w):
        q, k, v = project(x, w)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * jnp.bfloat16(SCALE)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v), w)

    args = (tokens(dtype=jnp.bfloat16), weights(dtype=jnp.bfloat16))
    return model, args, explicit_layer


@case(tolerance=3e-2, bitwise=False)
def bfloat16_with_float32_softmax():
    def model(x, w):
        q, k, v = project(x, w)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        a = jax.nn.softmax(s * SCALE).astype(v.dtype)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    args = (tokens(dtype=jnp.bfloat16), weights(dtype=jnp.bfloat16))
    return model, args, explicit_layer


@case()
def high_precision():
    def model(x, w):
        q, k, v = project(x, w)
        s = jnp.einsum("bqhd,bkhd->bhqk", q * SCALE, k, precision="highest")
        a = jax.nn.softmax(s)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v, precision="highest"), w)

    return model, (tokens(), weights()), explicit_layer


# Sums and products instead of a dot, and dots of three operands.


@case()
def values_by_multiply_and_sum():
    def model(x, w):
        q, k, v = project(x, w)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        v = v.swapaxes(1, 2)[:, :, None]
        out = jnp.sum(a[..., None] * v, axis=-2)
        return merge(out.swapaxes(1, 2), w)

    return model, (tokens(), weights()), explicit_layer


@case()
def keys_by_multiply_and_sum():
    def model(x, w):
        q, k, v = (y.swapaxes(1, 2) for y in project(x, w))
        s = jnp.sum(q[:, :, :, None] * k[:, :, None], axis=-1)
        a = jax.nn.softmax(s * SCALE)
        return merge((a @ v).swapaxes(1, 2), w)

    return model, (tokens(), weights()), explicit_layer


@case()
def multiply_and_sum_throughout():
    def model(x, w):
        q, k, v = project(x, w)
        s = jnp.sum(q[:, :, None] * k[:, None], axis=-1)  # [batch, query, key, head]
        a = jax.nn.softmax(s * SCALE, axis=2)
        return merge(jnp.sum(a[..., None] * v[:, None], axis=2), w)

    return model, (tokens(), weights()), explicit_layer


@case(cotangents=False)
def three_operands_with_the_output_projection():
    def model(x, w):
        q, k, v = project(x, w)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        return jnp.einsum("bhqk,bkhd,hde->bqe", a, v, w["o"])

    return model, (tokens(), weights()), explicit_layer


@case(cotangents=False)
def three_operands_with_the_value_projection():
    def model(x, w):
        q, k, _ = project(x, w)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        return merge(jnp.einsum("bhqk,bke,ehd->bqhd", a, x, w["v"]), w)

    return model, (tokens(), weights()), explicit_layer


@case()
def three_operands_with_the_key_projection():
    def model(x, w):
        q, _, v = project(x, w)
        s = jnp.einsum("bqhd,ehd,bke->bhqk", q * SCALE, w["k"], x)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v), w)

    return model, (tokens(), weights()), explicit_layer


@case()
def bilinear_product():
    def model(x, w, bilinear):
        v = jnp.einsum("bte,ehd->bthd", x, w["v"])
        s = jnp.einsum("bqe,hef,bkf->bhqk", x, bilinear, x)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v), w)

    def explicit(tap, x, w, bilinear):
        q = jnp.einsum("bqe,hef->bqhf", x, bilinear)
        k = jnp.stack([x] * HEADS, axis=2)
        v = jnp.einsum("bte,ehd->bthd", x, w["v"])
        return merge(attend(tap, q, k, v, scale=1.0), w)

    args = (tokens(), weights(), normal(3, HEADS, WIDTH, WIDTH, scale=0.3))
    return model, args, explicit


# Pooling.


@case(kinds=("pooling",))
def additive_attention():
    """Bahdanau: a query and each key meet inside a tanh."""

    def model(x, source, wq, wk, u):
        q, k = (jnp.einsum("bte,ef->btf", y, w) for y, w in ((x, wq), (source, wk)))
        s = jnp.tanh(q[:, :, None] + k[:, None]) @ u
        return jax.nn.softmax(s) @ source

    def explicit(tap, x, source, wq, wk, u):
        q, k = jnp.tensordot(x, wq, 1), jnp.tensordot(source, wk, 1)
        s = jnp.sum(jnp.tanh(q[:, :, None] + k[:, None]) * u[None, None, None], -1)
        return jnp.einsum("bqk,bke->bqe", tap(normalise(s), "bqk"), source)

    args = (normal(3, WIDTH, 5), normal(4, WIDTH, 5), normal(5, 5, scale=2.0))
    return model, (tokens(), tokens(SOURCE, seed=2), *args), explicit


@case(kinds=("pooling",))
def additive_pooling():
    """One distribution over the tokens of each example, from a small network."""

    def model(x, wk, u):
        s = jnp.einsum("btf,f->bt", jnp.tanh(jnp.einsum("bte,ef->btf", x, wk)), u)
        return jnp.einsum("bt,bte->be", jax.nn.softmax(s), x)

    def explicit(tap, x, wk, u):
        s = jnp.tanh(jnp.tensordot(x, wk, 1)) @ u
        return (tap(normalise(s), "bk")[..., None] * x).sum(1)

    return model, (tokens(), normal(3, WIDTH, 5), normal(5, 5, scale=2.0)), explicit


@case(kinds=("pooling",))
def gated_pooling_of_one_bag():
    """Multiple-instance learning: a gated score per instance, one bag."""

    def model(bag, wv, wu, u):
        s = (jnp.tanh(bag @ wv) * jax.nn.sigmoid(bag @ wu)) @ u
        a = jax.nn.softmax(s.T, axis=1)
        return a @ bag

    def explicit(tap, bag, wv, wu, u):
        s = (jnp.tanh(bag @ wv) / (1 + jnp.exp(-(bag @ wu)))) @ u
        return tap(normalise(s[:, 0])[None], "bk") @ bag

    args = (normal(3, WIDTH, 5), normal(4, WIDTH, 5), normal(5, 5, 1, scale=2.0))
    return model, (normal(1, SOURCE, WIDTH), *args), explicit


@case(kinds=("pooling",))
def learned_query_pooling():
    def model(x, query):
        a = jax.nn.softmax(x @ query * SCALE, axis=-1)
        return jnp.einsum("bt,bte->be", a, x)

    def explicit(tap, x, query):
        a = normalise(jnp.einsum("bte,e->bt", x, query) * SCALE)
        return jnp.einsum("bk,bke->be", tap(a, "bk"), x)

    return model, (tokens(), normal(3, WIDTH)), explicit


@case(kinds=("attention|pooling",))
def learned_queries():
    """Perceiver: projected latents ask, the input answers."""

    def model(latents, x, w):
        q = jnp.einsum("qe,ehd->qhd", latents, w["q"])
        _, k, v = project(x, w)
        a = jax.nn.softmax(jnp.einsum("qhd,bkhd->bhqk", q, k) * SCALE)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    def explicit(tap, latents, x, w):
        return explicit_layer(tap, jnp.stack([latents] * BATCH), w, x)

    return model, (normal(3, 4, WIDTH), tokens(), weights()), explicit


# More than a product of probabilities and values.


@case()
def talking_heads_before_the_softmax():
    def model(x, w, mix):
        q, k, v = project(x, w)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
        a = jax.nn.softmax(jnp.einsum("bhqk,hg->bgqk", s, mix))
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    def explicit(tap, x, w, mix):
        q, k, v = project(x, w)
        s = jnp.einsum("bqhd,bkhd,hg->bgqk", q, k, mix) * SCALE
        return merge(jnp.einsum("bhqk,bkhd->bqhd", tap(normalise(s)), v), w)

    return model, (tokens(), weights(), normal(3, HEADS, HEADS)), explicit


@case(cotangents=False)
def talking_heads():
    def model(x, w, before, after):
        q, k, v = project(x, w)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
        a = jax.nn.softmax(jnp.einsum("bhqk,hg->bgqk", s, before))
        a = jnp.einsum("bhqk,hg->bgqk", a, after)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    def explicit(tap, x, w, before, after):
        q, k, v = project(x, w)
        s = jnp.einsum("bqhd,bkhd,hg->bgqk", q, k, before) * SCALE
        a = tap(normalise(s))
        return merge(jnp.einsum("bhqk,hg,bkgd->bqgd", a, after, v), w)

    args = (normal(3, HEADS, HEADS), normal(4, HEADS, HEADS))
    return model, (tokens(), weights(), *args), explicit


@case(kinds=("attention", "attention"), cotangents=False)
def differential_attention():
    def model(x, first, second, scale):
        q1, k1, v = project(x, first)
        q2, k2, _ = project(x, second)
        a1 = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q1, k1) * SCALE)
        a2 = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q2, k2) * SCALE)
        a = a1 - scale * a2
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), first)

    def explicit(tap, x, first, second, scale):
        q1, k1, v = project(x, first)
        q2, k2, _ = project(x, second)
        return merge(attend(tap, q1, k1, v) - scale * attend(tap, q2, k2, v), first)

    return model, (tokens(), weights(), weights(seed=20), jnp.float32(0.3)), explicit


@case(cotangents=False)
def differential_attention_jointly():
    """Both maps of a head from one softmax; the difference has a learned factor."""

    def model(x, w, factors):
        q, k, v = project(x, w)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        a = a.reshape(BATCH, HEADS, 2, LENGTH, LENGTH)
        first, second = jnp.exp(jnp.sum(factors[0] * factors[1], axis=-1))
        a = a[:, :, 0] - (first - second + 0.2) * a[:, :, 1]
        out = jnp.einsum("bhqk,bkhd->bqhd", a, v[:, :, :HEADS])
        return jnp.einsum("bqhd,hde->bqe", out, w["o"][:HEADS])

    def explicit(tap, x, w, factors):
        q, k, v = project(x, w)
        a = tap(normalise(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE))
        factor = jnp.exp(factors[0, 0] @ factors[1, 0])
        factor += 0.2 - jnp.exp(factors[0, 1] @ factors[1, 1])
        a = a[:, ::2] - factor * a[:, 1::2]
        out = jnp.einsum("bhqk,bkhd->bqhd", a, v[:, :, :HEADS])
        return jnp.einsum("bqhd,hde->bqe", out, w["o"][:HEADS])

    factors = normal(3, 2, 2, DIM, scale=0.5)
    return model, (tokens(), weights(heads=2 * HEADS), factors), explicit


@case(cotangents=False)
def gated_heads():
    def model(x, w, gate):
        q, k, v = project(x, w)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        a *= jax.nn.sigmoid(gate)[None, :, None, None]
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    def explicit(tap, x, w, gate):
        out = attend(tap, *project(x, w))
        return merge(out / (1 + jnp.exp(-gate))[None, None, :, None], w)

    return model, (tokens(), weights(), normal(3, HEADS)), explicit


@case(cotangents=False)
def dropout():
    def model(x, w, key):
        q, k, v = project(x, w)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        keep = jax.random.bernoulli(key, 0.7, a.shape)
        a = jnp.where(keep, a / 0.7, 0.0)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    def explicit(tap, x, w, key):
        q, k, v = project(x, w)
        a = tap(normalise(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE))
        a *= jax.random.bernoulli(key, 0.7, a.shape).astype(a.dtype) / 0.7
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    return model, (tokens(), weights(), jax.random.key(0)), explicit


@case()
def dictionary_returned():
    def model(x, w):
        q, k, v = project(x, w)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        return {"out": merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w), "key": k}

    def explicit(tap, x, w):
        return {"out": explicit_layer(tap, x, w), "key": project(x, w)[1]}

    return model, (tokens(), weights()), explicit


# Normalised over the queries.


def _slots(renormalise):
    def build():
        def model(slots, x, w):
            q = jnp.einsum("bqe,ed->bqd", slots, w["q"][:, 0])
            k, v = (jnp.einsum("bke,ed->bkd", x, w[n][:, 0]) for n in "kv")
            a = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k) * SCALE, axis=1)
            if renormalise:
                a = a / (a + 1e-8).sum(axis=2, keepdims=True)
            return jnp.einsum("bqk,bkd->bqd", a, v)

        def explicit(tap, slots, x, w):
            w = {n: w[n][:, :1] for n in "qkv"}
            q, k, v = project(slots, w, x)
            a = tap(normalise(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE, axis=2))
            if renormalise:
                a = a / (a + 1e-8).sum(axis=3, keepdims=True)
            return jnp.einsum("bhqk,bkhd->bqd", a, v)

        return model, (tokens(3, seed=2), tokens(SOURCE), weights()), explicit

    return build


case("slot_attention", kinds=("inverted",))(_slots(renormalise=True))
case("slot_attention_summed", kinds=("inverted",))(_slots(renormalise=False))


@case("slot_attention_inputs_first", kinds=("inverted",))
def _():
    def model(slots, x, w):
        q = jnp.einsum("bqe,ed->bqd", slots, w["q"][:, 0])
        k, v = (jnp.einsum("bke,ed->bkd", x, w[n][:, 0]) for n in "kv")
        a = jax.nn.softmax(jnp.einsum("bkd,bqd->bkq", k, q) * SCALE, axis=-1)
        a = a + 1e-8
        a = a / a.sum(axis=1, keepdims=True)
        return jnp.einsum("bkq,bkd->bqd", a, v)

    def explicit(tap, slots, x, w):
        w = {n: w[n][:, :1] for n in "qkv"}
        q, k, v = project(slots, w, x)
        a = tap(normalise(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE, axis=2))
        a = (a + 1e-8) / (a + 1e-8).sum(axis=3, keepdims=True)
        return jnp.einsum("bhqk,bkhd->bqd", a, v)

    return model, (tokens(3, seed=2), tokens(SOURCE), weights()), explicit


# Decoding.


@case()
def decode_one_query():
    def model(token, keys, values, index, w):
        q, k, v = project(token, w)
        keys = lax.dynamic_update_slice(keys, k, (0, index, 0, 0))
        values = lax.dynamic_update_slice(values, v, (0, index, 0, 0))
        s = jnp.einsum("bqhd,bkhd->bhqk", q, keys) * SCALE
        seen = jnp.arange(SOURCE)[None, None, None] <= index
        s = jnp.where(jnp.broadcast_to(seen, s.shape), s, -1e30)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), values)
        return merge(out, w), keys, values, index + 1

    def explicit(tap, token, keys, values, index, w):
        q, k, v = project(token, w)
        keys, values = (
            jnp.where((jnp.arange(SOURCE) == index)[None, :, None, None], new, old)
            for new, old in ((k, keys), (v, values))
        )
        seen = (jnp.arange(SOURCE) <= index)[None, None, None]
        out = attend(tap, q, keys, values, mask=seen)
        return merge(out, w), keys, values, index + 1

    cache = (normal(i, BATCH, SOURCE, HEADS, DIM) for i in (3, 4))
    return model, (tokens(1), *cache, jnp.int32(4), weights()), explicit


@case()
def decode_without_a_query_axis():
    def model(token, keys, values, w):
        q = jnp.einsum("be,ehd->bhd", token, w["q"])
        a = jax.nn.softmax(jnp.einsum("bhd,bkhd->bhk", q, keys) * SCALE)
        return jnp.einsum("bhk,bkhd,hde->be", a, values, w["o"], optimize=False)

    def explicit(tap, token, keys, values, w):
        q = jnp.einsum("bte,ehd->bthd", token[:, None], w["q"])
        return merge(attend(tap, q, keys, values), w)[:, 0]

    cache = (normal(i, BATCH, SOURCE, HEADS, DIM) for i in (3, 4))
    return model, (normal(1, BATCH, WIDTH), *cache, weights()), explicit


@case()
def decode_from_the_class_token():
    def model(x, w):
        q = jnp.einsum("bte,ehd->bthd", x[:, :1], w["q"])
        _, k, v = project(x, w)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)[:, 0]

    def explicit(tap, x, w):
        return explicit_layer(tap, x[:, :1], w, x)[:, 0]

    return model, (tokens(), weights()), explicit
