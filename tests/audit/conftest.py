"""What most tests compare with."""

import pytest

from tests.audit import harness


@pytest.fixture(scope="session")
def clean(tmp_path_factory):
    """The rows of a run without faults, on four devices."""
    out = tmp_path_factory.mktemp("clean") / "out"
    done = harness.run(out, devices=4)
    assert done.state == "complete" and done.bitwise, done
    return harness.bits(out)
