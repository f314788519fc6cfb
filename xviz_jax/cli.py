"""The command line: `xviz-jax demo | doctor`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from xviz_jax._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 2 bad call."""
    parser = argparse.ArgumentParser(
        prog="xviz-jax", description="Explain any JAX model, over any number of inputs."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="explain 1,000 images with the embedded model",
        description="Explains held-out images with the embedded vision transformer: "
        "prints a table, writes gallery.png, attributions.npz and summary.json.",
    )
    demo.add_argument("--out", type=Path, required=True, help="folder for the results")
    demo.add_argument("--limit", type=int, default=1000, help="how many images")
    demo.add_argument(
        "--methods",
        default="attention_rollout,integrated_gradients",
        help="comma-separated names",
    )
    demo.add_argument("--steps", type=int, default=24, help="nodes on a path")
    demo.add_argument("--microbatch", type=int, default=4)
    demo.add_argument("--seed", type=int, default=0, help="picks the gallery's images")
    demo.add_argument(
        "--overwrite", action="store_true", help="allow a folder that is not empty"
    )
    doctor = commands.add_parser(
        "doctor",
        help="say what can be seen inside a model, and which methods work",
        description="Traces a model, without running it, and prints its sites.",
    )
    doctor.add_argument("--model", required=True, help="embedded, or module:function")
    doctor.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="DTYPE[SHAPE]",
        help="one for each argument, such as float32[28,28]",
    )
    arguments = parser.parse_args(argv)
    return {"demo": _demo, "doctor": _doctor}[arguments.command](arguments)


def _demo(arguments: argparse.Namespace) -> int:
    # Imports the model and matplotlib, which `--help` need not wait for.
    from xviz_jax import demo

    options = {
        "limit": arguments.limit,
        "methods": tuple(arguments.methods.split(",")),
        "steps": arguments.steps,
        "microbatch": arguments.microbatch,
        "overwrite": arguments.overwrite,
    }
    try:
        demo.check(arguments.out, **options)
    except ValueError as error:
        print(f"xviz-jax demo: {error}", file=sys.stderr)
        return 2
    demo.run(arguments.out, seed=arguments.seed, **options)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from xviz_jax import doctor

    # A model beside the reader's own files, as `python -m` would find it.
    sys.path.insert(0, "")
    try:
        model, known = doctor.find_model(arguments.model)
        args = tuple(map(doctor.parse_input, arguments.input)) or known
        if not args:
            raise ValueError("pass --input for each argument of the model")
    except ValueError as error:
        print(f"xviz-jax doctor: {error}", file=sys.stderr)
        return 2
    doctor.report(model, args, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
