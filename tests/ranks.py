"""What test_scale.py starts under torchrun: several runs one after the other, as it takes seconds
to start a process.

    torchrun .. ranks.py FOLDER     FOLDER/jobs.json: a list of [script, flags, event]

event: "" or what happens to rank 1 in its n-th update: "stop n" (SIGTERM) or "die n" (SIGKILL, the
time in FOLDER/died). Each rank leaves the exit codes of its jobs, and the files in FOLDER that it
opened for writing, in FOLDER/RANK.json.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import codi
import coconut
from common import runtime

SCRIPTS = {"coconut": coconut, "codi": codi}


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
    codes = []
    for script, argv, event in json.loads((folder / "jobs.json").read_text()):
        seed, sys.argv = runtime.Machine.seed, [f"{script}.py", *argv]
        if event and runtime.RANK == 1:
            runtime.Machine.seed = with_event(event, seed, folder)
        try:
            runtime.run_main(SCRIPTS[script].main)
        except SystemExit as end:
            codes.append(end.code or 0)
        runtime.Machine.seed = seed
        report.write_text(json.dumps(dict(codes=codes, written=sorted(written))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
