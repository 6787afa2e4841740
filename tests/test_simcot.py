"""simcot.py: which steps a decoder must write from which thoughts, and that without it this is
Coconut; common/reached.py."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import coconut
import data_prep
import probe
import simcot
import test_runs
from common import comparison, optim, reached, runtime
from common.text import Example, Examples, Sequence, collate
from gpt2 import GrowingCache
from llamas import tiny_llama
from test_runs import metrics, same, start
from tiny import decoding, setup_of

BOT, EOT, EOS = 64, 65, 62
EXAMPLE = Example([1, 2], [[10, 11], [20], [30, 31]], [40, EOS])


def settings(**changed):
    """The flags that simcot.py's functions read."""
    return decoding(**dict(c=1, stage_max=3, plain_stage_0=False, uniform_prob=0.0, step_weight=1.0,
                           decoder_layers=None) | changed)


@pytest.fixture
def s(model, tok, machine):
    """The tiny model with a decoder of other weights than its own, c = 2."""
    s = simcot.with_decoder(setup_of(model, tok, machine, settings(c=2)), None, None)
    torch.manual_seed(1)
    for p in s.decoder.h.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return s


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- which steps

@pytest.mark.parametrize("stage, held", [
    (0, []), (1, [[10, 11]]), (2, [[10, 11], [20]]), (3, [[10, 11], [20, 30, 31]])])
def test_steps_of_a_lesson(stage, held, tok):
    """With stage_max 2: each step that was removed, in its place, and eos; the third one joins the
    second only when --drop-last-steps removes it."""
    lesson = simcot.curriculum(EXAMPLE, stage, settings(stage_max=2, c=3), tok)
    assert lesson.steps == [ids + [EOS] for ids in held]
    assert lesson.n_latent == 3 * len(held)
    written = sum(lesson.steps, []) + lesson.language[1:]
    assert [t for t in written if t != EOS] == [10, 11, 20, 30, 31, 40]


def test_spare_thoughts_stand_for_nothing(tok):
    lesson = simcot.curriculum(Example([1], [[5]], [40, EOS]), 3, settings(), tok)
    assert lesson.steps == [[5, EOS], [], []] and lesson.n_latent == 3


@pytest.mark.parametrize("more", [{}, dict(plain_stage_0=True), dict(c=2), dict(stage_max=1)],
                         ids=str)
def test_sequences_are_coconuts(more, examples, tok):
    """At every stage, also as batches are made of them and as they are mixed in training."""
    flags = settings(method="coconut", switch="fixed", stage_mix="uniform", **more)
    mixing = SimpleNamespace(**vars(flags) | dict(uniform_prob=0.7))
    s = SimpleNamespace(flags=flags, tok=tok)
    for stage in range(flags.stage_max + 2):
        for ours, theirs in zip(simcot.sequences_of(examples, stage, s),
                                coconut.sequences_of(examples, stage, s)):
            assert ours[:3] == theirs
        packed = Examples(Examples.pack(examples))
        assert np.array_equal(simcot.lengths(packed, stage, flags),
                              coconut.lengths(packed, stage, flags))
        rngs = [np.random.default_rng(0), np.random.default_rng(0)]
        for e in examples * 5:
            ours = simcot.curriculum(e, stage, mixing, tok, rngs[0])
            assert ours[:3] == coconut.training_sequence(e, stage, mixing, tok, rngs[1])


# ---------------------------------------------------------------- the loss

def lessons_of(examples, tok, stages=(3, 4, 2, 1, 2)):
    return [simcot.curriculum(e, stage, settings(c=2), tok) for e, stage in zip(examples, stages)]


