"""The command, its exit codes, and what is read afterwards."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

import xviz_jax as xv
from tests.audit import harness, tiny
from xviz_jax import audit, cli

MODEL = ["--model", "tests.audit.tiny:dense", "--microbatch", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Records in a file, one of them bad."""
    path = tmp_path_factory.mktemp("data") / "d.npz"
    x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    x[7, 3] = np.nan
    ids = np.array([f"r{number}" for number in range(40)])
    np.savez(path, x=x, id=ids, label=np.arange(40) % 4)
    return path


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """What the command left."""
    out = tmp_path_factory.mktemp("command") / "out"
    methods = ["--methods", "saliency,input_x_gradient", "--shard-size", "16"]
    code = cli.main(["audit", *MODEL, "--data", str(data), "--out", str(out), *methods])
    assert code == 0
    return out


def test_what_the_command_leaves(done, data, capsys):
    names = sorted(path.name for path in done.iterdir())
    assert names == [
        "audit.log",
        "lock",
        "quarantine",
        "run.json",
        "shards",
        "state",
        "summary.json",
    ]
    said = json.loads((done / "summary.json").read_text())
    assert said["state"] == "complete"
    assert (said["explained"], said["quarantined"], said["shards"]) == (39, 1, 3)
    assert said["bitwise"] is True
    assert not [*(done / "state").iterdir()]
    table = harness.read(done)
    assert table.column_names[:4] == ["id", "index", "label", "status"]
    x = np.load(data)["x"]
    for row in table.slice(0, 3).to_pylist():
        expected = xv.saliency(tiny.dense)(x[row["index"]])
        np.testing.assert_allclose(
            row["scores"]["saliency"], expected.scores, rtol=1e-5
        )
        np.testing.assert_allclose(row["output"], expected.output, rtol=1e-6)
        assert row["prediction"] == row["target"]


def test_a_rerun_does_nothing(done, data, capsys):
    before = {path: path.stat().st_mtime_ns for path in done.glob("shards/*")}
    command = ["audit", *MODEL, "--data", str(data), "--out", str(done)]
    options = ["--methods", "saliency,input_x_gradient", "--shard-size", "16"]
    assert cli.main([*command, *options]) == 0
    assert "0 of 3 shards" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in done.glob("shards/*")}
    assert cli.main([*command, "--methods", "saliency"]) == 2
    assert "pass --new-run to put it aside" in capsys.readouterr().err


def test_a_lazy_table(done):
    found = audit.open(done)
    assert found.complete and len(found) == 39
    assert found.methods == ["saliency", "input_x_gradient"]
    assert found.quarantine.to_table().column("id").to_pylist() == ["r7"]
    some = found.slice(5, 20)
    assert some.column("index").to_pylist() == [5, 6, *range(8, 20)]
    wanted = found.slice(
        where=pc.field("prediction") == 2, columns=["id", "prediction"]
    )
    assert wanted.column_names == ["id", "prediction"]
    assert set(wanted.column("prediction").to_pylist()) == {2}
    one = found.slice(0, 16, columns=["scores.saliency"])
    assert one.column_names == ["saliency"]
    (row,) = found.rows("r3")
    assert row["scores"]["saliency"].shape == (8,)
    assert found.rows("r7") == found.rows("nobody") == []
    assert found.summary["state"] == "complete"
    with pytest.raises(ValueError, match="runs upward from 0"):
        found.slice(3, 2)


def test_a_result_that_is_not_complete(done, tmp_path):
    with pytest.raises(ValueError, match="holds no audit"):
        audit.open(tmp_path)
    for path in done.rglob("*"):
        if path.is_file() and path.name != "00000001.parquet":
            copy = tmp_path / path.relative_to(done)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    found = audit.open(tmp_path)
    assert found.missing == [1] and not found.complete
    assert "1 shards missing" in repr(found)
    assert found.slice(14, 34).column("index").to_pylist() == [14, 15, 32, 33]


