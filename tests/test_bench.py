"""bench.py and common/measure.py: the naive loops compute what ours do, and every section measures
a minute model."""

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch

import bench
import coconut
import codi
from common import measure, runtime
from common.text import CODI_MARK, Examples, Sequence, collate, colons
from gpt2 import GrowingCache, StaticCache
from tiny import codi_flags, decoding, setup_of

MINUTE = dict(n_layer=1, n_head=2, n_embd=16, vocab=64, block_size=256, batch=2, question=9,
              words=3, answer=2, sizes=(40, 8, 8),
              llama=dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=16, n_hidden=24, vocab_size=64))
EVERYTHING = "train,codi,decode,memory,data"


def uneven(examples, tok):
    """Prompts, thoughts and language of all lengths, as a batch."""
    rows = [Sequence(e.question + [tok.bot], n, [tok.eot] + sum(e.steps, []) + e.answer)
            for e, n in zip(examples, (3, 0, 2, 1, 3))]
    return rows, collate(rows, tok.eos)


def gradients(loss, *modules):
    loss.backward()
    found = [p.grad.clone() for m in modules for p in m.parameters()]
    for m in modules:
        m.zero_grad()
    return found


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_naive_coconut(model, examples, tok):
    _, batch = uneven(examples, tok)
    ours, naive = coconut.coconut_loss(model, batch)[0], bench.naive_coconut(model, batch)
    assert ours.item() == pytest.approx(naive.item(), rel=1e-5)
    assert all(map(close, gradients(ours, model), gradients(naive, model)))


def test_naive_codi(model, examples, tok):
    tok.decode = lambda ids: CODI_MARK if ids == [7, 8, 9] else "x" * len(ids)
    flags = codi_flags(alpha=0.5, beta=2.0, gamma=1.5)
    answered = Examples(Examples.pack([e._replace(answer=[7, 8, 9] + e.answer) for e in examples]))
    sides = zip(*(codi.sequences(e, flags, tok) for e in answered))
    student, teacher = (collate(side, tok.eos) for side in sides)
    to_end = answered.lengths.answer - colons(answered, tok, flags.distill_at, "here")
    projection, batch = codi.make_projection(flags, 32), (student, teacher, torch.tensor(to_end))
    ours = codi.codi_loss(model, projection, *batch, flags)[0]
    naive = bench.naive_codi(model, projection, *batch, flags)
    assert ours.item() == pytest.approx(naive.item(), rel=1e-5)
    assert all(map(close, gradients(ours, model, projection), gradients(naive, model, projection)))


def test_naive_decode(model, examples, tok, machine):
    """The naive loop, both caches, rollouts of a shared prefill and think_and_answer write the same
    tokens."""
    rows, batch = uneven(examples, tok)
    naive = bench.naive_decode(model, batch, 7)
    static = StaticCache(model.config, 5, 60, "cpu", torch.float32)
    assert bench.decode_with(static, model, batch, 7) == naive
    assert bench.decode_with(GrowingCache(), model, batch, 7) == naive
    static = StaticCache(model.config, 5, 60, "cpu", torch.float32)
    twice = bench.decode_with(static, model, batch, 7, times=2)
    assert twice == [row for row in naive for _ in range(2)]
    assert len({tuple(row) for row in naive}) > 1
    decoded, _, _ = coconut.think_and_answer(setup_of(model, tok, machine, decoding(7)), rows)
    assert decoded == [row[:row.index(tok.eos)] if tok.eos in row else row for row in naive]


# ---------------------------------------------------------------- measuring

@pytest.mark.parametrize("seconds, repeats, limit, kept", [
    (0.1, 3, 20, 3),                  # the first of four warms up
    (3.0, 3, 20, 3),                  # slow: the first counts
    (3.0, 3, 7, 2),                   # a third would pass the limit
    (9.0, 3, 5, 1)])                  # one at least
