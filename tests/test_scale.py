"""Several processes, and data of any size: the same runs as one process's, and a cache that changes
nothing."""

import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import codi
import coconut
import data_prep
import test_codi
import test_runs
from common import evaluation, puzzles, runtime, text, weights
from common.text import CODI_MARK, COCONUT_MARK, Examples, Tokenizer, compact_tokenizer
from conftest import ROOT
from test_runs import interrupted
from tiny import decoding, setup_of, tiny_model

# 24 items in batches of 23 and 1: uneven shares, and an update in which one of two ranks has no row
TINY = ("--device cpu --dtype float32 --n-layer 2 --n-head 2 --n-embd 16 --batch-size 23 "
        "--warmup 0 --eval-every 2 --eval-items 5 --max-new 4 ")
RUNS = {"coconut": TINY + "--stage-max 2 --steps-stage-0 1 --steps-per-stage 2 --steps-last 2 "
                   "--uniform-prob 0.5 --switch classifier",
        "codi": TINY + "--n-latent 2 --steps 5 --ood none"}
IN_PROCESS = dict(coconut=test_runs.run, codi=test_codi.run)
ATOL = dict(coconut=1e-5, codi=5e-5)      # of weights; CODI's were 1.4e-5 apart, Muon rounds most
BATTERY = ["--thoughts", "all", "--noise-std", "1"]


def flags_of(script, data, out, more=""):
    return ["--data", str(data), "--out", str(out), *RUNS[script].split(), *more.split()]


def torchrun(*argv):
    """Two processes; offline and with one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))


def outcome(out):
    """Weights of the last and of the best checkpoint, and what the metrics say, but for times."""
    last, best = (torch.load(out / name, weights_only=True) for name in ("last.pt", "best.pt"))
    weights = []
    for state in (last, best):
        weights += [state[part] for part in ("model", "projection") if part in state]
    return weights, test_runs.metrics(out)


def check_alike(out, expected, atol=1e-5):
    """The same run up to float error: losses, weights, accuracies, lengths, samples."""
    (ours, lines), (theirs, wanted) = outcome(out), outcome(expected)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[k], b[k], rtol=0, atol=atol) for k in a)
    assert len(lines) == len(wanted)
    for line, other in zip(lines, wanted):
        assert line.keys() == other.keys()
        for name, value in other.items():
            rounded = isinstance(value, list) or name.startswith("distance")      # to 0.001
            if rounded and value is not None:
                value = pytest.approx(value, rel=1e-5, abs=1.1e-3)
            elif isinstance(value, float):
                value = pytest.approx(value, rel=1e-5, abs=1e-6)
            assert line[name] == value, (name, line, other)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of chain problems of one to three steps, with answers of one to three words; two
    test questions of each length are called a pair."""
    folder = tmp_path_factory.mktemp("data") / "uneven"
    splits = {split: [] for split in puzzles.SPLITS}
    for n in (1, 2, 3):
        for split, items in puzzles.chains((8, 2, 3), n_steps=n, limit=8).items():
            for i, item in enumerate(items):
                pair = dict(pair=n) if split == "test" and i < 2 else {}
                splits[split].append(item | pair | dict(answer=item["answer"] + i % 3 * " pens"))
    data_prep.write_dataset(folder, splits)
    return folder


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """{script: folder of the run by one process}"""
    folders = {script: tmp_path_factory.mktemp("alone") / script for script in RUNS}
    for script, out in folders.items():
        assert IN_PROCESS[script](flags_of(script, data, out)) == 0
    return folders


# ---------------------------------------------------------------- several processes

@pytest.mark.parametrize("script, more", [("coconut", ""), ("codi", ""), ("codi", "--method cot")])
def test_accumulate(data, tmp_path, script, more):
    """A batch read in three parts is the batch: means are over its labels, rows and thoughts, not
    over parts."""
    for n in (1, 3):
        argv = flags_of(script, data, tmp_path / str(n), f"{more} --accumulate {n}")
        assert IN_PROCESS[script](argv) == 0
    check_alike(tmp_path / "3", tmp_path / "1", ATOL[script])


