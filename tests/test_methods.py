"""The rows of table 1 next to Coconut and CoT, switch and calculator."""

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import coconut
import data_prep
from common import battery, optim, scoring, staged
from common.text import Example, Sequence, collate
from gpt2 import StaticCache
from test_runs import interrupted, metrics, run, start
from tiny import decoding, setup_of, write_lengths

BOT, EOT, EOS, PAD, PAUSE = 64, 65, 62, 63, 66
EXAMPLE = Example([1, 2], [[10, 11], [20], [30, 31]], [40, EOS])
MARKS = SimpleNamespace(bot=BOT, eot=EOT, pause=PAUSE)


def look(method, stage, example=EXAMPLE, c=2, plain_stage_0=False):
    return tuple(coconut.curriculum(example, stage, c, 3, method, MARKS, plain_stage_0))


def close(a, b, rtol=1e-4, atol=1e-5):
    return torch.allclose(a, b, rtol=rtol, atol=atol)


def settings(**changed):
    """The flags that training_sequence reads."""
    flags = dict(method="coconut", c=1, stage_max=3, plain_stage_0=False, uniform_prob=0.0,
                 stage_mix="uniform", switch="fixed", icot_smoothing=0.0)
    return SimpleNamespace(**flags | changed)


# ---------------------------------------------------------------- what a model reads

ALL = [10, 11, 20, 30, 31]


@pytest.mark.parametrize("stage, left", [
    (0, ALL), (1, [20, 30, 31]), (2, [30, 31]), (3, []), (4, [])])
def test_pause_as_thought(stage, left):
    """Where Coconut has thoughts at a stage there are as many <pause> tokens, and no thoughts."""
    n = min(2 * stage, 6)
    language = [EOT, *left, 40, EOS]
    assert look("pause-as-thought", stage) == ([1, 2, BOT] + [PAUSE] * n, 0, language)
    assert look("coconut", stage) == ([1, 2, BOT], n, language)


def test_plain_stage_0_is_the_same_for_all():
    """Every method with a curriculum begins alike; those with one stage keep it."""
    plain = {m: look(m, 0, plain_stage_0=True) for m in coconut.METHODS}
    for method in ("pause-as-thought", "no-thought", "coconut"):
        assert plain[method] == look("cot", 0)
    for method in coconut.ONE_STAGE:
        assert plain[method] == look(method, 0)


@pytest.mark.parametrize("stage", range(5))
def test_pause_and_no_curriculum(stage):
    """pause has the last stage's tokens at any stage, and no steps; no-curriculum is Coconut's own
    last stage."""
    assert look("pause", stage) == ([1, 2, BOT] + [PAUSE] * 6, 0, [EOT, 40, EOS])
    assert look("no-curriculum", stage) == look("coconut", stage)


@pytest.mark.parametrize("stage, left", [(0, ALL), (2, [30, 31]), (3, [])])
def test_no_thought(stage, left):
    """The curriculum's language without anything between question and language."""
    assert look("no-thought", stage) == ([1], 0, [2, *left, 40, EOS])


@pytest.mark.parametrize("removed, left", [
    (0, ALL), (1, [11, 20, 30, 31]), (4, [31]), (5, []), (9, [])])
def test_icot_removes_tokens_from_the_front(removed, left):
    assert look("icot", removed) == ([1], 0, [2, *left, 40, EOS])


@pytest.mark.parametrize("method", coconut.METHODS)
@pytest.mark.parametrize("stage", range(5))
def test_labels_of_every_method(method, stage):
    """Only steps and answer are predicted; no <pause>, <bot> or <eot> ever is."""
    sequence = Sequence(*look(method, stage))
    labels = collate([sequence], PAD).labels.tolist()
    assert labels == sequence.language[1:] and labels[-2:] == [40, EOS]
    assert not {BOT, EOT, PAUSE} & set(labels)
    assert [1, 2] == (sequence.prompt + sequence.language)[:2]


@pytest.mark.parametrize("method", coconut.METHODS)
def test_passes(method, model):
    """Thoughts take k + 1 passes, pause tokens and all else one."""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    coconut.coconut_loss(model, collate([Sequence(*look(method, 2))], PAD))
    assert len(calls) == (5 if method in ("coconut", "no-curriculum") else 1)


