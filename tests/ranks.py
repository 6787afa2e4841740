"""What test_scale.py starts under torchrun: several runs one after the other, as it takes seconds
to start a process.

    torchrun .. ranks.py FOLDER     FOLDER/jobs.json: a list of [script, flags, event]

event: "" or what happens to rank 1 in its n-th update: "stop n" (SIGTERM) or "die n" (SIGKILL, the
time in FOLDER/died). Each rank leaves the exit codes of its jobs, what each printed, and the files
in FOLDER that it opened for writing, in FOLDER/RANK.json.
"""

import contextlib
import io
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from common import runtime


def with_event(event, seed, folder):
    """Machine.seed, which is called once in each update, and in its n-th call the event."""
    how, n = event.split()
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == int(n):
            if how == "die":
                (folder / "died").write_text(str(time.time()))
            os.kill(os.getpid(), dict(stop=signal.SIGTERM, die=signal.SIGKILL)[how])
        return seed(*args, **kwargs)
    return call


def main(folder):
    report, written = folder / f"{runtime.RANK}.json", set()

    def audit(event, args):
        if event != "open" or not isinstance(args[0], (str, Path)):
            return
        path, writing = Path(args[0]), args[2] & (os.O_WRONLY | os.O_RDWR)
        if writing and folder in path.parents and path != report:
            written.add(str(path.relative_to(folder)))

    sys.addaudithook(audit)
    codes, printed = [], []
    for script, argv, event in json.loads((folder / "jobs.json").read_text()):
        seed, sys.argv, said = runtime.Machine.seed, [script, *argv], io.StringIO()
        if event and runtime.RANK == 1:
            runtime.Machine.seed = with_event(event, seed, folder)
        try:
            with contextlib.redirect_stdout(said):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            codes.append(end.code or 0)
        runtime.Machine.seed = seed
        printed.append(said.getvalue())
        report.write_text(json.dumps(dict(codes=codes, printed=printed, written=sorted(written))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
