"""Arrays of strangers, given to the commands that read a whole file of them."""

import pickle
import zipfile

import numpy as np
import pytest

from tests.audit.test_attacks import Canary, npy
from xviz_jax import arrays, cli


def test_what_was_written_is_read(tmp_path):
    rng = np.random.default_rng(0)
    found = {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b": np.asfortranarray(rng.integers(0, 9, (4, 5))),
        "c": np.array(["one", "two"]),
        "d": np.float64(3),
        "e": np.zeros((0, 4)),
    }
    np.savez(tmp_path / "a.npz", **found)
    np.savez_compressed(tmp_path / "b.npz", **found)
    for name in ("a.npz", "b.npz"):
        read = arrays.load(tmp_path / name)
        assert read.keys() == found.keys()
        for key, value in found.items():
            np.testing.assert_array_equal(read[key], value)
            assert read[key].dtype == np.asarray(value).dtype
    for key, value in found.items():
        np.save(tmp_path / "one.npy", value)
        np.testing.assert_array_equal(arrays.load(tmp_path / "one.npy")[""], value)
        assert arrays.load(tmp_path / "one.npy").keys() == {""}, key


def hostile(path):
    """Files by name, and what is said of them."""
    np.savez_compressed(path / "bomb.npz", x=np.zeros((1024, 1024), np.float32))
    np.save(path / "large.npy", np.zeros(2**18, np.float64))
    (path / "claims.npy").write_bytes(npy((2**40, 8), "<f8", bytes(64)))
    (path / "negative.npy").write_bytes(npy((-1, 8), "<f8", bytes(64)))
    np.save(path / "code.npy", np.array([Canary(path / "canary")]), allow_pickle=True)
    (path / "raw.npy").write_bytes(pickle.dumps(Canary(path / "canary")))
    with zipfile.ZipFile(path / "member.npz", "w") as archive:
        archive.writestr("x.npy", pickle.dumps(Canary(path / "canary")))
    good = (path / "bomb.npz").read_bytes()
    (path / "cut.npz").write_bytes(good[:-40])
    changed = bytearray(good)
    changed[len(good) // 3] ^= 255
    (path / "changed.npz").write_bytes(changed)
    (path / "empty.npy").write_bytes(b"")
    return {
        "bomb.npz": "4194304 bytes of arrays, the most are 1048576",
        "large.npy": "2097152 bytes of arrays, the most are 1048576",
        "claims.npy": "70368744177664 bytes, and has 64",
        "negative.npy": "rows of values are wanted",
        "code.npy": "pickled and could run code",
        "raw.npy": "is no array",
        "member.npz": "is no array",
        "cut.npz": "truncated or no npz",
        "changed.npz": "damaged|declares|no array|truncated",
        "empty.npy": "is no array",
    }


def test_nothing_is_unpickled_and_no_memory_is_taken(tmp_path):
    for name, said in hostile(tmp_path).items():
        most = 2**30 if name == "changed.npz" else 2**20
        with pytest.raises(ValueError, match=said):
            arrays.load(tmp_path / name, most=most)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["compare", "--out", "OUT", "--data"], "holds no arrays: "),
        (["explain", "--model", "embedded", "--array"], "holds no array: "),
    ],
)
def test_the_commands_read_so(command, said, tmp_path, capsys):
    command = [str(tmp_path / "out") if each == "OUT" else each for each in command]
    hostile(tmp_path)
    for name in ("claims.npy", "code.npy", "raw.npy", "cut.npz"):
        assert cli.main([*command, str(tmp_path / name)]) == 2
        assert f"{name} {said}" in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()