def test_a_former_method_is_pause_as_thought(data, tmp_path, capsys):
    """A checkpoint of pause-multipass, which read the same tokens one by one, is evaluated as
    pause-as-thought: the same numbers."""
    folder = tmp_path / "run"
    assert run(start(data, folder, "--method pause-as-thought")) == 0
    rows = []
    for name in ("pause-as-thought", "pause-multipass"):
        state = torch.load(folder / "best.pt", weights_only=True)
        state["flags"]["method"] = name
        torch.save(state, tmp_path / f"{name}.pt")
        s, stage = coconut.trained_model(tmp_path / f"{name}.pt", {})
        rows.append(staged.test_row(s, data_prep.load(data)["test"], stage, coconut.sequences_of,
                                    coconut.think_and_answer))
        capsys.readouterr()
        assert run(["--eval-only", tmp_path / f"{name}.pt"]) == 0
        assert "pause-as-thought on" in capsys.readouterr().out
    for row in rows:
        del row["seconds"], row["seconds_batch_1"]
    assert rows[0] == rows[1] and rows[0]["n_latent"] == 0


# ---------------------------------------------------------------- schedules and mixing

def test_icot_schedule():
    """Updates as Coconut has; all tokens of the longest example are gone in the last part."""
    argv = ("--method icot --steps-stage-0 5 --steps-per-stage 10 --steps-last 7 --icot-tokens 4")
    flags, _ = coconut.parse_flags(argv.split())
    plan = coconut.stages(flags, 10, longest=13)
    assert [s for s, _ in plan] == [0, 4, 8, 12, 13] and plan[0][1] == 5 and plan[-1][1] == 7
    between = [n for _, n in plan[1:-1]]
    assert sum(n for _, n in plan) == 5 + 20 + 7 and max(between) - min(between) <= 1
    short = coconut.stages(flags, 10, longest=3)         # nothing between: nothing to remove
    assert sum(n for _, n in short) == 5 + 7


@pytest.mark.parametrize("method", coconut.METHODS)
def test_all_methods_get_as_many_updates(method):
    flags, _ = coconut.parse_flags(["--method", method])
    total = sum(n for _, n in coconut.stages(flags, 10, longest=30))
    assert total == flags.steps_stage_0 + 2 * flags.steps_per_stage + flags.steps_last


def test_icot_smoothing():
    """The offset o has P(o) ~ exp(-lambda o)."""
    rng, example = np.random.default_rng(0), Example([1, 2], [[5] * 50], [40, EOS])

    def n_language(flags):
        return len(coconut.training_sequence(example, 4, flags, None, rng).language)

    flags = settings(method="icot", icot_smoothing=1.0)
    offsets = np.array([1 + 46 + 2 - n_language(flags) for _ in range(20000)])
    assert offsets.min() == 0
    share = np.bincount(offsets)[:4] / 20000
    expected = np.exp(-np.arange(4.0)) * (1 - np.exp(-1))
    assert np.abs(share - expected).max() < 4 * np.sqrt(0.25 / 20000)
    assert n_language(settings(method="icot")) == 1 + 46 + 2


@pytest.mark.parametrize("mix, expected", [
    ("uniform", [1 / 4] * 4), ("linear", [0.1, 0.2, 0.3, 0.4])])
def test_stage_mix(mix, expected):
    """Mixed items have stage i with equal weight or weight i + 1, among those their steps allow."""
    rng, flags = np.random.default_rng(0), settings(uniform_prob=1.0, stage_mix=mix)

    def n_latent(example, flags):
        return coconut.training_sequence(example, 3, flags, MARKS, rng).n_latent

    drawn = [n_latent(EXAMPLE, flags) for _ in range(8000)]
    share = np.bincount(drawn, minlength=4) / 8000
    assert np.abs(share - expected).max() < 4 * np.sqrt(0.25 / 8000)
    one_step = Example([1], [[5]], [40, EOS])
    assert {n_latent(one_step, flags) for _ in range(50)} == {0, 1}
    assert n_latent(EXAMPLE, settings(uniform_prob=1.0, method="no-curriculum")) == 3


# ---------------------------------------------------------------- the switch

class Threshold(torch.nn.Module):
    """A classifier whose verdict on the i-th thought of each row is given."""

    def __init__(self, ends):
        super().__init__()
        self.ends, self.i = ends, -1

    def forward(self, h):
        self.i += 1
        return torch.tensor([[1.0 if end == self.i + 1 else -1.0] for end in self.ends])


