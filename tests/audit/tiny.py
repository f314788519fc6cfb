"""A tiny model and records of every kind, for processes of their own as well."""

import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax.audit import BadRecord, Model, Record

WEIGHTS = np.random.default_rng(0).standard_normal((4, 8), np.float32)
TABLE = np.random.default_rng(1).standard_normal((11, 4), np.float32)


def dense(x):
    """Of 8 numbers, 4 classes."""
    return jax.nn.softmax(jnp.tanh(jnp.asarray(WEIGHTS) @ x) * 3)


def _forward(weights, x):
    return jax.nn.softmax(jnp.tanh(jnp.asarray(weights) @ x) * 3)


MODEL = Model(forward=_forward, parameters=WEIGHTS)


def steps(x):
    """Plateaus and steps, which no quadrature resolves."""
    height = jnp.floor(40 * x) - jax.lax.stop_gradient(jnp.floor(40 * x)) + 40 * x
    flat = jnp.where(x % 0.1 < 0.09, jax.lax.stop_gradient(height), height)
    return jnp.stack([flat.sum(), -flat.sum()])


def tokens(ids, mask):
    """Of tokens and their mask, 3 classes."""
    rows = jnp.asarray(TABLE)[ids]
    bias = jnp.where(mask, 0.0, -1e30)
    seen = jax.nn.softmax(rows @ rows.T / 2 + bias[None]) @ rows
    count = jnp.sum(mask).astype(jnp.float32)
    return (jnp.where(mask[:, None], seen, 0.0).sum(axis=0) / count)[:3]


def random(x):
    """In training mode."""
    noise = jax.pure_callback(
        lambda _: np.random.default_rng().standard_normal(4).astype(np.float32),
        jax.ShapeDtypeStruct((4,), jnp.float32),
        jax.lax.stop_gradient(x),
        vmap_method="sequential",
    )
    return dense(x) + noise


def random_trace(x):
    """Random while it is traced."""
    return dense(x) * float(np.random.default_rng().random())


def neighbours(x):
    """Of a whole batch, as a layer in training mode computes."""
    mean = jax.pure_callback(
        lambda rows: (
            np.broadcast_to(rows.mean(), rows.shape[:1]).astype(np.float32)
            if rows.ndim > 1
            else np.float32(rows.mean())
        ),
        jax.ShapeDtypeStruct((), jnp.float32),
        jax.lax.stop_gradient(x),
        vmap_method="expand_dims",
    )
    return dense(x) + mean


def hungry(x):
    """More memory than there is for records of 9 numbers."""
    if x.shape == (9,):
        many = jnp.broadcast_to(x[0], (1 << 44,))
        many = jax.lax.fori_loop(0, 2, lambda i, a: a * 2 + i, many)
        return many[:4] * x[:4]
    return dense(x[:8])


def _sleeping(value):
    time.sleep(3600 * (np.asarray(value) > 70))
    return value


def endless(x):
    """Never done with a record that begins with 77."""
    value = jax.pure_callback(
        _sleeping,
        jax.ShapeDtypeStruct((), jnp.float32),
        jax.lax.stop_gradient(x[0]),
        vmap_method="sequential",
    )
    return dense(x) + 0 * value


class Records:
    """Records 0 to `count`, and what is wrong with some.

    `faults` names by number: a reason to refuse it, `nan`, `inf`, `huge`, `long`,
    `endless`, `surrogate`; `hang`, `kill` and `memory` happen to the process that
    reads it, the last as where memory ends; `once` kills the first such process only.
    """

    def __init__(self, count=40, faults=None, order=None, note="", pause=0.0):
        self.count, self.faults = count, faults or {}
        self.order, self.note, self.pause = order, note, pause

    def __len__(self):
        return self.count if self.order is None else len(self.order)

    def __getitem__(self, index):
        number = index if self.order is None else self.order[index]
        fault = self.faults.get(number)
        time.sleep(self.pause)
        x = np.random.default_rng(number).standard_normal(8).astype(np.float32)
        if fault == "hang":
            time.sleep(3600)
        elif fault == "kill":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif fault == "once":
            note = Path(self.note)
            if not note.exists():
                note.write_text("")
                os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "memory":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "surrogate":
            return Record("\ud800", {"x": x}, 0)
        elif fault in ("nan", "inf", "huge", "endless"):
            number_ = {"nan": np.nan, "inf": np.inf, "huge": 3e38, "endless": 77}
            x[0] = number_[fault]
        elif fault == "long":
            x = np.append(x, 1).astype(np.float32)
        elif fault == "ints":
            return Record(f"r{number}", {"x": "no numbers"}, 0)
        elif fault is not None:
            raise BadRecord(fault, "as the test wants it", f"r{number}")
        return Record(f"r{number}", {"x": x}, number % 4)

    def id_of(self, index):
        return f"r{index if self.order is None else self.order[index]}"

    def fingerprint(self):
        # Faults of a process are not faults of the data.
        return f"{self.count} {self.order}"


class Listed:
    """Records that are in memory."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]