def test_accumulate_may_change_when_resuming(data, alone, tmp_path):
    """--accumulate is no property of the run: who runs out of memory resumes with more parts."""
    assert interrupted(flags_of("coconut", data, tmp_path / "run"), "stop", 2) == 130
    assert test_runs.run(["--resume", "--out", tmp_path / "run", "--accumulate", "4"]) == 0
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert last["flags"]["accumulate"] == 4
    check_alike(tmp_path / "run", alone["coconut"])


@pytest.fixture(scope="module")
def jobs(data, tmp_path_factory):
    """What two processes leave after: a run of coconut.py and one of codi.py, the battery on the
    latter, a run of coconut.py that rank 1 is asked to stop, one resumed that one process had
    begun, and one in which rank 1 is killed."""
    folder = tmp_path_factory.mktemp("jobs")
    assert interrupted(flags_of("coconut", data, folder / "begun"), "stop", 2) == 130
    (folder / "jobs.json").write_text(json.dumps([
        ("coconut.py", flags_of("coconut", data, folder / "coconut"), ""),
        ("codi.py", flags_of("codi", data, folder / "codi"), ""),
        ("codi.py", ["--eval-only", str(folder / "codi" / "best.pt"), *BATTERY], ""),
        ("coconut.py", flags_of("coconut", data, folder / "stopped"), "stop 2"),
        ("coconut.py", ["--resume", "--out", str(folder / "begun")], ""),
        ("coconut.py", flags_of("coconut", data, folder / "killed"), "die 2")]))
    done = torchrun(ROOT / "tests" / "ranks.py", folder)
    reports = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    codes = [report["codes"] for report in reports]
    assert codes[0][:5] == codes[1] == [0, 0, 0, 130, 0], done.stderr
    return SimpleNamespace(folder=folder, done=done, reports=reports, ended=time.time())


def test_two_processes_coconut(jobs, alone):
    """The run of one process, printed once."""
    check_alike(jobs.folder / "coconut", alone["coconut"])
    printed, nothing = (report["printed"] for report in jobs.reports)
    assert not any(nothing)
    assert printed[0].count("test questions") == 1
    assert printed[0].count("2 processes on cpu") == 1
    assert [row[0] for row in test_runs.table(printed[0])] == ["0", "1", "2"]


def test_two_processes_codi(jobs, alone):
    check_alike(jobs.folder / "codi", alone["codi"], ATOL["codi"])


def test_two_processes_battery(jobs):
    """The same battery: swap and mean are over the test set of all ranks, pairs are found."""
    both = json.loads((jobs.folder / "codi" / "battery.json").read_text())["rows"]
    assert test_codi.run(["--eval-only", jobs.folder / "codi" / "best.pt", *BATTERY]) == 0
    alone = json.loads((jobs.folder / "codi" / "battery.json").read_text())["rows"]
    assert all(row["pairs"]["n"] == 3 for row in alone)
    for row, other in zip(alone, both, strict=True):
        for key in row.keys() - {"seconds"}:
            value = row[key]
            if isinstance(value, float) or key == "thought_norms":
                value = pytest.approx(value, abs=2e-3)
            assert other[key] == value, (row["thoughts"], key)


def test_sigterm_at_one_rank_stops_all(jobs, data, alone):
    """Only rank 1 got the signal: both end after that update, and one process goes on from the
    checkpoint."""
    last = torch.load(jobs.folder / "stopped" / "last.pt", weights_only=True)
    assert last["at"]["done"] == 2
    shutil.copytree(jobs.folder / "stopped", jobs.folder / "resumed")
    assert test_runs.run(["--resume", "--out", jobs.folder / "resumed"]) == 0
    check_alike(jobs.folder / "resumed", alone["coconut"])


def test_two_processes_resume_what_one_began(jobs, alone):
    check_alike(jobs.folder / "begun", alone["coconut"])


def test_only_rank_0_writes(jobs):
    zero, one = jobs.reports
    assert one["written"] == []
    assert {"codi/metrics.jsonl", "stopped/metrics.jsonl"} <= set(zero["written"])