def test_a_file_of_settings(data, tmp_path, capsys):
    (tmp_path / "audit.toml").write_text(
        f"""
        model = "tests.audit.tiny:dense"
        data = "{data}"
        target = "label"
        microbatch = 4
        max_bad_fraction = 0.5
        [methods.integrated_gradients]
        steps = 4
        """
    )
    out = tmp_path / "out"
    options = ["--config", str(tmp_path / "audit.toml"), "--limit", "10"]
    extra = ["--option", "integrated_gradients.rule=midpoint"]
    assert cli.main(["audit", *options, *extra, "--out", str(out)]) == 0
    said = audit.open(out).manifest.said
    assert said["methods"] == {"integrated_gradients": {"steps": 4, "rule": "midpoint"}}
    assert said["records"] == 10
    targets = harness.read(out).column("target").to_pylist()
    assert targets == [n % 4 for n in range(10) if n != 7]


def test_two_classes(data, tmp_path):
    command = ["audit", *MODEL, "--data", str(data), "--out", str(tmp_path)]
    options = ["--methods", "saliency", "--target", "2,1", "--limit", "4"]
    assert cli.main([*command, *options]) == 0
    x = np.load(data)["x"]
    for row in harness.read(tmp_path).to_pylist():
        logits = np.asarray(tiny.dense(x[row["index"]]))
        np.testing.assert_allclose(row["output"], logits[2] - logits[1], rtol=1e-5)
        assert row["target"] is None


