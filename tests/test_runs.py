"""Whole runs of coconut.py on tiny data: interrupted, resumed, evaluated, asked, refused."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import coconut
import data_prep
from common import evaluation, runtime, schedule, staged
from common.puzzles import SPLITS, chains
from common.run import Metrics, Run, Stop, read_events
from common.text import Sequence, collate, tokenize
from common.weights import load_checkpoint
from conftest import ROOT
from gpt2 import GPT2
from tiny import decoding, setup_of, tiny_model, weights

# 17 updates: parts end at 7, 11 and 17
SMALL = ("--device cpu --dtype float32 --n-layer 1 --n-head 2 --n-embd 16 --stage-max 2 "
         "--batch-size 4 --steps-stage-0 7 --steps-per-stage 4 --steps-last 6 --warmup 2 "
         "--eval-every 5 --eval-items 4 --max-new 8 --save-every 3 --no-again")
N_UPDATES = 17
VARIANTS = {
    "plain": "",
    "mixing": "--dropout 0.2 --uniform-prob 0.5 --optimizer muon",
    "fresh": "--dropout 0.1 --c 2 --reset-optimizer --drop-last-steps --steps-per-stage 2 "
             "--plain-stage-0",
    "again": "--again --uniform-prob 0.5",           # 7 updates of stage 0 again, five times
}


class Killed(BaseException):
    """Stands for kill -9: nothing in the scripts may catch it."""


def run(argv):
    """`python coconut.py ARGV` in this process, as the script ends; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["coconut.py", *map(str, argv)])
        runtime.run_main(coconut.main)
    return stop.value.code or 0


def without_shape(flags):
    """A command line without the flags of a model from scratch: --init X brings its own."""
    return re.sub(r"--(n-layer|n-head|n-embd) \d+ ?", "", flags)


def start(data, out, more=""):
    small = without_shape(SMALL) if "--init" in more else SMALL
    return ["--data", data, "--out", out, *small.split(), *more.split()]


def metrics(out):
    """The lines of metrics.jsonl without what a clock wrote."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def stage_lines(out):
    return [line for line in metrics(out) if line["event"] == "stage"]


def printed(out):
    """What a run of the fixture `finished` printed."""
    return out.with_name("printed.txt").read_text()


def table(text):
    """The rows of the table that ends a run, as lists of words."""
    lines = [line.split() for line in text.splitlines()]
    head = max(i for i, words in enumerate(lines) if words[:1] == ["stage"])
    return [words for words in lines[head + 1:] if words and words[0].isdigit()]


def same(a, b):
    """Nested dicts and lists with bitwise equal tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (dict, list, tuple)):
        keys = a.keys() | b.keys() if isinstance(a, dict) else range(max(len(a), len(b)))
        return len(a) == len(b) and all(same(a[k], b[k]) for k in keys)
    return a == b


def outcome(out):
    """All that a run leaves behind and that must not depend on interruptions."""
    last = torch.load(out / "last.pt", weights_only=True)
    best = torch.load(out / "best.pt", weights_only=True)
    return last["model"], last["optimizers"], best["model"], metrics(out)


def fresh_copy(finished, out, variant="mixing"):
    """A finished run's checkpoint, to be damaged."""
    out.mkdir()
    for name in ("last.pt", "best.pt", "metrics.jsonl"):
        (out / name).write_bytes((finished[variant] / name).read_bytes())
    return out


# ---------------------------------------------------------------- interruption

def interrupted(argv, how, n):
    """Run, and be interrupted in the n-th update ("kill", "stop"), the n-th report at a stage's end
    ("report"), or between the temporary file and the n-th checkpoint ("rename")."""
    update = "seed", runtime.Machine             # called once in each update
    name, owner = {"kill": update, "stop": update, "report": ("test_row", staged),
                   "rename": ("replace", os)}[how]
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            if how != "stop":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        try:
            return run(argv)
        except Killed:
            return "killed"


# in brackets: the updates of the whole run that these are
OF_MIXING = (
    "kill 5, kill 5, kill 10",                                    # (5, 8, 17)
    "kill 4, kill 2, kill 9",                                     # (4, 5, 12)
    "report 1, report 3", "rename 2, rename 7",                   # the latter of best.pt
    "stop 1, stop 2, stop 1, stop 3, stop 2, stop 8",             # (1, 3, 4, 7, 9, 17)
    "kill 6, stop 1, kill 2", "kill 11, kill 2, stop 1")
OF_FRESH = ("kill 8, rename 2", "stop 7, report 3", "stop 9, kill 3")
OF_AGAIN = ("kill 8, report 1, kill 5", "stop 7, kill 3, kill 2, stop 9, kill 4")