def test_a_rank_that_dies_ends_the_run(jobs):
    """Killed in its second update: the other does not wait for it, says so in a sentence, and the
    checkpoint after the first is whole."""
    assert jobs.done.returncode != 0
    assert jobs.ended - float((jobs.folder / "died").read_text()) < 30
    assert "rank 0 has lost another" in jobs.done.stderr and "SIGKILL" in jobs.done.stderr
    assert weights.load_checkpoint(jobs.folder / "killed" / "last.pt")["at"]["done"] == 1


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_shares_are_the_batch(machine, world, parts):
    """Every row once and in order, whatever the number of rows; no empty part; shares differ by at
    most one row."""
    machine.world = world
    for n in range(14):
        shares = []
        for machine.rank in range(world):
            shares.append(machine.share(list(range(n)), parts))
            assert len(shares[-1]) <= parts and all(shares[-1])
        parts_in_order = sum(shares, [])
        assert sum(parts_in_order, []) == list(range(n))
        sizes = [sum(map(len, share)) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_evaluation_is_split(monkeypatch, machine, text_tok):
    """Two ranks answer each question once, and their counts add up to those of one."""
    items = puzzles.chains((7, 1, 1))["train"]
    examples = text.tokenize(items, text_tok, 96, 4, "test")
    s = setup_of(tiny_model(vocab_size=text_tok.n_vocab), text_tok, machine, decoding(4))
    sequences = [coconut.curriculum(e, 1, 1, 1, "coconut", text_tok) for e in examples]
    asked, sums = [], []

    def think_and_answer(s, sequences):
        asked.extend(tuple(q.prompt) for q in sequences)
        B = len(sequences)
        return ([text_tok.encode("### 7\n" + "x" * (len(q.prompt) % 5)) for q in sequences],
                torch.full((B, 1, 32), 8 ** -0.5), torch.ones(B, 1, dtype=torch.bool))

    def evaluate():
        return evaluation.evaluate(s, items, sequences, think_and_answer, batch_size=3)

    for item, right in zip(items, (1, 0, 1, 1, 0, 0, 1)):
        item["answer"] = "7" if right else "8"
    whole = evaluate()
    assert whole["accuracy"] == 4 / 7 and whole["thought_norms"] == [2.0]
    prompts, asked[:] = sorted(asked), []
    monkeypatch.setattr(runtime.Machine, "sum",
                        lambda self, *numbers: sums.append(numbers) or list(numbers))
    monkeypatch.setattr(runtime.Machine, "sum_", lambda self, tensor: tensor)
    machine.world = 2
    for machine.rank in (0, 1):
        evaluate()
    right, tokens, *_ = np.sum(sums, 0)
    assert (right, tokens / 7) == (4, whole["tokens"]) and sorted(asked) == prompts


# ---------------------------------------------------------------- packed examples

def test_packed_examples(examples):
    """Packing and unpacking give the same lists; lengths are theirs."""
    packed = Examples(Examples.pack(examples))
    assert list(packed) == examples and len(packed) == 5
    assert packed[-1] == examples[-1] and packed[1:4:2] == examples[1:4:2]
    question, steps, answer = packed.lengths
    assert question.tolist() == [len(e.question) for e in examples]
    assert answer.tolist() == [len(e.answer) for e in examples]
    assert steps.shape == (5, 5)
    for row, example in zip(steps.tolist(), examples):
        assert [n for n in row if n] == [len(step) for step in example.steps]
    for i in (5, -6):
        with pytest.raises(IndexError):
            packed[i]


@pytest.mark.parametrize("method", coconut.METHODS)
@pytest.mark.parametrize("stage", [0, 1, 3, 4])
@pytest.mark.parametrize("plain", [False, True])
def test_lengths_without_building_sequences(method, stage, plain, examples, tok):
    """They differ from those of the sequences by the same number of marks for all examples."""
    s = SimpleNamespace(tok=tok, flags=SimpleNamespace(method=method, c=2, stage_max=3,
                                                       plain_stage_0=plain))
    sequences = coconut.sequences_of(examples, stage, s)
    built = np.array([(len(q.prompt), len(q.language)) for q in sequences])
    difference = built - coconut.lengths(Examples(Examples.pack(examples)), stage, s.flags)
    assert (difference == difference[0]).all()


def test_colons_of_answers_that_begin_differently(examples, tok):
    """Each is found once for all that begin alike; those of other beginnings are found too."""
    tok.decode = lambda ids: CODI_MARK if ids in ([7, 8, 9], [7, 6]) else "x" * len(ids)
    marks = [[7, 8, 9], [7, 6], [7, 8, 9], [7, 8, 9], [7, 6]]
    answered = [e._replace(answer=mark + e.answer) for e, mark in zip(examples, marks)]
    found = text.colons(Examples(Examples.pack(answered)), tok, "The answer is:", "here")
    assert found.tolist() == [2, 1, 2, 2, 1]


# ---------------------------------------------------------------- the cache

@pytest.fixture
def folder(tmp_path):
    """Twelve items to train on, with up to three steps."""
    items = [dict(question=f"How many is {i} and {i}?", answer=str(i),
                  steps=[f"<<{i}+{i}={2 * i}>>"] * (i % 4)) for i in range(14)]
    splits = dict(zip(puzzles.SPLITS, (items[:12], items[12:13], items[13:])))
    data_prep.write_dataset(tmp_path / "d", splits)
    return tmp_path / "d"


def prepared(folder, mark=COCONUT_MARK):
    """Tokenizer's state and Examples of the training split, as a run gets them."""
    items = data_prep.load(folder)["train"]
    tok = compact_tokenizer(items, mark, "numbers-apart")
    return tok.state(), list(text.tokenize(items, tok, 99, 5, "train", mark)), len(items)


def plainly(folder, mark=COCONUT_MARK):
    """The same from lists, where nothing is kept."""
    items = json.loads((folder / "train.json").read_text())
    tok = Tokenizer.compact(["\n".join([d["question"], *d["steps"], mark + d["answer"]])
                             for d in items])
    return tok.state(), list(text.tokenize(items, tok, 99, 5, "train", mark)), len(items)


def test_cache_is_what_would_be_made(folder, monkeypatch, capsys):
    """The second time the training file is not read as JSON; all is as the first time and as
    without a cache."""
    first = prepared(folder)
    monkeypatch.setattr(data_prep.Items, "items",
                        property(lambda self: pytest.fail("train.json was read")))
    assert prepared(folder) == first == plainly(folder)
    assert capsys.readouterr() == ("", "")


def test_cache_is_a_memory_map(folder):
    prepared(folder)
    items = data_prep.load(folder)["train"]
    tok = compact_tokenizer(items, COCONUT_MARK, "numbers-apart")
    ids = text.tokenize(items, tok, 99, 5, "train").ids
    while isinstance(ids.base, np.ndarray):
        ids = ids.base
    assert isinstance(ids, np.memmap) or "mmap" in type(ids.base).__name__


@pytest.mark.parametrize("mark", [COCONUT_MARK, CODI_MARK])
def test_cache_of_other_settings(folder, mark):
    """Another mark, and with it another tokenizer, does not get what was made for the first."""
    prepared(folder)
    assert prepared(folder, mark) == plainly(folder, mark)


def test_cache_follows_the_data(folder):
    """A file of the same size and the same time stamp, but other content, is prepared again."""
    before, stamp = prepared(folder), (folder / "train.json").stat()
    changed = (folder / "train.json").read_text().replace("How many", "How much")
    (folder / "train.json").write_text(changed)
    os.utime(folder / "train.json", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (folder / "train.json").stat().st_size == stamp.st_size
    assert prepared(folder) == plainly(folder) != before


def test_cache_follows_the_script(folder, monkeypatch, tmp_path):
    """Who changes how text becomes tokens gets the new tokens."""
    prepared(folder)
    (tmp_path / "changed.py").write_text("another version")
    monkeypatch.setattr(data_prep, "SOURCES", (data_prep.__file__, tmp_path / "changed.py"))
    monkeypatch.setattr(Examples, "pack", lambda examples: pytest.fail("packed again"))
    with pytest.raises(pytest.fail.Exception, match="packed again"):
        prepared(folder)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_changed_split_is_checked_again(folder, split):
    """That the files were good before does not let a question pass that is now in two of them."""
    prepared(folder)
    items = json.loads((folder / f"{split}.json").read_text())
    other = json.loads((folder / "test.json").read_text())
    (folder / f"{split}.json").write_text(json.dumps(items + other))
    with pytest.raises(runtime.UserError, match="is also that of"):
        data_prep.load(folder)


@pytest.mark.parametrize("damage", [
    lambda b: b[:-7], lambda b: b"", lambda b: b"noise", lambda b: b + b"more",
    lambda b: bytes(len(b)), lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:]],
    ids=["cut", "empty", "noise", "longer", "zeros", "a bit"])
def test_damaged_cache_is_made_again(folder, damage, capsys):
    expected = prepared(folder)
    kept = {path: path.read_bytes() for path in folder.glob(".*")}
    assert len(kept) == 3
    for path, content in kept.items():
        path.write_bytes(damage(content))
    assert prepared(folder) == expected
    assert {path: path.read_bytes() for path in folder.glob(".*")} == kept
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"),
                                   OSError(28, "No space left on device")], ids=str)
