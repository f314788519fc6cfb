"""The command line: `xviz-jax demo | explain | compare | audit | doctor`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xviz_jax._version import __version__

# What a wrong call ends in, in the library or in a model that cannot take its input.
_REFUSED = (
    ImportError,
    NotImplementedError,
    OSError,
    OverflowError,
    TypeError,
    ValueError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 2 bad call, more of `audit`."""
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
    demo.add_argument(
        "--steps", type=int, help="nodes on a path; by default what each image needs"
    )
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
    _audit_arguments(commands)
    arguments = parser.parse_args(argv)
    run = {
        "audit": _audit,
        "compare": _compare,
        "demo": _demo,
        "doctor": _doctor,
        "explain": _explain,
    }
    return run[arguments.command](arguments)


def _explain_arguments(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="explain one text or image with a published checkpoint",
        description="Prints the text with its words shaded (red raises the output, "
        "blue lowers it; orange where no score is negative), and draws a picture.",
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


def _audit_arguments(commands: Any) -> None:
    audit = commands.add_parser(
        "audit",
        help="explain any number of records, and survive",
        description="Explains every record of a source and leaves a row of each in "
        "OUT/shards/*.parquet; run again, it does what is missing. Exit codes: 0 done, "
        "1 a fault, 2 a bad call, 3 too many bad records, 143 ended early: run again.",
    )
    audit.add_argument(
        "--model",
        help="embedded (the default), a checkpoint's folder, a GGUF file, or "
        "module:function",
    )
    audit.add_argument("--data", help="a path or address of records")
    audit.add_argument("--out", help="folder for the results")
    audit.add_argument("--methods", help="comma-separated names")
    audit.add_argument(
        "--option",
        action="append",
        dest="options",
        metavar="METHOD.NAME=VALUE",
        help="of a method, such as integrated_gradients.tolerance=0.03",
    )
    audit.add_argument(
        "--target",
        help="a class or its name, two classes A,B, or label; default: the predicted",
    )
    audit.add_argument("--columns", help="the model's arguments, comma-separated")
    audit.add_argument("--config", type=Path, help="a TOML file of these settings")
    audit.add_argument("--engine", choices=("local", "ray"))
    audit.add_argument("--microbatch", help="records computed at once, or auto")
    audit.add_argument("--shard-size", type=int, help="records committed at once")
    audit.add_argument("--limit", type=int, help="only so many records")
    audit.add_argument("--seed", type=int, help="of random methods")
    audit.add_argument("--vocabulary", type=int, help="tokens that a function knows")
    audit.add_argument("--buckets", help="lengths tokens are padded to, as 64,128")
    audit.add_argument("--duplicates", choices=("refuse", "number", "trust"))
    audit.add_argument("--devices", type=int, help="how many local devices are used")
    flag = {"action": "store_true", "default": None}
    audit.add_argument(
        "--split", help="spread a checkpoint over all local devices", **flag
    )
    audit.add_argument(
        "--weights-sha256", help="the fingerprint that a checkpoint must have"
    )
    audit.add_argument(
        "--allow-nonfinite", help="take weights that hold NaN or infinity", **flag
    )
    audit.add_argument("--isolate", help="compute in a process of its own", **flag)
    audit.add_argument("--deadline", type=float, help="seconds for one shard")
    audit.add_argument("--max-bad-fraction", type=float, help="by default 0.05")
    audit.add_argument("--wait", type=float, help="seconds for another runner to end")
    audit.add_argument("--new-run", help="put another run aside", **flag)
    audit.add_argument("--dry-run", help="say what it would take", **flag)


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
        help="a .npy file of records, or an .npz file with `records`, and `targets`, "
        "`slices` and the `mask` of padded texts if there are any; default: the "
        "embedded model's own images",
    )
    compare.add_argument(
        "--against",
        metavar="TEXT_OR_IMAGE",
        help="explain the cosine with its features, for a model without classes",
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
    except _REFUSED as error:
        return _refuse("compare", error)
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
    except _REFUSED as error:
        return _refuse("explain", error)
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    try:
        from xviz_jax.audit import command
    except ImportError as error:
        print(
            f"xviz-jax audit: {error}: pip install 'xviz-jax[audit]'", file=sys.stderr
        )
        return 2
    # A model beside the reader's own files, as `python -m` would find it.
    sys.path.insert(0, "")
    given = {**vars(arguments)}
    del given["command"]
    return command.main(given)


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
        doctor.report(model, args, Console())
    except _REFUSED as error:
        return _refuse("doctor", error)
    return 0


def _refuse(command: str, error: Exception) -> int:
    """Says what was wrong, and of which kind it was where a model may have said it."""
    own = isinstance(error, ValueError | ImportError)
    kind = "" if own else f"{type(error).__name__}: "
    print(f"xviz-jax {command}: {kind}{error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