@pytest.mark.parametrize("variant, events", [*(("mixing", events) for events in OF_MIXING),
                                             *(("fresh", events) for events in OF_FRESH),
                                             *(("again", events) for events in OF_AGAIN)])
def test_resume_is_bit_identical(data, finished, tmp_path, variant, events):
    """However often a run is killed or stopped, --resume ends in the same bits: weights, optimizer,
    best checkpoint, and every metric once, with dropout and stage mixing."""
    argv, out = start(data, tmp_path / "run", VARIANTS[variant]), tmp_path / "run"
    for event in events.split(", "):
        how, n = event.split()
        assert interrupted(argv, how, int(n)) == (130 if how == "stop" else "killed")
        argv = ["--resume", "--out", out]
    assert run(argv) == 0
    ours, expected = outcome(out), outcome(finished[variant])
    for a, b in zip(ours, expected):
        assert same(a, b)


def test_a_stage_that_is_not_learned_comes_again(finished):
    """It is trained five times more at most, and the run says so. The rows are those of the last
    time, and the items come in another order. With --no-again each stage comes once."""
    found = metrics(finished["again"])
    assert [e["update"] for e in found if e["event"] == "again"] == [7, 14, 21, 28, 35]
    assert [e["stage"] for e in found if e["event"] == "stage"] == [0, 1, 2]
    assert found[-1]["updates"] == N_UPDATES + 35
    said = "stage 0 is not learned (0.0 % in validation): stage 0 again (--no-again: never)"
    assert printed(finished["again"]).count(said) == 5
    assert not [e for e in metrics(finished["mixing"]) if e["event"] == "again"]
    at = dict(update=5)
    assert schedule.epoch_of(at, 4) == (1, 1)
    assert schedule.epoch_of(at | dict(backs=1), 4)[0] != 1


@pytest.mark.parametrize("part, valid, backs, expected", [
    (0, 0.89, 0, 0), (0, 0.9, 0, None), (1, 0.4, 0, 1),          # the first two: themselves
    (2, 0.5, 0, 2), (2, 0.49, 0, 1), (2, 0.9, 0, None),          # the third, stuck: with the second
    (3, 0.97, 4, 3), (3, 0.98, 0, None), (3, 0.1, 4, 2), (3, 0.1, 5, None),
])
def test_which_stage_comes_again(part, valid, backs, expected):
    """The last validation decides. expected: the stage that comes next, None: not again."""
    plan, saved = [(0, 5), (1, 4), (2, 6), (3, 7)], []
    rows = [dict(stage=i) for i in range(part)]
    at = dict(part=part, update=6, done=15, valid=valid, rows=rows, backs=backs)
    added = []
    a_run = SimpleNamespace(at=at, say=str, log=lambda *_, **__: None, lengthen=added.append,
                            save=lambda name, optimizers: saved.append(name))
    assert schedule.again(a_run, plan, []) == (expected is not None)
    if expected is None:
        assert (at["part"], at["update"], at["backs"], saved) == (part, 6, backs, [])
        return
    assert (at["part"], at["update"], at["backs"], len(saved)) == (expected, 0, backs + 1, 1)
    assert at["rows"] == rows[:expected]
    assert added == [sum(n for _, n in plan[expected:part + 1])]
    assert not schedule.again(a_run, [(3, 5)], [])                  # a baseline of one stage


def test_the_new_optimizer_is_saved(data, finished, tmp_path):
    """After a stage change with --reset-optimizer a checkpoint has the state of the optimizer that
    is in use, which has made one step or two, not of the one before, which made seven more."""
    out = tmp_path / "run"
    for argv, n, steps in ((start(data, out, VARIANTS["fresh"]), 8, 1),
                           (["--resume", "--out", out], 1, 2)):
        assert interrupted(argv, "stop", n) == 130
        last = torch.load(out / "last.pt", weights_only=True)
        adamw = last["optimizers"][-1]["state"]
        assert {int(state["step"]) for state in adamw.values()} == {steps}
    assert run(["--resume", "--out", out]) == 0
    assert same(outcome(out), outcome(finished["fresh"]))


def test_stopping_says_how_to_go_on(data, tmp_path, capsys):
    """SIGTERM ends with the update at hand saved, the command to continue, and exit code 130."""
    assert interrupted(start(data, tmp_path / "run"), "stop", 4) == 130
    assert f"--resume --out {tmp_path / 'run'}" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["at"]["done"] == 4


def test_second_ctrl_c_ends_at_once():
    """The first Ctrl-C asks; who presses again does not want to wait."""
    stop = Stop()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_kill_loses_at_most_save_every(data, tmp_path):
    """kill -9 in update 6 leaves the checkpoint of update 3, whole."""
    assert interrupted(start(data, tmp_path / "run"), "kill", 6) == "killed"
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["at"]["done"] == 3