def naive(decoder, thoughts, lessons, c):
    """L_step as its definition has it, each token of each step by itself: the mean over tokens,
    then over the steps of a lesson, then over lessons, where one without any counts 0."""
    of_lessons = []
    for own, lesson in zip(thoughts, lessons):
        of_steps = []
        for i, ids in enumerate(lesson.steps):
            losses = []
            for j, label in enumerate(torch.tensor(ids)):
                x = torch.cat([own[c * i:c * i + c], decoder.wte(torch.tensor(ids[:j]).long())])
                logits = decoder.head(decoder(embeds=x[None])[0, -1])
                losses.append(F.cross_entropy(logits, label))
            if losses:
                of_steps.append(sum(losses) / len(losses))
        of_lessons.append(sum(of_steps) / max(1, len(of_steps)))
    return sum(of_lessons) / len(lessons)


def test_step_loss(s, examples, tok):
    """The rows of a batch, of several lengths, are what each step is by itself, and the losses of
    the parts of a batch add up."""
    lessons = lessons_of(examples, tok)
    _, thoughts = simcot.read(s.model, GrowingCache(), collate(lessons, EOS))
    expected = naive(s.decoder, thoughts, lessons, 2)
    n_labels = sum(len(q.language) - 1 for q in lessons)
    whole, (language, step) = simcot.simcot_loss(s, lessons, n_labels, 5)
    assert close(step, expected) and step > 1 and close(whole, language + step)
    parts = lessons[:2], lessons[2:]
    assert close(whole, sum(simcot.simcot_loss(s, part, n_labels, 5)[0] for part in parts))
    s.flags.step_weight = 0.5
    assert close(simcot.simcot_loss(s, lessons, n_labels, 5)[0], language + step / 2)


@pytest.mark.parametrize("chosen", [0, 1])
def test_the_decoder_sees_only_the_thoughts_of_the_step(chosen, s, examples, tok):
    """The loss of a step has a gradient at its own c thoughts and at no other one, be it of the row
    or of another."""
    lessons = lessons_of(examples, tok)
    _, thoughts = simcot.read(s.model, GrowingCache(), collate(lessons, EOS))
    thoughts = thoughts.detach().requires_grad_()
    only = [q._replace(steps=[ids if (row, i) == (1, chosen) else []
                              for i, ids in enumerate(q.steps)]) for row, q in enumerate(lessons)]
    loss = simcot.step_loss(s.decoder, thoughts, only, 2, EOS)
    reached = torch.autograd.grad(loss, thoughts)[0].abs().sum(-1) > 0                  # (B, k)
    expected = torch.zeros_like(reached)
    expected[1, 2 * chosen:2 * chosen + 2] = True
    assert torch.equal(reached, expected)


def test_gradient_reaches_question_and_model_through_the_thoughts(s):
    """L_step trains the blocks of the model, which the decoder does not have, and the embeddings of
    the question."""
    lesson = simcot.curriculum(EXAMPLE, 3, s.flags, s.tok)
    _, (_, step) = simcot.simcot_loss(s, [lesson], 2, 1)
    block, wte = torch.autograd.grad(step, [s.model.h[0].attn.c_attn.weight, s.model.wte.weight])
    assert block.norm() > 1e-3 and (wte[[1, 2]].norm(dim=1) > 1e-4).all()


def test_nothing_is_asked_where_no_step_was_removed(s):
    lesson = simcot.curriculum(EXAMPLE, 0, s.flags, s.tok)
    loss, (language, step) = simcot.simcot_loss(s, [lesson], 7, 1)
    assert step == 0 and loss == language > 0


def test_read_is_coconuts_pass(s, examples, tok):
    """Bit for bit, in training and in decoding, with the model's thoughts and with others."""
    lessons = lessons_of(examples, tok)
    batch = collate(lessons, EOS)
    h, thoughts = simcot.read(s.model, GrowingCache(), batch)
    cache = GrowingCache()
    x, keep, theirs = coconut.think(s.model, cache, batch.prompt, batch.keep, batch.latent)
    assert torch.equal(thoughts, theirs)
    assert torch.equal(h, coconut.read_on(s.model, cache, x, keep, batch.language))
    sequences = [Sequence(*q[:3]) for q in lessons]
    for given in (None, thoughts.detach().flip(0)):
        said, ours, latent = simcot.think_and_answer(s, lessons, given)
        expected, theirs, their_latent = coconut.think_and_answer(s, sequences, given)
        assert said == expected and torch.equal(ours, theirs) and torch.equal(latent, their_latent)


