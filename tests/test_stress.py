"""A short form of stress.py, the stress test that is run by hand; and that it finds what it looks
for."""

import multiprocessing
import random
import sys

import pytest
import torch

import stress
import test_codi
from stress import Ended, Target
from test_runs import same



class Forked:
    """What stress.killed needs of a Popen, of a target run by a fork of this process, which has
    imported torch already."""

    def __init__(self, target, folder):
        def work():
            sys.exit(stress.in_process(target.script, target.flags.split(), folder, 60).code)

        self.process = multiprocessing.get_context("fork").Process(target=work)
        self.process.start()
        self.kill = self.process.kill

    def poll(self):
        return self.process.exitcode

    def wait(self, seconds):
        self.process.join(seconds)

    def communicate(self):
        self.process.join()
        self.returncode = self.process.exitcode
        return "", ""


def started(target, folder):
    return stress.begin(stress.command(target), folder)


@pytest.mark.parametrize("begin, target", [
    (Forked, Target("codi.py", f"{test_codi.SMALL} --dropout 0.1 --data tiny --out run")),
    (started, Target("data_prep.py", "chains --sizes 300,20,20 --out made", "made"))],
    ids=["codi", "data"])
def test_killed_and_started_again(tmp_path, begin, target):
    """After SIGKILL at a random moment all files are whole, and the command that the scripts advise
    ends in the bits of an uninterrupted run."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    stress.fresh(whole)
    assert stress.in_process(target.script, target.flags.split(), whole, 60).code == 0
    expected = stress.left_by(target, whole)
    stress.fresh(folder)
    is_data = target.script == "data_prep.py"
    sign = folder / target.out
    if not is_data:
        sign = sign / "last.pt"
    delay = random.Random(0).uniform(0, 0.005 if is_data else 0.05)
    process = begin(target, folder)
    assert stress.killed(process, delay, sign.exists) or is_data     # data may have been faster
    stress.check_whole(target, folder, expected)
    argv = stress.again(target, folder)[2:]
    assert stress.in_process(target.script, argv, folder, 60).code == 0
    assert same(stress.left_by(target, folder), expected)


@pytest.mark.parametrize("i", range(31, 47))
def test_mutations(tmp_path, known, i):
    """A damaged input ends with exit code 0, or with 2 and one sentence."""
    kind, code, found = stress.case(i, 0, tmp_path, known)
    assert found is None, (kind, code)


REFUSED = Ended(2, "usage: python codi.py\ncodi.py: error: no\n", "")


def test_what_is_wrong_is_found(tmp_path):
    """Tracebacks, other exit codes, no sentence or two, half-written files, code that ran."""
    def wrong(**changed):
        return stress.wrong("codi.py", REFUSED._replace(**changed), tmp_path)

    assert wrong() is None and wrong(code=0, error="") is None
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1\nKeyError: 5\n'
    assert "KeyError" in wrong(code=None, trace=trace)
    assert "exit code 1" in wrong(code=1)
    for error in ("", "no\n", "codi.py: a\ncodi.py: b\n", "codi.py: a\nb\n"):
        assert "one sentence" in wrong(error=error)
    (tmp_path / "metrics.jsonl").write_text('{"loss": NaN}\n')
    assert "no JSON" in wrong()
    (tmp_path / "last.pt.tmp").touch()
    assert "half-written" in wrong()
    torch.save([stress.Code(tmp_path)], tmp_path / "code.pt")
    torch.load(tmp_path / "code.pt", weights_only=False)
    assert "code" in wrong()
