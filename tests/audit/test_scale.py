"""What docs/scale.md counts is what XLA counts, and its tables follow."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import xviz_jax as xv
from xviz_jax.models import vit

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
PEAKS, PRICES = {"TPU v5e": 197e12, "H100": 989e12}, {"TPU v5e": 1.2, "H100": 10.8}


def said(row: str) -> list[float]:
    """The numbers of a row's cells."""
    (line,) = re.findall(rf"^\| {re.escape(row)}[^|]*\|(.*)$", PAGE, re.MULTILINE)
    cells = [cell.strip().lstrip("$").replace(",", "") for cell in line.split("|")]
    return [float(c.rstrip("%")) for c in cells if re.fullmatch(r"[\d.]+%?", c)]


@pytest.fixture(scope="module")
def counted() -> dict[str, float]:
    config = vit.Config(
        width=768, depth=12, heads=12, hidden=3072, activation="gelu", epsilon=1e-12,
        qkv_bias=True, patch=(16, 16), grid=(14, 14), channels=3, distilled=False,
        classes=1000, teacher=False, pooler=None,
    )  # fmt: skip
    module = nnx.eval_shape(
        lambda: vit.build(config, dtype=jnp.float32, scan=False, rngs=nnx.Rngs(0))
    )
    graph, parameters = nnx.split(module)

    def forward(parameters, image):
        return nnx.merge(graph, parameters)(image)

    def gradient(parameters, image):
        return jax.value_and_grad(lambda x: forward(parameters, x)[0])(image)

    rollout, relevance = xv.attention_rollout(forward), xv.attention_relevance(forward)
    image = jax.ShapeDtypeStruct((224, 224, 3), jnp.float32)
    found = {}
    for name, function in {
        "forward pass": forward,
        "forward and backward pass": gradient,
        "`attention_rollout`": lambda p, x: rollout(p, x).scores,
        "`attention_relevance`": lambda p, x: relevance(p, x, target=0).scores,
    }.items():
        cost = jax.jit(function).lower(parameters, image).cost_analysis()
        assert cost is not None
        found[name] = cost["flops"] / 1e9
    return found


def test_operations_are_those_that_xla_counts(counted):
    for name, number in counted.items():
        assert said(name)[0] == pytest.approx(number, rel=1e-2), name


def test_the_tables_follow_from_their_constants():
    passes, forward = said("passes of")[0], said("forward pass")[0]
    gradients = passes * said("forward and backward pass")[0] + forward
    assert said("`integrated_gradients`")[0] == pytest.approx(gradients, rel=1e-3)
    whole = (
        gradients + said("`attention_rollout`")[0] + said("`attention_relevance`")[0]
    )
    assert said("all three")[0] == pytest.approx(whole, rel=1e-3)
    rows = re.findall(r"^\| (TPU v5e|H100) \| (\d+)% \|(.*)\|$", PAGE, re.MULTILINE)
    assert len(rows) == 7
    for chip, utilisation, cells in rows:
        numbers = [float(c.strip(" $").replace(",", "")) for c in cells.split("|")]
        rate = 256 * PEAKS[chip] * int(utilisation) / 100 / (whole * 1e9)
        hours = 1e9 / rate / 3600
        wanted = [rate, rate / 32, hours, 256 * hours, 256 * hours * PRICES[chip]]
        assert numbers == pytest.approx(wanted, rel=1e-2)
