"""The examples run, and find what they planted."""

import importlib.util
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_long_context(monkeypatch, capsys):
    # Longer than what would be read as it is: 2 heads x 1,280^2 x 4 bytes > 8 MB.
    arguments = ["long_context.py", "--length", "1280", "--layers", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    load("long_context").main()
    said = capsys.readouterr().out
    assert "predicts class 3" in said
    assert said.count(f"highest at {1280 // 3} ") == 2