def test_a_dry_run(data, tmp_path, capsys):
    command = ["audit", *MODEL, "--data", str(data), "--dry-run"]
    assert cli.main([*command, "--methods", "saliency", "--devices", "1"]) == 0
    said = capsys.readouterr().out
    assert "40 records in 1 shards of 1,024, 4 at once on each of 1 devices" in said
    assert "39  float32[8]" in said and "1  bad" in said
    assert "MiB" in said and "records/s measured on the first 40," in said
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "magic"], "a method is one of"),
        (["--methods", "attention_rollout"], "attention"),
        (["--option", "saliency=3"], "METHOD.NAME=VALUE"),
        (["--option", "saliency.fast=3"], "takes the options"),
        (["--target", "9"], "a class below 4, got 9"),
        (["--target", "frog"], "got 'frog'"),
        (["--microbatch", "many"], "auto or a positive integer"),
        (["--shard-size", "0"], "positive integer, got 0"),
        (["--limit", "0"], "positive integer, got 0"),
        (["--max-bad-fraction", "2"], "from 0 to 1"),
        (["--deadline", "0"], "a time in seconds"),
        (["--data", "nowhere.npz"], "nowhere"),
        (["--out", "s3://bucket/out"], "got the address s3://bucket/out"),
        (["--weights-sha256", "0"], "is for a checkpoint"),
        (["--model", "nowhere:f"], "cannot be imported"),
        (["--model", "nowhere"], "nowhere"),
        (["--config", "nowhere.toml"], "no TOML file"),
    ],
)
def test_bad_calls(arguments, said, data, tmp_path, capsys):
    command = ["audit", *MODEL, "--data", str(data), "--out", str(tmp_path / "o")]
    assert cli.main([*command, "--methods", "saliency", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not [*tmp_path.rglob("*.parquet")]


def test_other_ends(data, tmp_path, capsys, monkeypatch):
    command = ["audit", *MODEL, "--data", str(data), "--methods", "saliency"]
    assert cli.main(command) == 2
    assert "pass --out" in capsys.readouterr().err
    out = ["--out", str(tmp_path / "a")]
    assert cli.main([*command, *out, "--max-bad-fraction", "0"]) == 3
    assert "NONFINITE_INPUT" in capsys.readouterr().err
    monkeypatch.setenv("XVIZ_FAILPOINT", "before_rename:full")
    assert cli.main([*command, "--out", str(tmp_path / "b")]) == 1
    assert "No space left" in capsys.readouterr().err


def test_an_address_is_no_output(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("gs://bucket/out", Path("s3://bucket/out")):
        with pytest.raises(ValueError, match="a folder in a file system of this"):
            audit.run(out, model=tiny.MODEL, data=str(data))
    assert not [*tmp_path.iterdir()]


def test_how_far_a_run_is(tmp_path):
    known = audit.Progress(
        records=2000, done=500, quarantined=3, unconverged=2, rate=50.0, devices=4
    )
    assert known.seconds_left == 30
    assert str(known) == (
        "500 of 2,000 records, 50.0/s, 0:00:30 left, 3 quarantined, 2 unconverged, "
        "4 devices"
    )
    begun = dataclasses.replace(known, done=0, rate=0.0)
    assert str(begun).startswith("0 of 2,000 records, 0.0/s, - left")
    seen = []
    source = tiny.Records(8, {2: "nan", 5: "inf"})
    methods = {"integrated_gradients": {"max_evaluations": 17, "tolerance": 1e-4}}
    given = {"model": "tests.audit.tiny:steps", "data": source, "methods": methods}
    found = harness.run(tmp_path, **given, devices=2, progress=seen.append)
    done = [each.done for each in seen]
    assert done == sorted(done) and 0 < done[0] < done[-1] == 8
    # Before the first commit, a pass over the records says nothing of the others.
    assert (seen[0].rate, seen[0].seconds_left) == (0, None)
    last = seen[-1]
    assert (last.records, last.quarantined, last.unconverged) == (8, 2, 6)
    assert last.devices == len(found.devices) == 2
    assert last.rate > 0 and last.seconds_left == 0


def test_what_data_says_commands_no_terminal(tmp_path, capsys):
    x = np.full((2, 8), np.nan, np.float32)
    np.savez(tmp_path / "d.npz", x=x, id=np.array(["a", "\x1b[31mred"]))
    command = ["audit", *MODEL, "--data", str(tmp_path / "d.npz")]
    out = ["--out", str(tmp_path / "o"), "--methods", "saliency"]
    assert cli.main([*command, *out]) == 3
    said = capsys.readouterr().err
    assert "[31mred: NONFINITE_INPUT" in said and "\x1b" not in said


def test_ids_are_counted(tmp_path, capsys):
    """29."""
    x, ids = np.ones((5, 8), np.float32), np.array(["a", "b", "a", "", "a"])
    np.savez(tmp_path / "d.npz", x=x, id=ids)
    command = ["audit", *MODEL, "--data", str(tmp_path / "d.npz"), "--methods"]
    out = ["--out", str(tmp_path / "o"), "--duplicates", "number"]
    assert cli.main([*command, "saliency", *out]) == 0
    said = capsys.readouterr().err
    assert "2 ids renamed" in said and "1 ids missing" in said
    summary = audit.open(tmp_path / "o").summary
    assert summary["ids"] == {"renamed": 2, "missing": 1}
    names = harness.read(tmp_path / "o").column("id").to_pylist()
    assert names == ["a", "b", "a#2", "3", "a#4"]


def test_the_embedded_model(tmp_path, capsys):
    """The default, with one method of each school."""
    images, labels = xv.models.embedded.images()
    np.savez(tmp_path / "d.npz", image=images[:3], label=labels[:3])
    methods = "attention_rollout,integrated_gradients"
    options = ["--option", "integrated_gradients.steps=2", "--microbatch", "2"]
    command = ["audit", "--data", str(tmp_path / "d.npz"), "--out", str(tmp_path / "o")]
    command += ["--methods", methods, *options, "--devices", "1"]
    assert cli.main([*command, "--target", "Ankle boot"]) == 0
    rows = audit.open(tmp_path / "o").rows("2")
    assert rows[0]["scores"]["attention_rollout"].shape == (197,)
    assert rows[0]["scores"]["integrated_gradients"].shape == (28, 28)
    assert rows[0]["target"] == 9 and rows[0]["label"] == str(labels[2])
    command[command.index("--out") + 1] = str(tmp_path / "pair")
    assert cli.main([*command, "--target", "Ankle boot,Bag"]) == 0
    assert cli.main([*command, "--target", "Ankle boot,Frog"]) == 2
