"""README.md, "Change ten lines": every diff in it applies to this code and trains."""

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest

import test_codi
import test_runs
from conftest import ROOT

SCRIPTS = {"coconut.py": test_runs, "codi.py": test_codi}


def forks():
    """(diff, script, flags) of every ```diff block. The command that trains it is the first one
    after the diff, up to the next diff or heading; without one it is the script that is changed."""
    found = []
    for part in (ROOT / "README.md").read_text().split("```diff\n")[1:]:
        diff, _, after = part.partition("```")
        files = re.findall(r"^\+\+\+ (?:b/)?(\S+)", diff, re.M)
        changed = [file for file in files if file in SCRIPTS]
        script, flags = (changed or ["coconut.py"])[0], []
        text = re.split(r"^#{2,} ", after, flags=re.M)[0]
        command = re.search(r"python (coconut\.py|codi\.py)([^`\n#]*)", text)
        if command and command[1] in (changed or SCRIPTS):
            script, flags = command[1], command[2].split()
        found.append((diff, script, flags))
    return found


FORKS = forks()


def losses(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "train"]


@pytest.fixture
def unchanged(finished, codi_run):
    """{script: training losses of a tiny run as the code is}"""
    return {"coconut.py": losses(finished["plain"]), "codi.py": losses(codi_run)}


@pytest.fixture
def afresh(monkeypatch):
    """A function that runs a script of a copy of the code, all its modules read from there, and
    returns the exit code. (A process of its own would take three seconds to import torch.)"""
    ours = [*(path.stem for path in ROOT.glob("*.py")), "common"]
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ours}

    def run(copy, script, argv):
        for name in kept:
            del sys.modules[name]
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        monkeypatch.setattr(sys, "path", [str(copy), *sys.path])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(copy / script), run_name="__main__")
        assert sys.modules["common"].__path__[0] == str(copy / "common")
        return stop.value.code or 0

    yield run
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
    sys.modules |= kept


def test_there_are_three_forks():
    assert len(FORKS) >= 3


@pytest.mark.parametrize("diff, script, flags", FORKS, ids=range(1, len(FORKS) + 1))
def test_a_fork_trains(data, tmp_path, unchanged, afresh, diff, script, flags):
    """Applied to a copy of the code, the diff changes at most ten lines; the changed script runs to
    its end, and its losses are others: what was changed is reached."""
    added = re.findall(r"^\+(?!\+\+ )", diff, re.M)
    assert 0 < len(added) <= 10
    copy = tmp_path / "copy"
    for file in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")]:
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    alone = os.environ | dict(GIT_CEILING_DIRECTORIES=str(tmp_path))      # of no other repository
    applied = subprocess.run(["git", "apply", "-"], input=diff, cwd=copy, env=alone,
                             capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    argv = [*flags, *SCRIPTS[script].start(data, tmp_path / "run")]
    assert afresh(copy, script, argv) == 0
    found = losses(tmp_path / "run")
    assert found and all(map(math.isfinite, found)) and found != unchanged[script]
