"""The command line: `xviz-jax demo | explain | compare | doctor`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        "prints a table, writes gallery.png, attributions.npz and summary.json; and "
        "says which methods may be believed: comparison.json and comparison.png.",
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
        "--compare",
        type=int,
        default=32,
        help="images on which all methods are compared; 0 for none",
    )
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
    _explain_arguments(commands)
    _compare_arguments(commands)
    arguments = parser.parse_args(argv)
    run = {"demo": _demo, "doctor": _doctor, "explain": _explain, "compare": _compare}
    return run[arguments.command](arguments)


def _explain_arguments(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="explain one text or image with a published checkpoint",
        description="Prints the text with its words shaded (red raises the output, "
        "blue lowers it; orange where a method knows no sign), and draws a picture.",
    )
    explain.add_argument(
        "--model",
        required=True,
        help="a checkpoint's folder, a GGUF file, embedded, or module:function",
    )
    source = explain.add_mutually_exclusive_group(required=True)
    source.add_argument("--text")
    source.add_argument("--image", type=Path)
    source.add_argument("--array", type=Path, help="a .npy file, for a function")
    explain.add_argument("--pair", help="a second text, for a model of pairs")
    explain.add_argument(
        "--prepare",
        type=Path,
        metavar="FOLDER",
        help="whose tokenizer or image processor reads a function's input",
    )
    explain.add_argument("--method", default="integrated_gradients")
    explain.add_argument(
        "--option",
        action="append",
        default=[],
        dest="options",
        metavar="NAME=VALUE",
        help="of the method, such as steps=32",
    )
    explain.add_argument(
        "--target", help="a class's number or name, or a word; default: the predicted"
    )
    explain.add_argument("--versus", metavar="TARGET", help="why this and not that")
    explain.add_argument(
        "--against",
        metavar="TEXT_OR_IMAGE",
        help="explain the cosine with its features, for a model without classes",
    )
    explain.add_argument(
        "--position", type=int, help="the token whose logits are read; -1 is the last"
    )
    explain.add_argument("--granularity", choices=("word", "token"), default="word")
    explain.add_argument("--seed", type=int, default=0, help="of random methods")
    explain.add_argument("--out", type=Path, help="a picture: .png, .pdf or .svg")


def _compare_arguments(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="say which methods may be believed for a model and its data",
        description="Measures methods beside random, position-only and leave-one-out "
        "rankings; prints a table and the verdict, writes comparison.json and "
        "comparison.png.",
    )
    compare.add_argument(
        "--model",
        default="embedded",
        help="embedded, a checkpoint's folder, or module:function",
    )
    compare.add_argument(
        "--data",
        type=Path,
        help="a .npy file of records, or an .npz file with `records`, and `targets` "
        "and `slices` if there are any; default: the embedded model's own images",
    )
    compare.add_argument(
        "--methods",
        default="attention_rollout,integrated_gradients,saliency,input_x_gradient",
        help="comma-separated names",
    )
    compare.add_argument("--limit", type=int, help="how many records; default: all")
    compare.add_argument(
        "--out", type=Path, required=True, help="folder for the results"
    )
    compare.add_argument(
        "--patch", type=int, help="side of a feature in pixels, of images"
    )
    compare.add_argument(
        "--steps", type=int, default=8, help="points of a perturbation curve"
    )
    compare.add_argument("--microbatch", type=int, default=8)
    compare.add_argument("--seed", type=int, default=0, help="of everything random")


def _compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from xviz_jax import compare_command

    # A model beside the reader's own files, as `python -m` would find it.
    sys.path.insert(0, "")
    options = {**vars(arguments)}
    del options["command"]
    options["methods"] = tuple(arguments.methods.split(","))
    try:
        compare_command.run(**options, console=Console())
    except (ValueError, ImportError) as error:
        print(f"xviz-jax compare: {error}", file=sys.stderr)
        return 2
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    # Imports the model and matplotlib, which `--help` need not wait for.
    from xviz_jax import demo

    options = {
        "limit": arguments.limit,
        "methods": tuple(arguments.methods.split(",")),
        "steps": arguments.steps,
        "microbatch": arguments.microbatch,
        "overwrite": arguments.overwrite,
        "compare": arguments.compare,
    }
    try:
        demo.check(arguments.out, **options)
    except ValueError as error:
        print(f"xviz-jax demo: {error}", file=sys.stderr)
        return 2
    demo.run(arguments.out, seed=arguments.seed, **options)
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from xviz_jax import explain

    # A model beside the reader's own files, as `python -m` would find it.
    sys.path.insert(0, "")
    options = {**vars(arguments)}
    del options["command"]
    try:
        explain.run(explain.Request(**options), Console())
    except (ValueError, ImportError) as error:
        print(f"xviz-jax explain: {error}", file=sys.stderr)
        return 2
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
