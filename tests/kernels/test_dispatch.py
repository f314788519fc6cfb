"""Which backend is chosen, and how the map is cut on platforms that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.kernels import dispatch, tiles
from xviz_jax.kernels.attention_map import attention_map
from xviz_jax.kernels.attention_row_product import attention_row_product


def kernels_in(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("pallas_call")


def test_a_tpu_takes_mosaic_and_falls_through_where_it_cannot(oracle, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    x = oracle.make(nq=12)
    assert kernels_in(attention_row_product, x.r, x.q, x.k) > 0
    masked = functools.partial(attention_row_product, mask=np.tri(12, dtype=bool))
    assert kernels_in(masked, x.r, x.q, x.k) == 0
    want = x.r @ oracle.fused(x.q, x.k, causal=True)
    np.testing.assert_allclose(masked(x.r, x.q, x.k), want, 1e-5)
    with pytest.raises(NotImplementedError, match="mask"):
        masked(x.r, x.q, x.k, implementation="mosaic_tpu")


def test_a_gpu_falls_through_to_xla_for_float32(oracle, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    x = oracle.make(nq=12)
    want = x.r @ oracle.fused(x.q, x.k)
    np.testing.assert_allclose(attention_row_product(x.r, x.q, x.k), want, 1e-5)


def test_the_default_device_is_the_platform():
    with jax.default_device("cpu"):
        assert dispatch.platform() == "cpu"
    with jax.default_device(jax.devices()[1]):
        assert dispatch.platform() == jax.devices()[1].platform


@pytest.mark.parametrize(
    "budget,tile",
    [
        (2**30, tiles.Tile(3, 2, 150)),
        (4 * 150 * 4 * 200, tiles.Tile(3, 2, 50)),
        (4 * 150 * 4 * 150, tiles.Tile(1, 2, 150)),
        (4 * 150 * 40, tiles.Tile(1, 1, 19)),
        (0, tiles.Tile(1, 1, 15)),
    ],
)
def test_an_accelerator_takes_tiles_that_fit(oracle, monkeypatch, budget, tile):
    monkeypatch.setattr(tiles, "platform", lambda: "gpu")
    monkeypatch.setattr(tiles, "_ACCELERATOR_BYTES", budget)
    x = oracle.make(batch=(3,), nq=150, heads=4, kv_heads=2, m=2)
    assert tiles.tile_sizes(attention_map(x.q, x.k)) == tile
    product = functools.partial(attention_row_product, implementation="xla")
    want = x.r.astype(np.float64) @ oracle.fused(x.q, x.k)
    np.testing.assert_allclose(jax.jit(product)(x.r, x.q, x.k), want, 2e-5)


def test_a_large_map_on_a_cpu_is_cut_into_strips(oracle):
    x = oracle.make(nq=1024, heads=4, kv_heads=2)
    assert tiles.tile_sizes(attention_map(x.q, x.k)) == tiles.Tile(1, 1, 128)
    x = oracle.make(batch=(9,), nq=256, heads=4)
    assert tiles.tile_sizes(attention_map(x.q, x.k)) == tiles.Tile(1, 4, 256)


def test_a_kernel_varies_over_a_mesh_as_its_operands_do(oracle):
    x = oracle.make(batch=(4,), nq=20)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    product = functools.partial(
        attention_row_product, implementation="mosaic_tpu", causal=True
    )
    sharded = jax.shard_map(product, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    shapes = [jax.ShapeDtypeStruct(y.shape, jnp.float32) for y in (x.r, x.q, x.k)]
    assert jax.eval_shape(sharded, *shapes).shape == (4, 1, 20)