# ---------------------------------------------------------------- the decoder

def test_the_decoder_of_a_llama_is_one(tok, machine):
    llama = tiny_llama()
    s = simcot.with_decoder(setup_of(llama, tok, machine, settings()), None, None)
    assert type(s.decoder) is type(llama) and s.decoder.wte is llama.wte


@pytest.mark.parametrize("layers", [None, 1, 5])
def test_the_decoder_begins_as_the_model(layers, model, tok, machine):
    """It has the model's shape but for its layers, the model's weights where both have some, and
    its token embeddings for good, which learn once."""
    s = setup_of(model, tok, machine, settings(decoder_layers=layers))
    decoder = simcot.with_decoder(s, None, None).decoder
    assert len(decoder.h) == (layers or 3) and decoder.wte is model.wte
    assert torch.equal(decoder.h[0].attn.c_attn.weight, model.h[0].attn.c_attn.weight)
    assert decoder.h[0].attn.c_attn.weight is not model.h[0].attn.c_attn.weight
    flags = SimpleNamespace(optimizer="muon", lr=1.0, weight_decay=0.1, momentum=0.95, beta2=0.9)
    found = [p for o in optim.new_optimizers(flags, model, decoder=decoder)
             for group in o.param_groups for p in group["params"]]
    own = {*model.parameters(), *decoder.parameters()}
    assert len(found) == len(own) and {*found} == own


def test_explain_is_alike_in_any_company(s, examples, tok):
    """Of each row and each step by itself the decoder writes the same; a text per c thoughts."""
    _, thoughts, _ = simcot.think_and_answer(s, lessons_of(examples, tok, (3,) * 5))
    s = s._replace(tok=SimpleNamespace(**vars(tok), decode=lambda ids: " ".join(map(str, ids))))
    said = simcot.explain(s, thoughts)
    assert [len(row) for row in said] == [3] * 5 and len(set(sum(said, []))) > 1
    for row, texts in zip(thoughts, said):
        assert texts == [simcot.explain(s, row[None, i:i + 2])[0][0] for i in (0, 2, 4)]


# ---------------------------------------------------------------- runs

def run(argv):
    """`python simcot.py ARGV` in this process, as the script ends; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coconut, "main", simcot.main)
        return test_runs.run(argv)


def interrupted(argv, how, n):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coconut, "main", simcot.main)
        return test_runs.interrupted(argv, how, n)


MIXING = "--dropout 0.2 --uniform-prob 0.5 --decoder-layers 2"


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("simcot") / "run"
    assert run(start(data, out, MIXING)) == 0
    return out


def outcome(out):
    last, best = (torch.load(out / name, weights_only=True) for name in ("last.pt", "best.pt"))
    return (last["model"], last["decoder"], last["optimizers"], best["model"], best["decoder"],
            metrics(out))


def check_same_run(ours, theirs):
    """Losses, weights, optimizers and accuracies are the same bits; only the method's name is
    not."""
    ours, theirs = test_runs.outcome(ours), test_runs.outcome(theirs)
    assert same(ours[:3], theirs[:3]) and ours[3][-1].pop("method") == "simcot"
    assert theirs[3][-1].pop("method") == "coconut" and ours[3] == theirs[3]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The folders of a table and of a run of coconut.py with the same settings."""
    folder = tmp_path_factory.mktemp("runs")
    more = ("--dropout 0.2 --uniform-prob 0.5 --grad-clip 0.1 --c 2 --reset-optimizer "
            "--drop-last-steps --accumulate 2 --steps-per-stage 2")
    assert run(["--table", "--seeds", "1", *start(data, folder / "table", more)]) == 0
    assert test_runs.run(start(data, folder / "coconut", more)) == 0
    return folder


def test_without_weight_it_is_coconut(runs):
    """To the bit, with all that draws random numbers, also after a run of SIM-CoT in one table."""
    check_same_run(runs / "table" / "coconut-0", runs / "coconut")