def test_where_nothing_can_be_kept(folder, monkeypatch, capsys, error):
    """One line says so, and all works as without a cache."""
    def refuse(path, mode="r", **more):
        if "w" in mode:
            raise error
        return open(path, mode, **more)

    monkeypatch.setattr(data_prep, "open", refuse, raising=False)
    data_prep.no_cache.cache_clear()
    assert prepared(folder) == prepared(folder) == plainly(folder)
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and str(folder) in out and error.strerror in out
    assert err == ""
    assert not list(folder.glob(".*"))


def test_too_long_in_a_cache(folder):
    """An item that does not fit is named by its number, also when its tokens are from the cache."""
    items = data_prep.load(folder)["train"]
    tok = compact_tokenizer(items, COCONUT_MARK, "numbers-apart")
    examples = text.tokenize(items, tok, 99, 5, "train")
    n = [len(e.question) + sum(map(len, e.steps)) + len(e.answer) + 5 for e in examples]
    sentence = f"train, item {n.index(max(n)) + 1}, takes {max(n)} positions"
    with pytest.raises(runtime.UserError, match=sentence):
        text.tokenize(items, tok, max(n) - 1, 5, "train")


def test_digits_only(tmp_path):
    """Items whose answer begins with no digit are read by nobody; a second run finds the same ones.
    """
    items = [dict(question=f"What is {i}?", steps=["<<1+1=2>>"], answer=answer)
             for i, answer in enumerate(["5", "-3", "12", "yes", "$4", "7"])]
    splits = {split: [item | dict(question=f"{split}: {item['question']}") for item in items]
              for split in puzzles.SPLITS}
    data_prep.write_dataset(tmp_path / "d", splits)
    argv = ["--data", tmp_path / "d", *test_codi.SMALL.split(), "--digits-only",
            "--batch-size", "1", "--epochs", "1"]
    argv = [a for a in argv if a not in ("--steps", "11")]
    prompts, loss = [], codi.codi_loss

    def noted(model, projection, student, *rest):
        prompts.extend(student.prompt.tolist())
        return loss(model, projection, student, *rest)

    for out in ("a", "b"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(codi, "codi_loss", noted)
            assert test_codi.run([*argv, "--out", tmp_path / out]) == 0
    _, tok = weights.load_model(weights.load_checkpoint(tmp_path / "a" / "best.pt"))
    seen = [tok.decode(ids[:-1]) for ids in prompts]              # without <bot>
    assert sorted(seen[:3]) == [f"train: What is {i}?\n" for i in (0, 2, 5)]
    assert seen[3:] == seen[:3]