def test_resume_of_a_finished_run(finished, tmp_path, capsys):
    """Nothing is trained again: the table is printed once more and the metrics stay."""
    out = fresh_copy(finished, tmp_path / "run")
    assert run(["--resume", "--out", out]) == 0
    assert [row[0] for row in table(capsys.readouterr().out)] == ["0", "1", "2"]
    assert metrics(out) == metrics(finished["mixing"])


def test_resume_keeps_the_dtype(data, tmp_path, monkeypatch):
    """What --dtype auto chose holds for the whole run, though a busy machine would now measure
    otherwise."""
    weights_after = []
    monkeypatch.setattr(runtime, "SMALL", 0)
    for second in ("float32", "bfloat16"):
        argv = [a for a in start(data, tmp_path / second) if a not in ("--dtype", "float32")]
        monkeypatch.setattr(runtime, "faster_cpu_dtype", lambda *_: "float32")
        assert interrupted(argv, "stop", 5) == 130
        monkeypatch.setattr(runtime, "faster_cpu_dtype", lambda *_: second)
        assert run(["--resume", "--out", tmp_path / second]) == 0
        weights_after.append(outcome(tmp_path / second))
    assert same(*[w[0] for w in weights_after])


@pytest.mark.parametrize("width, dtype", [(runtime.SMALL - 1, "float32"),
                                          (runtime.SMALL, "bfloat16")])
def test_small_models_are_trained_in_float32(width, dtype, monkeypatch):
    """Whatever is faster: in bfloat16 they learn worse."""
    monkeypatch.setattr(runtime, "faster_cpu_dtype", lambda *_: "bfloat16")
    assert runtime.Machine("cpu", "auto", width).dtype_name == dtype


