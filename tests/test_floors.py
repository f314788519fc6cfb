"""An import never runs upward, and no two rooms import each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "xviz_jax"
# Each room, and the rooms it may import.
# fmt: off
FLOORS = {
    "kernels": set(),
    "tracing": set(),
    "noise": set(),
    "attribution": {"noise", "tracing"},
    "chunks": set(),
    "baselines": {"attribution"},
    "gradients": {"attribution", "baselines", "chunks", "kernels", "noise", "tracing"},
    "perturbation": {"attribution", "baselines", "chunks", "tracing"},
    "attention": {"attribution", "chunks", "kernels", "tracing"},
    "metrics": {"attribution", "baselines", "chunks", "noise", "perturbation"},
    "batch": {"attribution"},
    "models": set(),
    "arrays": set(),
    "escape": set(),
    "plotting": {"attribution"},
    # What it found draws itself, once it is asked to.
    "comparison": {
        "attribution", "baselines", "batch", "chunks", "metrics", "perturbation",
        "plotting", "tracing",
    },
    "compare_subject": {
        "arrays", "attribution", "baselines", "doctor", "explain", "metrics",
        "models", "perturbation",
    },
    "compare_command": {
        "attribution", "compare_subject", "comparison", "escape", "explain", "metrics",
    },
    "demo": {
        "attention", "attribution", "batch", "compare_command", "compare_subject",
        "comparison", "gradients", "models", "plotting",
    },
    "methods": {"attribution"},
    "doctor": {"attention", "models", "tracing"},
    "explain": {
        "arrays", "attribution", "doctor", "escape", "methods", "models", "plotting",
    },
    "audit": {
        "arrays", "attribution", "baselines", "batch", "doctor", "escape", "methods",
        "models", "tracing", "_version",
    },
    "cli": {"audit", "compare_command", "demo", "doctor", "explain", "_version"},
}
# fmt: on


def imported(path: Path) -> set[str]:
    """Rooms of the library that a file imports."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names]
        rooms |= {p[1] for p in parts if p[0] == "xviz_jax" and len(p) > 1}
    return rooms


def files(room: str) -> list[Path]:
    single = ROOT / f"{room}.py"
    return [single] if single.exists() else sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_what_lies_below(room):
    assert files(room), room
    for path in files(room):
        assert imported(path) - {room} <= FLOORS[room], path


def test_every_room_has_its_floor():
    entries = {path.stem for path in ROOT.iterdir() if not path.name.startswith("_")}
    assert entries - {"py"} <= set(FLOORS)


def test_nothing_private_of_jax_is_imported():
    for path in ROOT.rglob("*.py"):
        assert "jax._src" not in path.read_text(), path
