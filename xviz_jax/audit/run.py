"""Explains every record of a source, whatever happens on the way."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from xviz_jax.audit import lock
from xviz_jax.audit.job import Job
from xviz_jax.audit.model import Model
from xviz_jax.audit.progress import Progress, Summary
from xviz_jax.audit.ray import Ray
from xviz_jax.audit.runner import Runner
from xviz_jax.audit.sources import Buckets
from xviz_jax.audit.stopping import Stop, listening

# An address, also one whose slashes a `Path` has joined; a drive is a single letter.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
METHODS = ("attention_rollout", "attention_relevance", "integrated_gradients")


def run(
    out: str | Path,
    *,
    model: str | Callable | Model = "embedded",
    data: Any,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = METHODS,
    target: int | str | tuple[int, int] | None = None,
    columns: Sequence[str] | None = None,
    engine: Literal["local", "ray"] = "local",
    ray: Ray | None = None,
    microbatch: int | None = None,
    shard_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
    buckets: Buckets | None = None,
    duplicates: Literal["refuse", "number", "trust"] = "refuse",
    devices: int | None = None,
    split: bool = False,
    weights_sha256: str | None = None,
    allow_nonfinite: bool = False,
    isolate: bool = False,
    deadline: float = 1800.0,
    max_bad_fraction: float = 0.05,
    new_run: bool = False,
    wait: float = 0.0,
    progress: Callable[[Progress], Any] | None = None,
    stop: Stop | None = None,
) -> Summary:
    """Explains every record of a source, and leaves a row of each in a folder.

    The folder holds `shards/*.parquet` with a row for each explained record,
    `quarantine/*.parquet` with the others and why, `run.json`, `summary.json` and
    `audit.log`. A shard is there whole or not at all; a second call, after any end,
    computes what is missing or damaged and nothing else. A row's bits depend on its
    record and on its `numerics_id` only. Memory does not grow with the records.

    Args:
      out: The folder, in a file system of this machine.
      model: `embedded`, a checkpoint's folder or GGUF file, `module:function`, a
        function of one example, or a `Model`.
      data: A path or address of records, or a source.
      methods: Names, or the options of each by name.
      target: What is explained: None for the predicted class, a class, `label` for
        the record's own, or two classes for why the one and not the other.
      columns: Which columns are the model's arguments, in order.
      engine: `local`: all devices of this machine; `ray`: workers on a cluster.
      ray: The cluster.
      microbatch: Records computed at once on a device; None chooses by its memory.
      shard_size: Records that are committed at once, and at most lost; None for
        1,024, or fewer if their rows are large.
      limit: Explain only so many records, from the first on.
      seed: Of random methods; a record's key depends on it and on the record's id.
      vocabulary: How many tokens a function knows; ids beyond are refused.
      buckets: Lengths that tokens are padded to, for a function `(tokens, mask)`.
      duplicates: What to do about ids that occur twice, as for `open_source`.
      devices: How many local devices are used; None for all.
      split: Spread a checkpoint over all local devices, if it does not fit one.
      weights_sha256: The `fingerprint` of `models.load` that a checkpoint must have;
        another is refused before anything is computed.
      allow_nonfinite: Explain a model whose weights hold NaN or infinity.
      isolate: Compute in a process of its own, which records may kill. It is done by
        itself where a shard has ended its process twice.
      deadline: Seconds after which a shard counts as hung.
      max_bad_fraction: The share of records that may be quarantined.
      new_run: Put a run of another fingerprint aside, under `previous/`.
      wait: Seconds to wait for another runner of the folder to end.
      progress: Called a few times a second or less.
      stop: Asks the run to end; by default SIGTERM and SIGINT do.

    Returns:
      The summary; `state` says whether all records are done.

    Raises:
      ValueError: If the call is wrong; `Changed` if the folder holds another run.
      Busy: If another runner writes into the folder.
      OSError: If the disk is full, say. What is committed stays.
    """
    if engine not in ("local", "ray"):
        raise ValueError(f"`engine` is 'local' or 'ray', got {engine!r}")
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"`max_bad_fraction` is from 0 to 1, got {max_bad_fraction}")
    if not deadline > 0:
        raise ValueError(f"`deadline` is a time in seconds, got {deadline}")
    job = Job(
        model=model,
        data=str(data) if isinstance(data, Path) else data,
        methods=methods,
        columns=tuple(columns) if columns is not None else None,
        target=target,
        microbatch=microbatch,
        shard_size=shard_size,
        limit=limit,
        seed=seed,
        vocabulary=vocabulary,
        buckets=buckets,
        duplicates=duplicates,
        devices=devices,
        split=split,
        weights_sha256=weights_sha256,
        allow_nonfinite=allow_nonfinite,
    )
    if _ADDRESS.match(str(out)):
        raise ValueError(
            f"`out` is a folder in a file system of this machine, got the address {out}"
        )
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` is a folder, got {out}")
    out.mkdir(parents=True, exist_ok=True)
    stop = stop or Stop()
    with lock.held(out, wait=wait), listening(stop):
        runner = Runner(out, job, stop, deadline, progress)
        opened = runner.open(engine, ray or Ray(), isolate)
        try:
            return runner.run(opened, max_bad_fraction, new_run)
        finally:
            opened.close()