def test_metrics_cut_back(tmp_path):
    """Reopened at a checkpoint's size, metrics.jsonl loses what came later and says its true
    size."""
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write(a=1)
    size = metrics.size()
    metrics.write(b="later, and longer")
    again = Metrics(path, size)
    assert again.size() == size == path.stat().st_size
    again.write(c=3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [dict(a=1), dict(c=3)]
    assert again.size() == path.stat().st_size


def test_events_are_read_up_to_a_broken_line(tmp_path):
    """A line without event is none, and one that a kill cut off ends the list."""
    (tmp_path / "metrics.jsonl").write_text('{"event": "valid"}\n5\n{"a": 1}\n{"event": "tr')
    assert read_events(tmp_path) == [dict(event="valid")]


def test_overwrite_ends_the_run_before(tmp_path, machine):
    """Its checkpoints must not be continued by --resume as if they were of the new run."""
    for name in ("last.pt", "best.pt", "start.pt", "table.md"):
        (tmp_path / name).touch()
    Run(tmp_path, {}, {}, dict(done=0), 1, machine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "table.md"]


# ---------------------------------------------------------------- checkpoints

def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


def half_written(state, f):
    f.write(b"half of a checkpoint")
    no_space()


def test_disk_full_leaves_the_checkpoint_before(data, tmp_path, monkeypatch, capsys):
    """A checkpoint that cannot be written ends the run in a sentence; the one before stays as it
    was, no half file next to it, and --resume goes on from it."""
    out = tmp_path / "run"
    assert interrupted(start(data, out), "stop", 2) == 130
    before = (out / "last.pt").read_bytes()
    for owner, name, failure in ((os, "replace", no_space), (os, "fsync", no_space),
                                 (torch, "save", half_written)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failure)
            argv = ["--resume", "--out", out]
            check_refusal(argv, capsys, "last.pt", "No space left", "--resume")
        assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.tmp*"))
    assert run(["--resume", "--out", out]) == 0


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_crash_while_saving(tmp_path, monkeypatch, name):
    """A crash at any moment before the rename leaves the old checkpoint readable."""
    path = tmp_path / name
    state = dict(config={}, model=dict(w=torch.ones(3)), tokenizer={}, flags={})
    runtime.save_checkpoint(path, state)

    def crash(*args):
        raise Killed

    for owner, function in ((torch, "save"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, function, crash)
            runtime.save_checkpoint(path, state | dict(model=dict(w=torch.zeros(3))))
        assert same(load_checkpoint(path), state)
    runtime.save_checkpoint(path, state | dict(flags=dict(c=2)))
    assert load_checkpoint(path)["flags"] == dict(c=2)


def test_full_disk_for_metrics(data, tmp_path, monkeypatch, capsys):
    """metrics.jsonl that cannot be written is a sentence, too."""
    out = tmp_path / "run"
    assert interrupted(start(data, out), "stop", 2) == 130
    monkeypatch.setattr(Metrics, "write", no_space)
    check_refusal(["--resume", "--out", out], capsys, "No space left")
    assert load_checkpoint(out / "last.pt")["at"]["done"] >= 2


# ---------------------------------------------------------------- what a run leaves and prints

def test_metrics_of_a_run(finished):
    """Training, validation and stage lines, then one final line with the promised fields."""
    text = (finished["mixing"] / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    events = [line["event"] for line in lines]
    assert events.count("final") == 1 and events[-1] == "final"
    found = [(line["stage"], line["n_latent"]) for line in stage_lines(finished["mixing"])]
    assert found == [(0, 0), (1, 1), (2, 2)]
    valid = [line["update"] for line in lines if line["event"] == "valid"]
    assert valid == [5, 7, 11, 16, 17]
    final = lines[-1]
    assert (final["method"], final["stage"], final["n_latent"]) == ("coconut", 2, 2)
    assert (final["test_n"], final["updates"]) == (8, N_UPDATES)
    assert final["data"].endswith("tiny-chains")
    assert 0 <= final["test_accuracy"] <= 1 and final["seconds"] > 0
    assert final["test_accuracy"] == lines[-2]["accuracy"]


def test_extra_stage_drops_all_steps(finished):
    """With --drop-last-steps the last row has no steps left and thoughts of stage_max only."""
    rows = stage_lines(finished["fresh"])
    assert [(r["stage"], r["n_latent"], r["step_tokens"] > 0) for r in rows] == [
        (0, 0, True), (1, 2, True), (2, 4, False), (3, 4, False)]


def test_table(finished):
    """A run prints its settings, a decoded sample and the norms of thoughts and embeddings after
    each stage, and ends with a table of all stages: the numbers of metrics.jsonl."""
    text, rows = printed(finished["plain"]), stage_lines(finished["plain"])
    assert "lr=" in text and "8 test questions" in text
    assert text.count("norm of token embeddings") == 3
    for row in rows:
        assert repr(row["sample"]) in text
        assert all(f"{norm:.2f}" in text for norm in row["thought_norms"])
    assert [row[:6] for row in table(text)] == [
        [str(r["stage"]), str(r["n_latent"]), f"{r['step_tokens']:.1f}",
         f"{100 * r['accuracy']:.1f}", "%", f"{r['tokens']:.1f}"] for r in rows]


@pytest.mark.parametrize("method, has_steps", [("cot", True), ("no-cot", False)])
def test_baseline_runs(data, tmp_path, method, has_steps):
    """The baselines train as many updates in one stage and end with the same final line."""
    assert run(start(data, tmp_path / "run", f"--method {method}")) == 0
    *_, row, final = metrics(tmp_path / "run")
    assert (row["stage"], row["n_latent"], row["step_tokens"] > 0) == (0, 0, has_steps)
    assert (final["event"], final["method"], final["updates"]) == ("final", method, N_UPDATES)


def test_seeds_differ(data, finished, tmp_path):
    """Another seed is another run: bit-identity above is no accident."""
    assert run(start(data, tmp_path / "run", VARIANTS["mixing"] + " --seed 1")) == 0
    assert not same(outcome(tmp_path / "run")[0], outcome(finished["mixing"])[0])


@pytest.mark.parametrize("steps", ["--steps-stage-0 0", "--steps-per-stage 0"])
def test_a_stage_may_be_skipped(data, tmp_path, steps):
    """0 updates of a stage pass it over (a run from a CoT checkpoint needs no stage 0)."""
    assert run(start(data, tmp_path / "run", steps)) == 0
    assert metrics(tmp_path / "run")[-1]["event"] == "final"


def test_start_from_a_checkpoint(data, finished, tmp_path):
    """--init with a checkpoint of ours takes over weights and tokenizer: at a negligible rate they
    stay."""
    more = f"--init {finished['mixing'] / 'last.pt'} --lr 1e-30 --weight-decay 0"
    assert run(start(data, tmp_path / "run", more)) == 0
    a, b = (torch.load(out / "last.pt", weights_only=True)
            for out in (tmp_path / "run", finished["mixing"]))
    assert same(a["model"], b["model"]) and a["tokenizer"] == b["tokenizer"]
    assert a["config"]["n_embd"] == 16


def test_start_from_released_weights(data, tmp_path, gpt2_tokenizer):
    """--init with a pytorch_model.bin takes the gpt2 tokenizer and grows the vocabulary by <bot>,
    <eot>, <pause>, as copies of <<; at a negligible rate all stays."""
    released = weights(vocab_size=258, n_positions=300, n_layer=1)
    torch.save(released, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"n_head": 4}')
    more = f"--init {tmp_path / 'pytorch_model.bin'} --lr 1e-30 --weight-decay 0"
    assert run(start(data, tmp_path / "run", more)) == 0
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    config = state["config"]
    assert (config["n_embd"], config["n_head"], config["block_size"]) == (32, 4, 300)
    wte = released["transformer.wte.weight"]
    assert torch.equal(state["model"]["wte.weight"], torch.cat([wte, wte[[256] * 3]]))


def test_eval_only(finished, capsys, tmp_path, monkeypatch):
    """--eval-only prints the table's last row for a checkpoint and writes nothing."""
    monkeypatch.chdir(tmp_path)
    assert run(["--eval-only", finished["mixing"] / "best.pt"]) == 0
    expected, (row,) = stage_lines(finished["mixing"])[-1], table(capsys.readouterr().out)
    assert row[:6] == ["2", "2", "0.0", f"{100 * expected['accuracy']:.1f}", "%",
                       f"{expected['tokens']:.1f}"]
    assert not list(tmp_path.iterdir())


def test_eval_only_on_other_data(finished, capsys, tmp_path):
    """--data replaces the data set of the run; only its test split is needed."""
    (tmp_path / "other").mkdir()
    items = chains((1, 1, 5), seed=3, n_steps=2, limit=8)["test"]
    (tmp_path / "other" / "test.json").write_text(json.dumps(items))
    assert run(["--eval-only", finished["mixing"] / "best.pt", "--data", tmp_path / "other"]) == 0
    assert "5 test questions" in capsys.readouterr().out


def test_eval_only_of_half_an_epoch(data, tmp_path, capsys):
    """A model whose last stage was less than one pass over the data is evaluated like others."""
    argv = [*start(data, tmp_path / "run"), "--epochs-last", "0.5"]
    at = argv.index("--steps-last")
    assert run(argv[:at] + argv[at + 2:]) == 0
    assert metrics(tmp_path / "run")[-1]["updates"] == 7 + 4 + 3
    assert run(["--eval-only", tmp_path / "run" / "best.pt"]) == 0
    assert "8 test questions" in capsys.readouterr().out


@pytest.mark.parametrize("variant, n_thoughts", [("mixing", 2), ("fresh", 4)])
def test_ask(finished, capsys, variant, n_thoughts):
    """--ask prints norm and five nearest tokens of each thought, then the answer."""
    question = ("Ann has 3 pens. Ben has what separates twice Ann from 2. Cal has what separates "
                "twice Ben from 9. How many pens does Cal have?")
    assert run(["--eval-only", finished[variant] / "last.pt", "--ask", question]) == 0
    lines = capsys.readouterr().out.split("\n")
    for i in range(n_thoughts):
        assert lines[i].startswith(f"thought {i + 1} ")
        assert "norm" in lines[i] and lines[i].count(" %") == 5
    assert len(lines) > n_thoughts and not lines[n_thoughts].startswith("thought")


def test_overfit(tmp_path):
    """2 layers of width 64 learn 16 items by heart through three latent stages, in seconds."""
    items = chains((16, 4, 4), n_steps=3)
    data_prep.write_dataset(tmp_path / "data", items)
    settings = ("--device cpu --dtype float32 --n-embd 64 --n-head 4 --n-layer 2 --batch-size 16 "
                "--lr 1e-2 --warmup 5 --steps-stage-0 20 --steps-per-stage 10 --steps-last 60 "
                "--eval-every 1000 --eval-items 4 --max-new 16 --no-again")
    argv = ["--data", tmp_path / "data", "--out", tmp_path / "run", *settings.split()]
    assert run(argv) == 0
    s, stage = coconut.trained_model(tmp_path / "run" / "last.pt", {})
    examples = coconut.examples_of(s, "train", items["train"])
    sequences = coconut.sequences_of(examples, stage, s)
    v = evaluation.evaluate(s, items["train"], sequences, coconut.think_and_answer)
    assert stage == 3 and v["accuracy"] == 1.0


# ---------------------------------------------------------------- --compile

class Compiled:
    """Stands in for torch.compile: counts which passes of GPT2 are compiled ones.

    passes, compiled: one entry for every forward pass (with gradients or not), and for every
    one of them that went through what compile() made."""

    def __init__(self, monkeypatch):
        self.passes, self.compiled = [], []
        forward = GPT2.forward

        def counted(model, *args, **kwargs):
            self.passes.append(torch.is_grad_enabled())
            return forward(model, *args, **kwargs)

        def compile(model):
            def call(*args, **kwargs):
                self.compiled.append(torch.is_grad_enabled())
                return model._call_impl(*args, **kwargs)
            model._compiled_call_impl = call

        monkeypatch.setattr(GPT2, "forward", counted)
        monkeypatch.setattr(GPT2, "compile", compile)

    def taken(self):
        """(passes, compiled ones) since the last call."""
        found = self.passes, self.compiled
        self.passes, self.compiled = [], []
        return found


def test_compile_compiles_every_pass(data, tmp_path, monkeypatch):
    """With --compile no pass of the model is an uncompiled one: in training, of thoughts and tokens
    at decoding, with --eval-only, --ask and --resume; without it, none is compiled."""
    counts, out = Compiled(monkeypatch), tmp_path / "run"
    assert interrupted(start(data, out, "--compile"), "stop", 9) == 130
    passes, compiled = counts.taken()
    assert passes == compiled and set(passes) == {True, False}
    assert run(["--resume", "--out", out]) == 0
    passes, compiled = counts.taken()
    assert passes == compiled and set(passes) == {True, False}
    for more in ([], ["--ask", "Ann has 3 pens. How many pens does Ann have?"]):
        assert run(["--eval-only", out / "best.pt", "--compile", *more]) == 0
        passes, compiled = counts.taken()
        assert passes == compiled and len(passes) > 2
        assert run(["--eval-only", out / "best.pt", "--no-compile", *more]) == 0
        passes, compiled = counts.taken()
        assert passes and not compiled


def test_torch_compile_traces_the_passes(tok, machine, monkeypatch):
    """What torch.compile traces (and runs here by its eager backend) has the loss and the answer
    of the model as it is."""
    counter, original = CompileCounter(), GPT2.compile
    monkeypatch.setattr(GPT2, "compile", lambda model: original(model, backend=counter))
    torch._dynamo.reset()
    sequence, found = Sequence([1, 2, tok.bot], 1, [tok.eot, 7, tok.eos]), []
    for model in (tiny_model(n_layer=1), tiny_model(n_layer=1).compiled()):
        loss, _ = coconut.coconut_loss(model, collate([sequence], tok.eos))
        s = setup_of(model, tok, machine, decoding(3))
        found.append((loss.item(), coconut.think_and_answer(s, [sequence])[0]))
    assert counter.frame_count > 3
    assert found[0][0] == pytest.approx(found[1][0]) and found[0][1] == found[1][1]


# ---------------------------------------------------------------- one sentence and exit code 2

def check_refusal(argv, capsys, *words):
    """Exit code 2 and one sentence on stderr that has the words; a traceback would fail the
    call."""
    capsys.readouterr()
    assert run(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    error = [line for line in lines if line.startswith("coconut.py: ")]
    assert len(error) == 1 and all(str(word) in error[0] for word in words), error


def test_script_refuses_without_traceback(tmp_path):
    """The real script: one line on stderr, exit code 2."""
    done = subprocess.run([sys.executable, ROOT / "coconut.py", "--data", "nowhere"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("coconut.py: ")
    assert "nowhere" in done.stderr and not list(tmp_path.iterdir())


TOO_LONG = json.dumps([dict(question="pens " * 300, steps=[], answer="b")])


@pytest.mark.parametrize("split, content, words", [
    ("train", '[{"question": "a", "steps": []}]', ("train.json, item 1", "'answer'")),
    ("valid", '[{"question": "a", "steps": [1], "answer": "b"}]',
     ("valid.json, item 1", "'steps'")),
    ("test", '[{"question": " ", "steps": [], "answer": "b"}]',
     ("test.json, item 1", "'question'")),
    ("test", TOO_LONG, ("test.json, item 1", "block_size 128")),
    ("train", '[{"question": "a"', ("train.json", "JSON")),
    ("train", "[]", ("train.json",)),
    ("valid", "[]", ("valid.json",)),
    ("test", "[]", ("test.json",)),
    ("valid", None, ("valid.json",))],
    ids=["no-answer", "step-type", "empty-question", "too-long", "not-json", "no-train", "no-valid",
         "no-test", "no-file"])
def test_bad_data(data, tmp_path, capsys, split, content, words):
    """Bad data is named by file, item and field before anything is trained."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in SPLITS:
        (folder / f"{name}.json").write_bytes((data / f"{name}.json").read_bytes())
    if content is None:
        (folder / f"{split}.json").unlink()
    else:
        (folder / f"{split}.json").write_text(content)
    check_refusal(start(folder, tmp_path / "run"), capsys, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more, words", [
    ("--device tpu9", ("--device tpu9",)),
    ("--device cuda:99", ("--device cuda:99", "--device cpu")),
    ("--data /no/such/folder", ("/no/such/folder",)),
    ("--stage-max 0", ("--stage-max 0",)),
    ("--init nowhere.bin", ("--init nowhere.bin",)),
    ("--init nowhere.pt", ("nowhere.pt",)),
    ("--steps-last 0", ("--steps-last",)),
    ("--eval-only nowhere.pt", ("nowhere.pt", "no such checkpoint")),
    ("--resume", ("last.pt", "no such checkpoint"))])
def test_bad_setting(data, tmp_path, capsys, gpt2_tokenizer, more, words):
    """What cannot work is said in a sentence, and no run is begun."""
    check_refusal(start(data, tmp_path / "run", more), capsys, *words)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("last", ["--steps-last 0", "--epochs-last 0", "--epochs-last 0.01"])
@pytest.mark.parametrize("method", ["--method coconut", "--method cot", "--table"])
def test_an_empty_last_stage_is_refused(data, tmp_path, capsys, monkeypatch, last, method):
    """It would train all stages and then have no best model: refused before the first update."""
    argv = start(data, tmp_path / "run", method)
    at = argv.index("--steps-last")
    monkeypatch.setattr(coconut, "coconut_loss", None)
    check_refusal([*argv[:at], *argv[at + 2:], *last.split()], capsys, last.split()[0])
    assert not (tmp_path / "run").exists()


def test_out_is_a_file(data, tmp_path, capsys):
    """An --out that is no folder is named."""
    (tmp_path / "file").write_text("mine")
    check_refusal(start(data, tmp_path / "file"), capsys, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_is_not_overwritten(data, finished, tmp_path, capsys):
    """Starting again in the folder of a run is refused unless --overwrite says so."""
    out = fresh_copy(finished, tmp_path / "run")
    check_refusal(start(data, out), capsys, out, "--resume", "--overwrite")
    assert same(outcome(out), outcome(finished["mixing"]))
    assert run(start(data, out, VARIANTS["mixing"] + " --overwrite")) == 0
    assert same(outcome(out), outcome(finished["mixing"]))


@pytest.mark.parametrize("flag", ["--c 2", "--lr 0.5", "--method cot", "--seed 3", "--steps-last 7",
                                  "--data chains", "--recipe prosqa-mini"])
def test_resume_with_other_flags(finished, tmp_path, capsys, flag):
    """A resumed run cannot change what it is; the flag that differs is named."""
    out = fresh_copy(finished, tmp_path / "run")
    check_refusal(["--resume", "--out", out, *flag.split()], capsys, flag.split()[0], out)
    assert same(outcome(out), outcome(finished["mixing"]))


def test_resume_may_repeat_its_flags(data, finished, tmp_path):
    """The same command with --resume added is accepted."""
    out = fresh_copy(finished, tmp_path / "run")
    assert run(start(data, out, VARIANTS["mixing"] + " --resume")) == 0


def garbage(kind, checkpoint):
    """Files that are no checkpoint of ours."""
    content = {"empty": b"", "noise": bytes(range(256)) * 9, "zip": b"PK\3\4" + bytes(3000)}
    if kind == "other":
        torch.save([1, 2], checkpoint)
    elif kind == "code":
        torch.save(dict(config=argparse.Namespace()), checkpoint)
    else:
        checkpoint.write_bytes(content[kind])


@pytest.mark.parametrize("kind", ["empty", "noise", "zip", "other", "code"])
@pytest.mark.parametrize("use", ["--resume", "--eval-only", "--init"])
def test_garbage_checkpoint(data, finished, tmp_path, capsys, kind, use):
    """A file that is no checkpoint is named, for every flag that reads one, and nothing in it is
    run."""
    out = fresh_copy(finished, tmp_path / "run")
    garbage(kind, out / "last.pt")
    argv = {"--resume": ["--resume", "--out", out], "--eval-only": ["--eval-only", out / "last.pt"],
            "--init": start(data, tmp_path / "other", f"--init {out / 'last.pt'}")}[use]
    check_refusal(argv, capsys, "last.pt")


@pytest.mark.parametrize("kind", ["empty", "noise", "zip", "other", "code"])
def test_garbage_weights(data, tmp_path, capsys, gpt2_tokenizer, kind):
    """The same for a pytorch_model.bin."""
    garbage(kind, tmp_path / "w.bin")
    check_refusal(start(data, tmp_path / "run", f"--init {tmp_path / 'w.bin'}"), capsys, "w.bin")


@pytest.mark.parametrize("vocab_size, more, word", [
    (2000, "", "w.bin"), (100, "", "w.bin"), (258, "--tokenizer compact", "--tokenizer")])
def test_weights_of_another_vocabulary(data, tmp_path, capsys, gpt2_tokenizer, vocab_size, more,
                                       word):
    """Released weights go with the tokenizer they were trained with: others are refused, not
    relabelled."""
    torch.save(weights(n_layer=1, n_embd=64, vocab_size=vocab_size, n_positions=300),
               tmp_path / "w.bin")
    argv = start(data, tmp_path / "run", f"--init {tmp_path / 'w.bin'} {more}")
    check_refusal(argv, capsys, word)


def test_question_too_long(finished, capsys):
    """--ask refuses what does not fit the model."""
    argv = ["--eval-only", finished["mixing"] / "last.pt", "--ask", "pens " * 300]
    check_refusal(argv, capsys, "--ask", "block_size 128")


# ---------------------------------------------------------------- what must not pass unseen

def gold(s, sequences):
    """Stands for a model that writes the gold text as far as --max-new lets it."""
    written = [q.language[1:-1][:evaluation.limit(s)] for q in sequences]
    none = torch.zeros(len(sequences), 0, 32)
    return written, none, none[..., 0].bool()


@pytest.mark.parametrize("typed, accuracy", [(None, 1.0), (8, 0.0), (200, 1.0)])
def test_max_new_is_that_of_the_longest_gold_text(text_tok, machine, capsys, typed, accuracy):
    """A right model is not cut off by the default; by a typed limit it is, which is said, and the
    share of its answers that were cut off is reported."""
    items = chains((1, 1, 20), n_steps=8)["test"]
    examples = tokenize(items, text_tok, 400, 2, "here")
    flags = decoding(max_new=typed, method="cot")
    s = evaluation.with_limit(setup_of(tiny_model(n_positions=400), text_tok, machine, flags),
                              examples)
    sequences = [coconut.curriculum(e, 0, 1, 3, "cot", text_tok) for e in examples]
    assert max(len(q.language) for q in sequences) > 80
    row = evaluation.evaluate(s, items, sequences, gold)
    assert row["accuracy"] == accuracy and row["cut"] == 1 - accuracy
    evaluation.print_cut([row])
    text = capsys.readouterr().out
    assert ("warning: --max-new 8" in text and "100.0 % of the answers" in text) == (typed == 8)


def test_the_later_of_equal_checkpoints_is_best(tmp_path, machine):
    """best.pt is not the first of many that are equally good, or equally bad."""
    training = Run(tmp_path, {}, dict(model=tiny_model()), dict(done=0, best=-1.0), 4, machine)
    found = [training.is_best(dict(accuracy=a)) for a in (0.0, 0.0, 0.5, 0.4, 0.5)]
    assert found == [True, True, True, False, True]


@pytest.mark.parametrize("save_every", [3, 100])
def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path, capsys, save_every):
    """In one sentence; what was saved before is finite, and metrics.jsonl is JSON."""
    argv = start(data, tmp_path / "run", "--optimizer adamw --grad-clip 0 --save-every "
                                         f"{save_every} --warmup 0 --lr-decay 0 --lr 1e9")
    assert run(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("coconut.py: ") and "finite" in error and "--lr" in error
    for path in (tmp_path / "run").glob("*.pt"):
        state = torch.load(path, weights_only=True)["model"]
        assert all(value.isfinite().all() for value in state.values())
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text


@pytest.mark.parametrize("flag", ["--init", "--eval-only"])
def test_weights_that_are_not_finite_are_refused(finished, data, tmp_path, capsys, flag):
    state = torch.load(finished["mixing"] / "best.pt", weights_only=True)
    state["model"]["h.0.ln_1.bias"][3] = float("nan")
    torch.save(state, tmp_path / "bad.pt")
    argv = [flag, tmp_path / "bad.pt", "--data", data]
    assert run(argv + (["--out", tmp_path / "run"] if flag == "--init" else [])) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "bad.pt" in error and "h.0.ln_1.bias" in error and "finite" in error


@pytest.mark.parametrize("n, stage", [(5, 0), (9, 1), (8, 0), (14, None)])
def test_eval_only_of_an_unfinished_run(data, tmp_path, capsys, n, stage):
    """It is evaluated at the stage it is at (between two, the one that is done), which is said."""
    out = tmp_path / "run"
    if n == 8:                                   # killed after the first stage's checkpoint
        assert interrupted(start(data, out, "--save-every 100"), "kill", n) == "killed"
    else:
        assert interrupted(start(data, out), "stop", n) == 130
    capsys.readouterr()
    assert run(["--eval-only", out / "last.pt"]) == 0
    text = capsys.readouterr().out
    assert table(text)[0][0] == str(2 if stage is None else stage)
    assert ("its run is at stage" in text) == (stage is not None)