@pytest.mark.parametrize("ends", [(1, 2, 3, 9, 4), (1, 1, 1, 1, 1), (2, 1, 2, 2, 1)], ids=str)
def test_switch_ends_each_row_at_its_thought(model, examples, tok, machine, ends):
    """A row that the classifier ends after its n-th thought answers as with n thoughts; none has
    more than k."""
    rows = [coconut.curriculum(e, 3, 1, 3, "coconut", tok) for e in examples]
    s = setup_of(model, tok, machine, decoding())
    model.switch = Threshold(ends)
    found, thoughts, latent = coconut.think_and_answer(s, rows)
    assert latent.sum(1).tolist() == [min(n, 3) for n in ends]
    assert thoughts.size(1) == min(3, max(ends))
    model.switch = None
    for row, n, got in zip(rows, ends, found):
        alone = row._replace(n_latent=min(n, 3))
        assert got == coconut.think_and_answer(s, [alone])[0][0]


def test_switch_loss():
    """Binary cross-entropy over the thoughts that rows have, 1 for the last of a row."""
    scores = torch.tensor([[0.5, -1.0, 2.0], [1.5, 7.0, 7.0]])
    latent = torch.tensor([[True, True, True], [True, False, False]])
    got = coconut.switch_loss(lambda thoughts: thoughts, scores[..., None], latent)
    p = torch.tensor([0.5, -1.0, 2.0, 1.5]).sigmoid()
    of_each = torch.stack([(1 - p[0]).log(), (1 - p[1]).log(), p[2].log(), p[3].log()])
    assert close(got, -of_each.mean())


@pytest.mark.parametrize("n_steps, stage, expected", [
    (0, 3, 2), (1, 3, 2), (2, 3, 4), (2, 1, 2), (5, 3, 6), (5, 0, 0)])
def test_switch_trains_on_own_lengths(n_steps, stage, expected):
    example = Example([1, 2], [[5]] * n_steps, [40, EOS])
    flags, rng = settings(switch="classifier", c=2), np.random.default_rng(0)
    sequence = coconut.training_sequence(example, stage, flags, MARKS, rng)
    assert sequence.n_latent == expected


def test_switch_learns_when_to_stop(tmp_path, capsys):
    """Problems of one and of two steps: a trained classifier thinks once for the ones, twice for
    the others."""
    write_lengths(tmp_path / "lengths", "x")
    out = tmp_path / "run"
    more = ("--switch classifier --steps-stage-0 20 --steps-per-stage 20 --steps-last 60 "
            "--batch-size 8 --lr 1e-2 --uniform-prob 0 --eval-every 100 --n-embd 32")
    assert run(start(tmp_path / "lengths", out, more)) == 0
    final = [line for line in metrics(out) if line["event"] == "stage"][-1]
    assert final["accuracy"] == 1.0
    assert final["tokens"] == 1.5 + 2                   # a thought or two, "### " and the number
    capsys.readouterr()
    for word, n in (("one", 1), ("two", 2)):
        assert run(["--eval-only", out / "best.pt", "--ask", f"{word} 4 5"]) == 0
        assert capsys.readouterr().out.count("thought ") == n


# ---------------------------------------------------------------- edited decoding

def decode(model, prompts, max_new, edit=None):
    """What a model writes after prompts of equal length."""
    ids = torch.tensor(prompts)
    cache = StaticCache(model.config, len(ids), ids.size(1) + max_new, "cpu", torch.float32)
    with torch.no_grad():
        return model.decode(cache, model(ids, cache=cache)[:, -1], max_new, EOS, edit=edit)


def test_decode_takes_an_edit(model):
    """What edit returns is in the row, and is what the model reads next."""
    prompts = [[1, 2, 3], [4, 5, 6]]
    free = decode(model, prompts, 6)
    turns = iter([torch.tensor([7, 8])])
    edited = decode(model, prompts, 6, edit=lambda token: next(turns, token))
    assert [row[0] for row in edited] == [7, 8] and free != edited
    for row, prompt, first in zip(edited, prompts, (7, 8)):
        assert row == [first] + decode(model, [prompt + [first]], 5)[0]


# ---------------------------------------------------------------- runs and the table

@pytest.mark.parametrize("method", ["icot", "pause", "pause-as-thought", "no-thought",
                                    "no-curriculum"])
def test_method_runs(data, tmp_path, method):
    """Each method trains, is evaluated, and says what it is."""
    assert run(start(data, tmp_path / "run", f"--method {method}")) == 0
    final = metrics(tmp_path / "run")[-1]
    assert (final["event"], final["method"], final["updates"]) == ("final", method, 17)
    assert final["n_latent"] == (2 if method == "no-curriculum" else 0)


