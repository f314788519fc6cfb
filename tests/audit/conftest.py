"""What most tests compare with."""

import pytest

from tests.audit import harness


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run without faults, on four devices; to be copied."""
    out = tmp_path_factory.mktemp("clean") / "out"
    done = harness.run(out, devices=4)
    assert done.state == "complete" and done.bitwise, done
    assert done.computed == 5
    return out


@pytest.fixture(scope="session")
def clean(finished):
    """Its rows."""
    return harness.bits(finished)


@pytest.fixture(autouse=True)
def alone():
    """One test's processes are not the next one's."""
    yield
    harness.leave()
