"""both_cores.py: what the copy finds counts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux" or os.cpu_count() < 2,
                                reason="one process runs alone")
TESTS = """
import os, time
def test_bad(capfd):
    time.sleep(0.3)                      # so that each process takes one of the two files
    print("process", os.getpid())
    assert capfd.readouterr().out == f"process {os.getpid()}\\n"
    assert os.getpid() == 0
def test_good():
    if os.environ.get("DIES") and os.getpid() != int(os.environ["FIRST"]):
        os._exit(0)
"""
CONFTEST = f"""
import os, sys
sys.path.append({str(Path(__file__).parent)!r})
os.environ["FIRST"] = str(os.getpid())
from both_cores import pytest_runtestloop
"""


@pytest.fixture
def suite(tmp_path):
    """A suite of two files, each with a failure, run."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name in "ab":
        (tmp_path / f"test_{name}.py").write_text(TESTS)

    def run(**env):
        return subprocess.run([sys.executable, "-m", "pytest", "-q", tmp_path], text=True,
                              stdout=subprocess.PIPE, env=os.environ | env)
    return run


def test_failures_of_both(suite):
    done = suite()
    assert done.returncode == 1 and "2 failed, 2 passed" in done.stdout
    assert len(set(re.findall(r"assert (\d+) == 0", done.stdout))) == 2


def test_a_copy_that_dies(suite):
    assert suite(DIES="yes").returncode not in (0, 1)