def test_race(monkeypatch, seconds, repeats, limit, kept):
    order = []

    def seconds_of(fn, s):
        order.append(fn)
        return seconds + len(order) / 1000

    monkeypatch.setattr(measure, "seconds_of", seconds_of)
    s = SimpleNamespace(repeats=repeats, limit=limit)
    runs, median = measure.race({"a": "A", "b": "B"}, s)
    assert order == ["A", "B"] * (kept + (seconds < 2))                          # in turns
    assert [len(own) for own in runs.values()] == [kept, kept]
    for name, own in runs.items():
        assert median[name] == pytest.approx(sorted(own)[len(own) // 2], abs=0.01)
    first = seconds + (0.001 if seconds > 2 else 0.003)                          # warmed up or not
    assert min(runs["a"]) == pytest.approx(first)


def test_row():
    r = measure.row("train", "x", [0.003, 0.001, 0.009], mfu=50.0)
    assert (r["median"], r["low"], r["high"], r["runs"], r["unit"]) == pytest.approx(
        (3, 1, 9, 3, "ms"))
    assert r["mfu"] == 50


def test_table():
    rows = [measure.row("memory", "a", [12.345], "MiB", per_question=1.5),
            measure.row("decode", "b", [1.5, 2.5, 2]),
            measure.row("decode", "c", [], note="left out")]
    assert measure.markdown(rows)[3:4] + measure.markdown(rows)[-2:] == [
        "| a | 12.3 MiB | 12.3 to 12.3 | 1 | 1.50 MiB a question |",
        "| b | 2,000 ms | 1,500 to 2,500 | 3 |  |",
        "| c |  |  | 0 | left out |"]


def test_targets():
    section, what, figure, sign, value, *_ = bench.TARGETS[0]
    s = SimpleNamespace(machine=runtime.Machine("cpu", "float32"), n_embd=16)

    def decided(rows, s=s):
        return list(measure.decided(rows, bench.TARGETS, s))

    for times, met in ((value, True), (value - 0.1, False)):
        (t,) = decided([measure.row(section, what, [1.0], **{figure: times})])
        assert t["met"] is met and t["measured"] == times and "at least 3.0x" in t["target"]
    for padding, met in ((9.9, True), (10.1, False)):
        (t,) = decided([measure.row("data", "batches of the default run", [1.0], padding=padding)])
        assert t["met"] is met and "at most" in t["target"]
    wide = SimpleNamespace(machine=s.machine, n_embd=768)
    rows = [measure.row(section, what, [1.0], times_naive=4.0, mfu=70.0)]
    assert len(decided(rows, wide)) == 2 and len(decided(rows)) == 1


def test_peak_counts_each_storage_once_and_no_weights():
    s = SimpleNamespace(machine=runtime.Machine("cpu", "float32"), projection=torch.nn.Identity())
    s.model = torch.nn.Linear(256, 256)
    x = torch.ones(256, 256)                                              # 0.25 MiB

    def loss():
        y = s.model(x).exp()                                   # keeps x and its own result
        return (y * y.view(-1).view(256, 256)).sum()                      # and that again, twice

    assert measure.peak(s, loss) == pytest.approx(0.5, abs=0.01)


def test_peak_lets_go_of_the_graph():
    """Or the settings measured after it would find less and less memory."""
    class Mark:
        pass

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark = Mark()
            marks.append(weakref.ref(ctx.mark))
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    marks = []
    s = SimpleNamespace(machine=runtime.Machine("cpu", "float32"), projection=torch.nn.Identity())
    s.model = torch.nn.Linear(8, 8)
    measure.peak(s, lambda: Marked.apply(s.model(torch.ones(1, 8))).exp().sum())    # exp keeps
    gc.collect()
    assert [mark() for mark in marks] == [None]


# ---------------------------------------------------------------- the command

def test_everything_on_a_minute_model(tmp_path, capsys):
    """Each section's rows, the table, the JSON, and the targets that need no GPU and no width."""
    out = tmp_path / "figures.json"
    assert bench.main(["--device", "cpu", "--dtype", "float32", "--only", EVERYTHING,
                       "--repeats", "1", "--limit", "8", "--out", str(out)], MINUTE) == 0
    printed, results = capsys.readouterr().out, json.loads(out.read_text())
    found = {(r["section"], r["what"]): r for r in results["rows"]}
    assert len(found) == len(results["rows"])
    for r in results["rows"]:
        assert r["runs"] >= 1 and 0 < r["low"] <= r["median"] <= r["high"]
        assert f"| {r['what']} |" in printed
    for section in ("train", "codi"):
        for question, thoughts in ((9, (0, 2, 4, 6)), (128, (0, 6))):
            rows = [found[section, f"question {question}, {k} thoughts"] for k in thoughts]
            naive = found[section, f"question {question}, 6 thoughts, naive"]
            none, most = rows[0]["median"], rows[-1]["median"]
            assert rows[-1]["times_naive"] == pytest.approx(naive["median"] / most)
            assert rows[-1]["ms_per_thought"] == pytest.approx((most - none) / 6)
            assert all(0 < r["mfu"] < 100 for r in rows)
    read = [found["train", f"question 9, {k} thoughts"] for k in (0, 2)]    # bot, eot, 3 words, k
    tokens = [r["tokens_per_s"] * r["median"] / 1000 for r in read]
    assert tokens == pytest.approx([2 * 14, 2 * 16])
    for name in ("coconut", "cot", "no-cot", "codi"):
        for B in bench.BATCHES:
            r = found["decode", f"{name}, question 9, batch {B}"]
            assert r["questions_per_s"] == pytest.approx(1000 * B / r["median"])
    assert found["decode", "question 128, batch 64, static cache"]["times_naive"] > 1
    for name in ("batch 8, eager", "batch 1, Llama"):
        assert found["decode", f"one token, {name}"]["bound"] > 0
    assert found["decode", "question 128, 8 rollouts, read once"]["times_apart"] > 0
    grow = [found["memory", f"coconut, {k} thoughts, batch 2"]["median"] for k in (0, 2, 4, 6)]
    naive = found["memory", "coconut, 6 thoughts, batch 2, naive"]["median"]
    assert grow == sorted(grow) and naive > grow[-1] > grow[0]
    double = found["memory", "coconut, 6 thoughts, batch 4"]["median"]
    assert double == pytest.approx(2 * grow[-1], rel=0.05)
    made_too, at_hand = "first update, data made before", "first update of the default run"
    assert found["data", made_too]["seconds"] > found["data", at_hand]["seconds"]
    assert 0 <= found["data", "batches of the default run"]["padding"] < 100
    assert len(results["targets"]) == 4 and all(t["target"] in printed for t in results["targets"])
    assert {"device", "processor", "torch", "matrix product, GFLOP/s",
            "copy, GB/s"} <= results["machine"].keys()
    assert results["flags"]["repeats"] == 1 and results["preset"] == "tiny"


def test_a_batch_that_would_take_longer_than_the_limit_is_left_out(tmp_path, monkeypatch):
    """And the naive loop is then taken from two of its passes."""
    monkeypatch.setattr(bench, "BATCHES", (1, 8))
    out = tmp_path / "figures.json"
    bench.main(["--device", "cpu", "--only", "decode", "--repeats", "1", "--limit", "0",
                "--out", str(out)], MINUTE)
    found = {r["what"]: r for r in json.loads(out.read_text())["rows"]}
    assert found["cot, question 9, batch 1"]["runs"] == 1
    left = found["cot, question 9, batch 8"]
    assert left["runs"] == 0 and left["median"] is None and "left out" in left["note"]
    note = found["question 128, batch 64, no cache"]["note"]
    assert "first and the last of its 22 passes" in note


def test_nothing_is_timed_that_computes_something_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coconut, "coconut_loss", lambda model, _: (model.wte.weight.sum(), None))
    with pytest.raises(runtime.UserError, match="train, question of 9 tokens, loss: .* naive"):
        bench.main(["--device", "cpu", "--only", "train", "--out", str(tmp_path / "x.json")],
                   MINUTE)
    assert not (tmp_path / "x.json").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize("flags, sentence", [
    (["--only", "train,speed"],
     "--only: there is no section 'speed'; choose among train, codi, decode, memory, data"),
    (["--out", "nowhere/x.json"], "--out nowhere/x.json: name a file in a folder that exists"),
    (["--repeats", "0"], "argument --repeats: '0' is not a whole number of at least 1")])
def test_bad_flags(flags, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        bench.main(flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2 and error[0].startswith("usage:")
    assert error[1].endswith(f"error: {sentence}")
    assert not list(tmp_path.iterdir())