@pytest.mark.parametrize("events", ["report 3", "stop 9, kill 3"])
def test_resume_is_bit_identical(data, finished, tmp_path, events):
    argv, out = start(data, tmp_path / "run", MIXING), tmp_path / "run"
    for event in events.split(", "):
        how, n = event.split()
        assert interrupted(argv, how, int(n)) == (130 if how == "stop" else "killed")
        argv = ["--resume", "--out", out]
    assert run(argv) == 0
    for a, b in zip(outcome(out), outcome(finished)):
        assert same(a, b)


@pytest.fixture(scope="module")
def overfit(tmp_path_factory):
    """A model of three questions, each with words around it that do not matter."""
    folder, splits = tmp_path_factory.mktemp("overfit"), {}
    around = dict(train=("in to", "to so", "so in", "to in"), valid=("in so",), test=("so to",))
    for split, names in around.items():
        splits[split] = []
        for name in names:
            for word, a, b in (("red", 1, 4), ("green", 2, 6), ("blue", 3, 5)):
                splits[split].append(dict(question=f"{name} {word}?", answer=str(a),
                                          steps=[f"<<{a}={b}>>", f"so {b} and {a}"]))
    data_prep.write_dataset(folder / "three", splits)
    more = ("--steps-stage-0 0 --steps-per-stage 0 --steps-last 70 --n-embd 32 --lr 1e-2 "
            "--batch-size 12 --eval-every 70 --save-every 70 --max-new 20 --uniform-prob 0")
    assert run(start(folder / "three", folder / "run", more)) == 0
    return folder / "run"


def test_the_decoder_learns(overfit):
    """L_step, logged with each validation, is near 0 at the end; that of guessing is 5.6."""
    last = [e for e in metrics(overfit) if e["event"] == "valid"][-1]
    assert 0 < last["step"] < 0.5 and 0 < last["language"] < 0.5


def test_explain_says_the_steps(overfit, capsys):
    """--explain finds both steps of all questions in the thoughts of each, and none in those of
    another question; with --ask it says them."""
    assert run(["--eval-only", overfit / "best.pt", "--explain"]) == 0
    out = capsys.readouterr().out
    assert out.count("<<1=4>>") == 2 and out.count("so 4 and 1") == 2      # the step; as written
    table = [line.split() for line in out.splitlines() if line.split()[:1] in (["1"], ["2"])]
    assert table[-2:] == [[i, "3", "100.0", "100.0", "-", "0.0"] for i in "12"]
    asked = ["--eval-only", overfit / "best.pt", "--ask", "so to green?"]
    assert run([*asked, "--explain"]) == 0
    out = capsys.readouterr().out
    assert out.count("thought ") == 2 and "thoughts: <<2=6>>" in out and "so 6 and 2" in out
    assert run(asked) == 0
    assert "<<2=6>>" not in capsys.readouterr().out


def test_probe_shows_what_the_decoder_writes(overfit, data, tmp_path, capsys):
    """A model of simcot.py next to a control of coconut.py on the same data."""
    argv = start(overfit.parent / "three", tmp_path / "cot", "--method cot --max-new 20")
    assert test_runs.run(argv) == 0
    capsys.readouterr()
    probe.main([str(overfit / "best.pt"), str(tmp_path / "cot" / "best.pt"), "--item", "2", "--out",
                str(tmp_path / "probe")])
    out = capsys.readouterr().out
    assert "steps that the decoder writes 100.0 (" in " ".join(out.split())
    found = [json.loads(f.read_text()) for f in (tmp_path / "probe").glob("*/probe.json")]
    assert [one["explained"] for one in found if "explained" in one] == [["<<2=6>>", "so 6 and 2"]]


def test_explained():
    """By hand: of three items two have a second step; the next item's text is the control."""
    steps = [["a", "x"], ["b", ""], ["a", "y"]]
    said = [["a", "y"], ["c", "z"], ["a", "y"]]
    first, second = comparison.explained(steps, said, [True, False, False])
    assert first == dict(n=3, exact=2 / 3, of_right=1.0, of_wrong=1 / 2, swapped=1 / 3)
    assert second == dict(n=2, exact=1 / 2, of_right=0.0, of_wrong=1.0, swapped=1 / 2)


