"""The table of measured block sizes, and who is asked first."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from xviz_jax.kernels import dispatch, tuning
from xviz_jax.kernels.attention_map import attention_map

KEY = "attention_lse/attention/linear/m0/d64/float32/full/2^{}"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of one device, which is the one at hand."""
    minor = ".".join(jax.__version__.split(".")[:2])
    measured = {
        KEY.format(10): {"config": {"block_q": 256, "block_k": 512}, "ms": 1.0},
        KEY.format(13): {"config": {"block_q": 1024, "block_k": 512}, "ms": 9.0},
    }
    path = tmp_path / "block_sizes.json"
    path.write_text(json.dumps({"TPU v9": {minor: {"how": "", "measured": measured}}}))
    monkeypatch.setattr(tuning, "TABLE", path)
    monkeypatch.setattr(dispatch, "device_kind", lambda: "TPU v9")
    tuning._table.cache_clear()
    yield path
    tuning._table.cache_clear()


def sizes(n, config=None, dim=64):
    q = np.zeros((n, 2, dim), np.float32)
    return tuning.block_sizes(
        "attention_lse", attention_map(q, q), config, block_q=128, block_k=128
    )


def test_the_caller_is_asked_first_then_the_table_then_the_rule(table):
    assert sizes(1000) == (256, 512)
    assert sizes(8192) == (1024, 512)
    # The nearest length that was measured.
    assert sizes(100) == (256, 512)
    assert sizes(40000) == (1024, 512)
    assert sizes(1000, {"block_q": 384}) == (384, 512)
    # Another width is another kernel.
    assert sizes(1000, dim=128) == (128, 128)
    with pytest.raises(ValueError, match="block_z"):
        sizes(1000, {"block_z": 1})


def test_another_device_or_jax_takes_the_rule(table, monkeypatch):
    assert tuning.best(KEY.format(10), "TPU v8", jax.__version__) == {}
    assert tuning.best(KEY.format(10), "TPU v9", "0.1.2") == {}
    monkeypatch.setattr(dispatch, "device_kind", lambda: "cpu")
    assert sizes(1000) == (128, 128)


def test_the_key_tells_courses_of_a_kernel_apart():
    q = np.zeros((300, 2, 64), np.float32)
    relu: Any = dict(relevance="relu_gradient_x_attention", v=q, dout=q)
    courses: Any = [
        ({}, 1),
        ({}, 5),
        ({"causal": True}, 1),
        ({"head_fusion": "max"}, 1),
        (relu, 1),
    ]
    keys = [
        tuning.key("attention_row_product", attention_map(q, q, **options), vectors)
        for options, vectors in courses
    ]
    assert len(set(keys)) == len(keys)
    same = attention_map(q, q, window=(3, None))
    assert tuning.key("attention_row_product", same, 1) == keys[2]


def test_what_is_shipped_names_kernels_and_says_how_it_was_measured():
    tuning._table.cache_clear()
    shipped = json.loads(tuning.TABLE.read_text())
    assert shipped, "an empty table serves nobody"
    for versions in shipped.values():
        for section in versions.values():
            assert section["how"]
            for key, entry in section["measured"].items():
                operation, *_, length = key.split("/")
                dispatch._backend(operation, "xla")
                assert length.startswith("2^")
                assert set(entry["config"]) <= {"block_q", "block_k", "warp_groups"}
                assert all(size > 0 for size in entry["config"].values())
