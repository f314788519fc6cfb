"""Which sequences attention runs over, in every model of the zoo."""

import jax
import jax.numpy as jnp
import pytest

from tests.tracing.zoo import CASES
from xviz_jax.tracing.program import trace
from xviz_jax.tracing.sequences import Sequences

# Models that attend from one array to another, or from a part of one to all of it;
# those of `jax.nn` take queries and keys as arguments.
ACROSS = """
    cross_attention raw_arguments raw_arguments_length_first encoder_and_decoder
    blocks_and_their_neighbours keys_on_a_grid sink_key_and_value learned_queries
    decode_one_query decode_from_the_class_token linen_cross_attention linen_decode
    linen_function nnx_cross_attention equinox_cross_attention_mask_per_head
    map_over_query_chunks_recomputed python_loop_over_query_chunks
""".split()
# Whose positions are those of no array.
NOWHERE = ["decode_without_a_query_axis", "scan_over_decoded_tokens"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_queries_and_keys_of_the_zoo(case):
    with case.context():
        program = trace(case.model, case.args, {})
    sequences = Sequences(program)
    sites = [site for site in program.sites if site.kind == "attention"]
    runs = [[sequences.run(s.name, side) for side in ("query", "key")] for s in sites]
    assert not any(run.cut for pair in runs for run in pair)
    alike = [query.origins == key.origins for query, key in runs]
    empty = [not (query.origins and key.origins) for query, key in runs]
    given = case.name.startswith("jax_nn_") and case.name != "jax_nn_one_example"
    across = case.name in ACROSS or given
    assert any(empty) == (case.name in NOWHERE)
    if not any(empty):
        assert all(alike) != across
    assert not sites or sequences.read()


def test_turns_of_a_loop_are_told_apart():
    """The second site reads what the first has made now, and both what was before."""
    weights = jnp.eye(4)

    def turn(x, _):
        x = x + jax.nn.softmax(x @ weights @ x.T) @ x
        return x + jax.nn.softmax(x @ x.T) @ x, None

    model = lambda x: jax.lax.scan(turn, x, None, length=3)[0]
    program = trace(model, (jnp.ones((5, 4)),), {})
    first, second = (s.name for s in program.sites if s.kind == "attention")
    sequences = Sequences(program)
    run = sequences.run(first, "key")
    assert (run.now, run.earlier) == (set(), {first, second})
    run = sequences.run(second, "query")
    assert (run.now, run.earlier) == ({first}, {first, second})
    assert sequences.read() == {first, second}
