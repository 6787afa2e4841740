"""The machine against itself, run by hand; a short form is in test_stress.py.

    python tests/stress.py --kills 50 --mutations 1000

Kills: the scripts that train and data_prep.py are ended by SIGKILL at random moments and started
again until they finish. What they leave then is, bit for bit, what an uninterrupted run leaves:
weights, states of the optimizers, metrics.jsonl without seconds, data files.

Mutations: data files, checkpoints and flags are damaged at random and given to the scripts. They
must end with exit code 0, or with 2 and one sentence: no traceback, no half-written file, no code
of a checkpoint run. The damaged input of a case that fails stays in --keep; --only N repeats it.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

import torch
from tqdm import tqdm

import coconut
import codi
import data_prep
import simcot
import soft_grpo
import test_codi
import test_runs
import test_soft_grpo
from common import runtime
from common.puzzles import SPLITS, chains
from common.run import Run

TRAINING = {"coconut.py": coconut, "codi.py": codi, "simcot.py": simcot, "soft_grpo.py": soft_grpo}
SCRIPTS = TRAINING | {"data_prep.py": data_prep}


def write_tiny(folder):
    """A data set of two-step chain problems, 24 to train on."""
    with contextlib.redirect_stdout(io.StringIO()):
        data_prep.write_dataset(folder, chains((24, 6, 8), n_steps=2, limit=8))


# ---------------------------------------------------------------- kills


class Target(NamedTuple):
    """A command to be killed. What it writes is in `out`, next to its data, both in one folder."""
    script: str
    flags: str
    out: str = "run"


# about two seconds of work after the imports, with a checkpoint at every third update
TARGETS = (
    Target("coconut.py", f"{test_runs.SMALL} --steps-stage-0 20 --steps-per-stage 12 "
                         f"--steps-last 18 {test_runs.VARIANTS['mixing']} --data tiny --out run"),
    Target("codi.py", f"{test_codi.SMALL} --steps 50 --dropout 0.1 --data tiny --out run"),
    Target("simcot.py", f"{test_runs.SMALL} --steps-stage-0 15 --steps-per-stage 10 "
                        f"--steps-last 12 {test_runs.VARIANTS['mixing']} --data tiny --out run"),
    Target("soft_grpo.py", f"{test_soft_grpo.SMALL} --steps 20 --thoughts gumbel --data tiny "
                           "--out run"),
    Target("data_prep.py", "chains --sizes 300,20,20 --out made", "made"),
)


def command(target, *more):
    return [sys.executable, str(ROOT / target.script), *target.flags.split(), *more]


def again(target, folder):
    """The command that goes on where a killed one was: what the scripts' own messages advise."""
    out = folder / target.out
    if target.script == "data_prep.py" or not out.exists():
        return command(target)
    if (out / "last.pt").exists():
        return [sys.executable, str(ROOT / target.script), "--resume", "--out", target.out]
    return command(target, "--overwrite")