def test_icot_resets_the_optimizer(data, tmp_path, monkeypatch):
    made, original = [], optim.new_optimizers

    def new_optimizers(*args):
        made.append(1)
        return original(*args)

    monkeypatch.setattr(optim, "new_optimizers", new_optimizers)
    assert run(start(data, tmp_path / "run", "--method icot --icot-tokens 8")) == 0
    parts = len([line for line in metrics(tmp_path / "run") if line["event"] == "stage"])
    assert len(made) == 1 + parts and parts > 2


TABLE = "--seeds 2 --methods coconut,cot,pause"


@pytest.fixture(scope="module")
def whole_table(data, tmp_path_factory):
    """The folder of a table, and what was printed."""
    out, printed = tmp_path_factory.mktemp("table") / "whole", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run(["--table", *start(data, out, TABLE)]) == 0
    return out, printed.getvalue()


def test_table_of_methods(data, whole_table):
    """Means and deviations are those of the runs; the battery's rows and the floor are there too; a
    second call trains nothing."""
    out, printed = whole_table
    shown = json.loads((out / "table.json").read_text())
    assert [(r["method"], r["thoughts"]) for r in shown["rows"]] == [
        *[("coconut", kind) for kind in battery.KINDS], ("cot", "keep"), ("pause", "keep"),
        ("pause", "remove")]
    for row in shown["rows"]:
        if row["thoughts"] == "keep":
            runs = [metrics(out / f"{row['method']}-{seed}")[-1] for seed in (0, 1)]
            runs = [final["test_accuracy"] * 100 for final in runs]
            assert row["accuracy"] == runs and row["mean"] == pytest.approx(np.mean(runs))
            assert row["updates"] == 17
            assert row["std"] == pytest.approx(abs(runs[0] - runs[1]) / 2 ** 0.5)
            assert "p" not in row and row["seconds_batch_1"] > 0
        else:
            assert len(row["p"]) == len(row["changed"]) == 2 and row["seconds_batch_1"] is None
        assert row["interval"] == [100 * bound for bound in scoring.wilson(
            round(sum(row["accuracy"]) * 8 / 100), 2 * 8)]
    assert list(shown["floors"]) == ["floor: one answer for all, %"]
    text = (out / "table.md").read_text()
    assert text in printed and text.count("\n|") == 2 + 10 + 1
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*.pt")}
    assert run(["--table", *start(data, out, TABLE)]) == 0
    assert len(before) == 12 and before == {p: p.stat().st_mtime_ns for p in before}


def test_table_goes_on_where_it_was_stopped(data, whole_table, tmp_path, capsys):
    """Stopped in the middle of its third run, the table ends as if it had not been."""
    whole, stopped = whole_table[0], tmp_path / "stopped"
    assert interrupted(["--table", *start(data, stopped, TABLE)], "stop", 2 * 17 + 9) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert run(["--table", *start(data, stopped, TABLE)]) == 0
    a, b = (json.loads((folder / "table.json").read_text())["rows"] for folder in (whole, stopped))
    assert [r["accuracy"] for r in a] == [r["accuracy"] for r in b]
    for name in ("coconut-0", "cot-0", "pause-1"):
        assert metrics(whole / name) == metrics(stopped / name)


def test_table_of_runs_with_other_flags(data, tmp_path, capsys):
    """Runs of another setting are not taken for these, whether the flag was typed then, now, or
    never."""
    def table(more):
        return run(["--table", *start(data, tmp_path / "t", "--methods cot --seeds 1" + more)])

    assert table(" --weight-decay 0.2") == 0
    capsys.readouterr()
    for more in ("", " --weight-decay 0.3"):
        assert table(more) == 2
        assert "--weight-decay" in capsys.readouterr().err


@pytest.mark.parametrize("argv, word", [
    ("--table --method cot", "--table"), ("--table --resume", "--table"),
    ("--methods cot,magic --table", "magic"),
    ("--switch classifier --method cot", "--switch"), ("--icot-tokens 0", "--icot-tokens"),
    ("--stage-mix square", "--stage-mix"),
    ("--seeds 0 --table", "--seeds")])
def test_bad_flags(argv, word, capsys):
    with pytest.raises(SystemExit) as stop:
        coconut.parse_flags(argv.split())
    assert stop.value.code == 2 and word in capsys.readouterr().err
