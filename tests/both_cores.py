"""The suite on two cores: a forked copy of pytest runs test files too, and sends what came out.

pytest-xdist does more, but would be one more package to install. conftest.py imports the hook at
the end, and so pytest finds it. With one file, one core, --pdb or --basetemp, pytest runs alone.
"""

import itertools
import os
import pickle
import sys
from pathlib import Path


class Reports(list):
    """What the copy has in place of a terminal."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        hook = self.config.hook
        self.append(hook.pytest_report_to_serializable(config=self.config, report=report))


def run(session, files, queue):
    """Run files until none is left. queue: a pipe of their numbers, from which whoever is free
    takes the next."""
    numbers = iter(lambda: os.read(queue, 1), b"")
    items = itertools.chain.from_iterable(files[number[0]] for number in numbers)
    for item, following in itertools.pairwise(itertools.chain(items, [None])):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail or session.shouldstop:         # -x: nor does the other one go on
            os.read(queue, 256)
            break


def run_copy(session, files, queue, out):
    """The copy: it captures its own output, runs, and writes its reports to the pipe `out`."""
    plugins = session.config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.getplugin("capturemanager").stop_global_capturing()
    plugins.getplugin("capturemanager").start_global_capturing()
    reports = Reports(session.config)
    plugins.register(reports)
    run(session, files, queue)
    with open(out, "wb") as f:
        pickle.dump(list(reports), f)


def pytest_runtestloop(session):
    """Run what pytest has collected; None leaves that to pytest itself."""
    config, option = session.config, session.config.option
    files = [list(items) for _, items in itertools.groupby(session.items, lambda item: item.path)]
    if (option.usepdb or option.collectonly or option.basetemp or session.testsfailed
            or len(files) < 2 or os.cpu_count() < 2 or sys.platform != "linux"):
        return None
    files.sort(key=lambda items: -Path(items[0].path).stat().st_size)        # long ones first
    (queue, fill), (read, write) = os.pipe(), os.pipe()
    os.write(fill, bytes(range(len(files))))
    os.close(fill)
    copy = os.fork()
    if copy == 0:
        try:
            run_copy(session, files, queue, write)
        finally:
            os._exit(0)
    os.close(write)
    run(session, files, queue)
    with open(read, "rb") as f:
        for report in pickle.load(f):            # an EOFError if the copy has died
            report = config.hook.pytest_report_from_serializable(config=config, data=report)
            config.hook.pytest_runtest_logreport(report=report)
    os.waitpid(copy, 0)
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)
    return True