def begin(argv, folder):
    env = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.Popen(argv, cwd=folder, env=env, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def killed(process, delay, ready=None):
    """Was the process ended by SIGKILL? It comes `delay` seconds after ready() is true (without
    one, after the start)."""
    while ready is not None and process.poll() is None and not ready():
        time.sleep(0.0005)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    process.kill()
    error = process.communicate()[1]
    if process.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(f"exit code {process.returncode}: {error[-2000:]}")
    return process.returncode != 0


def files_of(folder):
    return {path.name: path.read_bytes() for path in map(folder.joinpath, names_of_data())
            if path.exists()}


def names_of_data():
    return [f"{split}.json" for split in SPLITS]


def left_by(target, folder):
    """What a finished command leaves and what must not depend on kills."""
    if target.script == "data_prep.py":
        return files_of(folder / target.out)
    return test_runs.outcome(folder / target.out)


def check_whole(target, folder, expected):
    """After a kill every file is whole or absent. Raises what reading it raises."""
    out = folder / target.out
    if target.script == "data_prep.py":
        for name, content in files_of(out).items():
            assert content == expected[name], f"{name} is half-written"
    else:
        for path in out.glob("*.pt"):
            torch.load(path, weights_only=True)


class Timing(NamedTuple):
    """Seconds: when the imports are done, and when all is."""
    imports: float
    total: float


def reference(target, folder):
    """An uninterrupted run in a fresh folder: (what it leaves, its Timing)."""
    fresh(folder)
    module = target.script.removesuffix(".py")
    times = []
    for argv, where in (([sys.executable, "-c", f"import {module}"], ROOT),
                        (command(target), folder)):
        start = time.perf_counter()
        assert not killed(begin(argv, where), 600)
        times.append(time.perf_counter() - start)
    return left_by(target, folder), Timing(*times)


def fresh(folder):
    folder.mkdir(parents=True)
    write_tiny(folder / "tiny")


def moment(target, folder, timing, rng):
    """(delay, ready) of a random kill. Data is written in some milliseconds: to hit them, half of
    the kills wait for the folder."""
    if target.script == "data_prep.py" and rng.random() < 0.5:
        return rng.uniform(0, 0.02), (folder / target.out).exists
    return rng.uniform(0.9 * timing.imports, 0.98 * timing.total), None


def trial(target, folder, expected, timing, rng, most):
    """One run, killed at random moments, at most `most` times, and started again until it ends.
    -> (kills, whether what it leaves is as expected)"""
    fresh(folder)
    argv, kills = command(target), 0
    while kills < most and killed(begin(argv, folder), *moment(target, folder, timing, rng)):
        kills += 1
        check_whole(target, folder, expected)
        argv = again(target, folder)
    if kills == most:
        assert not killed(begin(argv, folder), 600)
    return kills, test_runs.same(left_by(target, folder), expected)


def kill_all(n, seed, keep):
    """n kills, spread over TARGETS. -> {what: count}, and the failures as sentences."""
    rng, counts, failures = random.Random(seed), collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        known = {t: reference(t, folder / f"whole-{t.script}") for t in TARGETS}
        i = 0
        while counts["kills"] < n:
            target = min(TARGETS, key=lambda t: counts[t.script])
            where = folder / f"trial-{i}"
            try:
                kills, equal = trial(target, where, *known[target], rng,
                                     min(4, n - counts["kills"]))
            except Exception as error:           # of a damaged file: whatever reading it raises
                kills, equal = 1, False
                traceback.print_exception(error)
            counts.update(kills=kills, resumed=int(kills > 0), equal=int(kills > 0 and equal))
            counts[target.script] += kills
            if not equal:
                failures.append(f"trial {i}, {target.script}: differs from an uninterrupted run")
                shutil.copytree(where, keep / f"trial-{i}", dirs_exist_ok=True)
            shutil.rmtree(where)
            i += 1
    return counts, failures


# ---------------------------------------------------------------- one call in this process


class TimeUp(BaseException):
    """A case that still runs was accepted; nothing in the scripts may catch it."""


class Ended(NamedTuple):
    code: int | None         # None: still running when its time was up
    error: str               # stderr
    trace: str               # of an exception that left the script, or ""


def time_up(*_):
    raise TimeUp


def in_process(script, argv, folder, seconds):
    """`python SCRIPT ARGV` in this process, in a folder, for at most so many seconds: an Ended."""
    before = os.getcwd(), sys.argv, torch.get_rng_state()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    error, code, trace = io.StringIO(), None, ""
    os.chdir(folder)
    sys.argv = [script, *map(str, argv)]
    signal.signal(signal.SIGALRM, time_up)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                runtime.run_main(SCRIPTS[script].main)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    except SystemExit as stop:
        code = stop.code or 0
    except TimeUp:
        pass
    except BaseException as stop:
        trace = "".join(traceback.format_exception(stop))
    finally:
        for bar in list(tqdm._instances):
            bar.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
        os.chdir(before[0])
        sys.argv = before[1]
        torch.set_rng_state(before[2])
    return Ended(code, error.getvalue(), trace)


def wrong(script, ended, folder):
    """What is wrong with how a script ended, in words, or None."""
    if ended.trace or "Traceback" in ended.error:
        lines = (ended.trace or ended.error).split("Traceback")[-1].splitlines()[1:]
        what = next(line for line in lines if not line.startswith(" "))
        ours = [line.strip() for line in lines if str(ROOT) in line and "stress.py" not in line]
        return f"a traceback: {what[:200]} ({ours[-1] if ours else ''})"
    if ended.code is not None and ended.code not in (0, 2):
        return f"exit code {ended.code}"
    lines = [line for line in ended.error.split("\n") if line.strip()]
    said = [line for line in lines if line.startswith((f"{script}: ", f"{script} "))]
    if ended.code == 2 and (len(said) != 1 or lines[-1] != said[0]):
        return f"not one sentence as the last line of stderr: {lines[-3:]}"
    if (folder / "RAN").exists():
        return "code in the input was run"
    half = [path.name for path in folder.rglob("*.tmp")]
    if ended.code is not None and half:
        return f"half-written: {half}"
    for path in folder.rglob("metrics.jsonl"):
        for line in path.read_text().splitlines():
            if "NaN" in line or "Infinity" in line:
                return f"no JSON in metrics.jsonl: {line[:80]}"
    return None


# ---------------------------------------------------------------- mutations


class Code:
    """Pickled into a checkpoint: makes the folder RAN if the file is read carelessly."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "RAN"),)


JUNK = (None, True, -1, 0, 3, 10**30, -10**18, 1e308, 1e-320, float("nan"), float("inf"), "", " ",
        "5", "nan", "\ud83d", "<|endoftext|>", "### 5", "x" * 3000, [], {}, [[]], {"a": 1},
        [0, "a"])
WORDS = ("", " ", "0", "-1", "1", "2", "7", "0.5", "-0.5", "1e9", "1e308", "1e-320", "nan", "inf",
         "-inf", "9" * 30, "9" * 5000, "1_000", "0x10", "\u0661\u0662", "\u00bd", "\u00b2",
         "None", "true", "x", "..", ".", "x/y", "/dev/null", "/proc/nowhere", "x" * 300, "a\nb",
         "%s", "{}", "--", "\udcff", "1,2", "0,0,0", "1,1,1", "999999999", "2147483648", "auto",
         "cuda:7", "tiny", "best.pt")
NETWORK = ("init", "tokenizer", "compile", "recipe", "table")    # may download, or take minutes


def bytes_changed(content, rng):
    """Some bytes flipped, cut out or doubled, or the end cut off."""
    content = bytearray(content)
    how = rng.choice(("flip", "flip", "cut", "out", "twice"))
    at = rng.randrange(len(content))
    if how == "cut":
        return bytes(content[:at])
    if how == "flip":
        for _ in range(rng.choice((1, 3, 30))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(content)
    piece = content[at:at + rng.choice((1, 10, 500))]
    content[at:at + len(piece)] = b"" if how == "out" else piece + piece
    return bytes(content)


def places(value, above=()):
    """The paths of all values in nested dicts and lists: tuples of keys."""
    found = [above] if above else []
    if isinstance(value, dict):
        for key, below in value.items():
            found += places(below, (*above, key))
    elif isinstance(value, list):
        for i, below in enumerate(value):
            found += places(below, (*above, i))
    return found


def place(value, rng):
    """A random path in `value`: at a random depth, so that the few keys at the top are met too."""
    found = places(value)
    depth = rng.choice(sorted({len(path) for path in found}))
    return rng.choice([path for path in found if len(path) == depth])


def tensor_changed(tensor, rng):
    """A tensor with a value that is not finite, or of another shape or dtype."""
    tensor = tensor.clone()
    how = rng.choice(("nan", "inf", "shape", "empty", "half", "int", "complex", "huge"))
    if how in ("nan", "inf", "huge") and tensor.is_floating_point() and tensor.numel():
        value = dict(nan=float("nan"), inf=float("inf"), huge=1e38)[how]
        tensor.view(-1)[rng.randrange(tensor.numel())] = value
        return tensor
    if how in ("half", "int", "complex"):
        return tensor.to(dict(half=torch.float16, int=torch.int64, complex=torch.complex64)[how])
    return tensor[None] if how == "shape" else tensor.new_empty(0)


def value_changed(value, rng, junk=JUNK):
    """Nested dicts and lists with one value deleted, replaced or swapped, in place."""
    *above, key = place(value, rng)
    holder = value
    for step in above:
        holder = holder[step]
    old, how = holder[key], rng.choice(("delete", "junk", "junk", "swap", "name"))
    if isinstance(old, torch.Tensor) and rng.random() < 0.7:
        holder[key] = tensor_changed(old, rng)
    elif how == "delete":
        del holder[key]
    elif how == "name" and isinstance(holder, dict):
        holder[rng.choice(("", "x", "question ", 5))] = holder.pop(key)
    elif how == "swap":
        other = place(value, rng)[0]
        holder[key] = value[other] if isinstance(value[other], (str, int)) else str(old)[:100]
    else:
        holder[key] = rng.choice(junk)


def tiny_flags(script):
    """{flag: its values} of a run of a few updates."""
    staged = "--stage-max 1 --steps-stage-0 2 --steps-per-stage 2 --steps-last 2"
    small = {"coconut.py": f"{test_runs.SMALL} {staged}",
             "codi.py": f"{test_codi.SMALL} --steps 4 --eval-every 2",
             "simcot.py": f"{test_runs.SMALL} {staged}",
             "soft_grpo.py": f"{test_soft_grpo.SMALL} --steps-start 2 --steps 2"}[script]
    pairs = [part.split() for part in f" {small}".split(" --")[1:]]
    return {f"--{name}": value for name, *value in pairs} | {"--data": ["tiny"], "--out": ["run"]}


def joined(flags):
    """The argv of {flag: values}."""
    return [word for flag, values in flags.items() for word in (flag, *values)]


def mutate_data(rng, folder, known):
    """A data folder with a damaged file, as a list or as JSON Lines."""
    path = folder / "tiny" / rng.choice(names_of_data())
    items = json.loads(path.read_text())
    for _ in range(rng.choice((0, 1, 1, 2))):
        value_changed(items, rng)
    if rng.random() < 0.5:
        content = "".join(json.dumps(item) + "\n" for item in items).encode()
    else:
        content = json.dumps(items).encode()
    if rng.random() < 0.5 and content:
        content = bytes_changed(content, rng)
    path.write_bytes(content)
    choices = [("data_prep.py", ["stats", "tiny"]),
               ("data_prep.py", ["gsm8k-nl", "--from", f"tiny/{path.name}", "--out", "made"]),
               ("data_prep.py", ["prontoqa", "--from", f"tiny/{path.name}", "--out", "made"]),
               *((script, joined(tiny_flags(script))) for script in TRAINING)]
    return rng.choice(choices)


def mutate_checkpoint(rng, folder, known):
    """A damaged best.pt or last.pt, evaluated, begun from or resumed."""
    script, use = rng.choice(list(known)), rng.choice(("--eval-only", "--init", "--resume"))
    content = known[script]["last.pt" if use == "--resume" else "best.pt"]
    if rng.random() < 0.3:
        content = bytes_changed(content, rng)
    else:
        state = torch.load(io.BytesIO(content), weights_only=True)
        for _ in range(rng.choice((1, 1, 2))):
            value_changed(state, rng, (*JUNK, Code(folder), Code(folder), torch.zeros(2, 2)))
        f = io.BytesIO()
        torch.save(state, f)
        content = f.getvalue()
    (folder / "run").mkdir()
    name = "last.pt" if use == "--resume" else "best.pt"
    (folder / "run" / name).write_bytes(content)
    if use == "--resume":
        (folder / "run" / "metrics.jsonl").write_bytes(known[script]["metrics.jsonl"])
        return script, ["--resume", "--out", "run"]
    if use == "--eval-only":
        return script, ["--eval-only", "run/best.pt", "--data", "tiny"]
    flags = tiny_flags(script) | {"--init": ["run/best.pt"], "--out": ["other"]}
    for flag in ("--n-layer", "--n-head", "--n-embd", "--block-size"):
        flags.pop(flag, None)
    return script, joined(flags)


def mutate_flags(rng, folder, known):
    """Flags added, left out, or with other values."""
    script = rng.choice(list(SCRIPTS))
    if script == "data_prep.py":
        name = rng.choice(("chains", "chains-mixed", "prosqa-mini", "prontoqa", "stats"))
        flags = [flag for flag in data_prep.COMMANDS[name][2] if flag.startswith("--")]
        argv = [name, "tiny"] if name == "stats" else [name, "--sizes", "12,3,3", "--out", "made"]
        for _ in range(rng.choice((1, 1, 2))):
            argv += [rng.choice([*flags, "--nothing"]), rng.choice(WORDS)]
        return script, argv
    flags, settings = tiny_flags(script), SCRIPTS[script].SETTINGS
    own = [f"--{line[0].replace('_', '-')}" for lines in settings.values() for line in lines
           if line[0] not in NETWORK]
    for _ in range(rng.choice((1, 1, 2, 3))):
        how = rng.choice(("value", "value", "add", "out"))
        if how == "out":
            del flags[rng.choice([flag for flag in flags if flag not in ("--data", "--out")])]
        else:
            flag = rng.choice(list(flags) if how == "value" else own)
            flags[flag] = [rng.choice(WORDS)] if rng.random() < 0.9 else []
    return script, joined(flags)


MUTATIONS = {"data": mutate_data, "checkpoint": mutate_checkpoint, "flags": mutate_flags}


def checkpoints(folder):
    """{script: {file: bytes}} of finished tiny runs."""
    found = {}
    for script in TRAINING:
        fresh(folder / script)
        argv = joined(tiny_flags(script))
        assert in_process(script, argv, folder / script, 600).code == 0
        out = folder / script / "run"
        found[script] = {path.name: path.read_bytes() for path in out.iterdir()}
    for script in found:                         # last.pt of a run that is not over
        out = folder / script / "run"
        shutil.rmtree(out)
        argv, original = joined(tiny_flags(script)), Run.step

        def step(run, *what, **where):
            original(run, *what, **where)
            if run.at["done"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        Run.step = step
        try:
            assert in_process(script, argv, folder / script, 600).code == 130
        finally:
            Run.step = original
        for name in ("last.pt", "metrics.jsonl"):
            found[script][name] = (out / name).read_bytes()
    return found


def case(i, seed, keep, known, seconds=6):
    """Case i of a seed. -> (kind, exit code, what is wrong or None); its folder stays if something
    is."""
    rng = random.Random(f"{seed}-{i}")
    kind = rng.choice(list(MUTATIONS))
    above = keep / f"case-{i}"                   # `--out ..` must not leave it
    folder = above / "here"
    shutil.rmtree(above, ignore_errors=True)
    fresh(folder)
    script, argv = MUTATIONS[kind](rng, folder, known)
    ended = in_process(script, argv, folder, seconds)
    # a newline that was typed makes no second sentence of an error that quotes it
    ended = ended._replace(error=ended.error.replace("a\nb", "a b"))
    found = wrong(script, ended, folder)
    if found is None:
        shutil.rmtree(above)
    else:
        (above / "command.json").write_text(json.dumps([script, *argv]))
        (above / "stderr.txt").write_text(ended.error + ended.trace, errors="backslashreplace")
    return kind, ended.code, found


def mutate_all(cases, seed, keep):
    """The cases of a seed. -> {what: count}, and the failures as sentences."""
    counts, failures = collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        known = checkpoints(Path(folder))
    for i in tqdm(cases, desc="mutations", file=sys.__stderr__, disable=len(cases) < 9):
        kind, code, found = case(i, seed, keep, known)
        if found is not None:
            failures.append(f"case {i} ({kind}): {found}")
            print(failures[-1].encode(errors="backslashreplace").decode(), flush=True)
        result = {0: "accepted", 2: "refused", None: "accepted, cut short"}
        counts["mutations"] += 1
        counts["failed" if found else result[code]] += 1
    return counts, failures


# ---------------------------------------------------------------- the command line


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--mutations", type=int, default=1000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--keep", type=Path, default=Path("stress-failures"))
    p.add_argument("--only", type=int, help="repeat this case of --seed, and nothing else")
    args = p.parse_args()
    keep = args.keep.resolve()
    keep.mkdir(parents=True, exist_ok=True)
    # no case may take the machine's memory: what asks for more fails
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    start, failures = time.perf_counter(), []
    if args.only is None and args.kills:
        counts, failures = kill_all(args.kills, args.seed, keep)
        of = ", ".join(f"{t.script} {counts[t.script]}" for t in TARGETS)
        print(f"kills {counts['kills']} ({of}), runs resumed {counts['resumed']}, "
              f"equal {counts['equal']}; {time.perf_counter() - start:.0f} s", flush=True)
    cases = range(args.mutations) if args.only is None else [args.only]
    if cases:
        start = time.perf_counter()
        counts, found = mutate_all(cases, args.seed, keep)
        failures += found
        print(", ".join(f"{name} {n}" for name, n in counts.items())
              + f"; {time.perf_counter() - start:.0f} s")
    print(f"failures {len(failures)}" + (f", inputs in {keep}" if failures else ""))
    for failure in failures:
        print("  " + failure.encode(errors="backslashreplace").decode())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
