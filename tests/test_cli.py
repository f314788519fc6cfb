"""The main job from the command line, on a few images."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xviz_jax import cli, doctor, tracing


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    arguments = ["demo", "--out", str(out), "--limit", "10", "--steps", "8"]
    arguments += ["--compare", "0"]
    assert cli.main(arguments) == 0
    return out, arguments


def test_what_the_demo_writes(done):
    out, _ = done
    names = sorted(path.name for path in out.iterdir())
    assert names == ["attributions.npz", "gallery.png", "summary.json"]
    assert (out / "gallery.png").read_bytes().startswith(b"\x89PNG")
    arrays = np.load(out / "attributions.npz", allow_pickle=False)
    assert arrays["attention_rollout"].shape == (10, 197)
    assert arrays["integrated_gradients"].shape == (10, 28, 28)
    np.testing.assert_allclose(arrays["attention_rollout"].sum(axis=-1), 1, rtol=1e-5)
    summary = json.loads((out / "summary.json").read_text())
    accuracy = np.mean(arrays["predicted"] == arrays["labels"])
    assert summary["accuracy"] == accuracy
    gradients = summary["methods"]["integrated_gradients"]
    assert 0 <= gradients["converged"] <= 1
    assert gradients["completeness_gap_median"] <= gradients["completeness_gap_p99"]
    assert summary["methods"]["attention_rollout"]["inputs_per_second"] > 0


def test_a_second_run_asks_for_overwrite(done, tmp_path, capsys):
    # In a copy: tests of one file may run in any order.
    out, arguments = tmp_path / "again", [*done[1]]
    shutil.copytree(done[0], out)
    arguments[arguments.index("--out") + 1] = str(out)
    before = (out / "summary.json").read_bytes()
    assert cli.main(arguments) == 2
    assert "not empty; pass --overwrite" in capsys.readouterr().err
    assert (out / "summary.json").read_bytes() == before
    again = [*arguments, "--overwrite", "--limit", "3", "--methods", "saliency"]
    assert cli.main(again) == 0
    assert json.loads((out / "summary.json").read_text())["images"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--limit", "0"], "from 1 to 1000, got 0"),
        (["--limit", "1001"], "from 1 to 1000, got 1001"),
        (["--compare", "1"], "0 or at least 2, got 1"),
        (["--methods", "magic"], "methods are among"),
        (["--steps", "0"], "positive integer, got 0"),
        (["--microbatch", "0"], "positive, got 0"),
    ],
)
def test_wrong_calls_leave_nothing(arguments, said, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["demo", "--out", str(out), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists() or not list(out.iterdir())


def test_a_file_is_no_folder(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_help_and_bad_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["nonsense"])
    assert stopped.value.code == 2


TABLE = np.random.default_rng(0).standard_normal((9, 4), np.float32)


def token_model(tokens):
    """A model that the doctor imports by name."""
    rows = jnp.asarray(TABLE)[tokens]
    seen = jnp.tri(len(tokens), dtype=bool)
    scores = jnp.where(seen, rows @ rows.T, -jnp.inf)
    return (jax.nn.softmax(scores) @ rows)[-1]


def test_doctor_on_the_embedded_model(capsys):
    assert cli.main(["doctor", "--model", "embedded"]) == 0
    said = capsys.readouterr().out
    assert said.count("attention") >= 4
    assert "works" in said


def test_doctor_advises_on_tokens():
    model, known = doctor.find_model("tests.test_cli:token_model")
    assert known == ()
    args = (doctor.parse_input("int32[6]"),)
    sites = tracing.sites(model, *args)
    assert [s.causal for s in sites if s.kind == "attention"] == [True]
    told = doctor.advice(sites, args)
    assert told["attention_rollout"] == "works"
    assert told["integrated_gradients"] == "works, with one score for each token"
    none = doctor.advice(tracing.sites(lambda x: x, *args), args)
    assert "no attention to explain" in none["attention_rollout"]
    assert "look up no embedding" in none["saliency"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "`embedded` or `module:function`, got 'nowhere'"),
        (["nowhere:f"], "cannot be imported"),
        (["math:absent"], "cannot be imported"),
        (["math:pi"], "is not a function"),
        (["math:sin"], "pass --input"),
        (["math:sin", "--input", "28"], "written like float32[28,28], got '28'"),
        (["math:sin", "--input", "floaty[2]"], "no dtype 'floaty'"),
    ],
)
def test_doctor_refuses(arguments, said, capsys):
    assert cli.main(["doctor", "--model", *arguments]) == 2
    assert said in capsys.readouterr().err