def test_table(runs):
    """A row for each of the two, and a line for each run."""
    rows = json.loads((runs / "table" / "table.json").read_text())["rows"]
    assert [r["method"] for r in rows if r["thoughts"] == "keep"] == ["simcot", "coconut"]
    text = (runs / "table" / "table.md").read_text()
    title = "| updates of a stage until 90 % | "
    assert title + "stage 0 | stage 1 | stage 2 | stage 3 | test, % |" in text
    assert "| coconut, seed 0 | - | - | - | - | 0.0 |" in text


# ---------------------------------------------------------------- how soon

def valid(stage, update, accuracy):
    return dict(event="valid", stage=stage, update=update, accuracy=accuracy)


def test_updates_until():
    """Counted from where a stage begins, and on where it comes again; None if it never did."""
    events = [valid(0, 50, 0.2), valid(0, 100, 0.95), dict(event="stage", stage=0),
              valid(1, 150, 0.9), valid(1, 180, 1.0), valid(2, 230, 0.1), dict(event="again"),
              valid(1, 300, 0.8), valid(2, 350, 0.95), valid(3, 400, 0.89)]
    assert reached.updates_until(events, 0.9) == {0: 100, 1: 50, 2: 100, 3: None}
    assert reached.updates_until(events, 0.96) == {0: None, 1: 80, 2: None, 3: None}


def test_reached_from_the_command_line(finished, tmp_path, capsys):
    reached.main([str(finished), "--least", "0"])
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[1:] == ["5", "4", "5", "0.0"]
    with pytest.raises(runtime.UserError, match="has no metrics.jsonl"):
        reached.main([str(tmp_path)])


# ---------------------------------------------------------------- refused

@pytest.mark.parametrize("argv, word", [
    ("--explain", "--eval-only"), ("--explain --eval-only x --thoughts all", "--thoughts"),
    ("--stage-max 0", "--stage-max"), ("--rows simcot", "--table"), ("--table --rows cot", "cot"),
    ("--decoder-layers 1 --step-weight 0", "--step-weight"), ("--step-weight -1", "--step-weight"),
    ("--decoder-layers 0", "--decoder-layers")])
def test_bad_flags(argv, word, capsys):
    with pytest.raises(SystemExit) as stop:
        simcot.parse_flags(argv.split())
    assert stop.value.code == 2 and word in capsys.readouterr().err


def refusal(argv, capsys, main=run):
    assert main(argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_of_another_script(runs, finished, capsys):
    """Each script says whose a checkpoint is."""
    error = refusal(["--eval-only", runs / "coconut" / "best.pt"], capsys)
    assert "has no --step-weight" in error
    error = refusal(["--eval-only", finished / "best.pt"], capsys, test_runs.run)
    assert "another script trained it" in error and "simcot.py" in error


@pytest.mark.parametrize("change, said", [
    (lambda decoder: None, "decoder is a NoneType"),
    (lambda decoder: {}, "Missing key(s) in state_dict"),
    (lambda decoder: decoder | {"h.0.ln_1.bias": torch.zeros(3)}, "size mismatch for h.0.ln_1"),
    (lambda decoder: decoder | {"ln_f.bias": torch.full((16,), torch.nan)}, "not finite")])
def test_damaged_decoder(finished, tmp_path, capsys, change, said):
    state = torch.load(finished / "best.pt", weights_only=True)
    state["decoder"] = change(state["decoder"])
    torch.save(state, tmp_path / "best.pt")
    assert said in refusal(["--eval-only", tmp_path / "best.pt"], capsys)


def test_no_decoder_to_explain(runs, capsys):
    argv = ["--eval-only", runs / "table" / "coconut-0" / "best.pt", "--explain"]
    assert "--step-weight 0" in refusal(argv, capsys)
