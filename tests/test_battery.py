"""The sceptic's battery: intervals and tests against known values, each kind by hand, what a model
then reads, whole tables."""

import json

import pytest
import torch

import codi
import coconut
import data_prep
import test_codi
import test_runs
from common import battery, evaluation, runtime, scoring, staged, tables
from common.battery import Change, others
from tiny import codi_flags, decoding, setup_of

KINDS = [kind for kind in battery.KINDS if kind != "keep"]


# ---------------------------------------------------------------- how sure a count is

@pytest.mark.parametrize("right, n, low, high", [
    (10, 20, 0.2993, 0.7007), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0),
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718), (0, 0, 0, 1)])
def test_wilson(right, n, low, high):
    """81 of 263, 15 of 148, 1 of 29: Newcombe 1998, table I, method 3."""
    assert scoring.wilson(right, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("b, c, p", [
    (1, 10, 0.01171875), (10, 1, 0.01171875), (0, 6, 0.03125), (4, 4, 1.0), (0, 0, 1.0),
    (3, 4, 1.0), (2, 8, 112 / 1024), (0, 1, 1.0)])
def test_mcnemar(b, c, p):
    assert scoring.mcnemar(b, c) == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_many():
    """Numbers that no float holds on the way; near the normal approximation at the end."""
    assert scoring.mcnemar(2000, 2000) == 1 and scoring.mcnemar(0, 5000) == 0
    z = (2100 - 2000 - 1) / 4100 ** 0.5
    normal = 2 * (1 - torch.distributions.Normal(0, 1).cdf(torch.tensor(z)).item())
    assert scoring.mcnemar(2000, 2100) == pytest.approx(normal, rel=1e-3)


# ---------------------------------------------------------------- each kind by hand

LATENT = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()
THOUGHTS = torch.arange(24.0).view(4, 3, 2) * LATENT[..., None]


def numbers(thoughts):
    """The first channel of each: which thought it is."""
    return thoughts[..., 0].tolist()


def test_remove():
    new, latent = others(Change("remove"), THOUGHTS, LATENT)
    assert new.shape == (4, 0, 2) and latent.shape == (4, 0)
    new, latent = others(Change("remove", at=2), THOUGHTS, LATENT)
    assert numbers(new) == [[0, 4], [6, 0], [12, 0], [0, 0]]
    assert latent.sum(1).tolist() == [2, 1, 1, 0]


def test_zero():
    new, latent = others(Change("zero"), THOUGHTS, LATENT)
    assert not new.any() and torch.equal(latent, LATENT)
    new, _ = others(Change("zero", at=1), THOUGHTS, LATENT)
    assert numbers(new) == [[0, 2, 4], [0, 0, 0], [0, 14, 0], [0, 0, 0]]
    assert not new[:, 0].any() and torch.equal(new[:, 1:], THOUGHTS[:, 1:])


def test_mean():
    """Over the items that have the thought: 0, 6, 12 and 2, 14 and 4."""
    new, latent = others(Change("mean"), THOUGHTS, LATENT)
    assert numbers(new) == [[6, 8, 4], [6, 0, 0], [6, 8, 0], [0, 0, 0]]
    assert torch.equal(latent, LATENT)
    new, _ = others(Change("mean", at=2), THOUGHTS, LATENT)
    assert numbers(new) == [[0, 8, 4], [6, 0, 0], [12, 8, 0], [0, 0, 0]]


def test_swap():
    """Those of the item before, and as many; with --at of the item before that has this thought."""
    new, latent = others(Change("swap"), THOUGHTS, LATENT)
    assert numbers(new) == [[0, 0, 0], [0, 2, 4], [6, 0, 0], [12, 14, 0]]
    assert latent.sum(1).tolist() == [0, 3, 1, 2]
    new, latent = others(Change("swap", at=1), THOUGHTS, LATENT)
    assert numbers(new) == [[12, 2, 4], [0, 0, 0], [6, 14, 0], [0, 0, 0]]
    assert torch.equal(latent, LATENT)
    new, _ = others(Change("swap"), THOUGHTS, LATENT, step=2)
    assert numbers(new) == [[12, 14, 0], [0, 0, 0], [0, 2, 4], [6, 0, 0]]


@pytest.mark.parametrize("seed, first, third", [(0, [4, 0, 2], [14, 12, 0]),
                                                (1, [2, 4, 0], [14, 12, 0])])
def test_shuffle(seed, first, third):
    """Moved on by 1 + seed % (m - 1) within the m thoughts that an item has."""
    new, latent = others(Change("shuffle"), THOUGHTS, LATENT, seed)
    assert numbers(new) == [first, [6, 0, 0], third, [0, 0, 0]]
    assert torch.equal(latent, LATENT)


@pytest.mark.parametrize("at", [None, 2])
def test_noise(at):
    """A random direction with the norm of the thought, other for each; only where one is."""
    fixed = torch.Generator().manual_seed(0)
    thoughts, latent = torch.randn(4, 3, 100, generator=fixed) * 3, LATENT
    thoughts = thoughts * latent[..., None]
    new, _ = others(Change("noise", at=at), thoughts, latent, seed=5)
    assert torch.allclose(new.norm(dim=-1), thoughts.norm(dim=-1), rtol=1e-5)
    where = latent & (torch.tensor([True] * 3) if at is None else torch.arange(3) == at - 1)
    alike = torch.cosine_similarity(new, thoughts, dim=-1)
    assert (alike[where].abs() < 0.4).all() and torch.equal(new[~where], thoughts[~where])
    again, _ = others(Change("noise", at=at), thoughts[:2], latent[:2], seed=5)
    assert torch.equal(again, new[:2])                     # an item's does not depend on the others
    other, _ = others(Change("noise", at=at), thoughts, latent, seed=6)
    assert not torch.equal(other, new)


def test_noise_of_a_given_deviation():
    """N(0, S^2) is added to each channel, the same directions for each S: a curve."""
    thoughts, latent = torch.ones(50, 2, 100), torch.ones(50, 2).bool()
    one, three = (others(Change("noise", std), thoughts, latent)[0] - 1 for std in (1.0, 3.0))
    assert one.std().item() == pytest.approx(1, abs=0.03) and abs(one.mean().item()) < 0.03
    assert torch.allclose(three, 3 * one, atol=1e-5)
    assert Change("noise", 0.5).label() == "noise +0.5"


def test_distances():
    """By hand: one item of two thoughts, one of one."""
    thoughts = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[6.0, 8.0], [9.0, 9.0]]])
    latent = torch.tensor([[True, True], [True, False]])
    assert evaluation.distances(thoughts, latent) == (5, 10)
    assert evaluation.distances(thoughts, torch.ones(2, 2).bool()) == (
        pytest.approx((5 + 10 ** 0.5) / 2, abs=1e-3), pytest.approx((10 + 61 ** 0.5) / 2, abs=1e-3))
    assert evaluation.distances(thoughts[:1], latent[:1]) == (5, None)
    assert evaluation.distances(thoughts[:, :1], latent[:, :1]) == (None, 10)
    assert evaluation.distances(thoughts[:, :0], latent[:, :0]) == (None, None)


# ---------------------------------------------------------------- what a model then reads

@pytest.fixture
def tok(tok):
    tok.decode = lambda ids: "### " + " ".join(map(str, ids))
    return tok


@pytest.fixture(params=["coconut", "codi", "classifier"])
def thinker(request, model, tok, machine, examples):
    """(Setup, Sequences, think_and_answer) of a model with three thoughts; classifier: with one to
    three, by the question."""
    if request.param == "codi":
        torch.manual_seed(0)
        projection = codi.make_projection(codi_flags(thought_std=1.0), 32).eval()
        projection.requires_grad_(False)
        projection[1].weight *= 5                        # or its biases would make thoughts alike
        projection[3].weight *= 5
        s = setup_of(model, tok, machine, codi_flags(), projection)
        return s, [codi.sequences(e, s.flags, tok)[0] for e in examples], codi.think_and_answer
    s = setup_of(model, tok, machine, decoding(c=1, stage_max=3, plain_stage_0=False))
    if request.param == "classifier":
        model.add_switch()
        model.switch.requires_grad_(False)
        model.switch.weight[:] = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
        model.switch.bias[:] = 0
    return s, coconut.sequences_of(examples, 3, s), coconut.think_and_answer


def naive(s, prompt, thoughts, first, n=12):
    """What a model writes greedily after prompt, thoughts and a first token, all read anew for each
    token, without cache and padding."""
    x = torch.cat([s.model.wte(torch.tensor(prompt)), thoughts, s.model.wte(torch.tensor([first]))])
    said = []
    with torch.no_grad():
        while len(said) < n:
            token = s.model.head(s.model(embeds=x[None])[0, -1]).argmax()
            if token.item() == s.tok.eos:
                break
            said.append(token.item())
            x = torch.cat([x, s.model.wte(token[None])])
    return said


def answered(thinker, change=None, **more):
    s, sequences, think_and_answer = thinker
    items = [dict(answer="1")] * len(sequences)
    own = evaluation.answer_all(s, items, sequences, think_and_answer, **more)
    if change is None:
        return own
    asked, thoughts = battery.changed(change, sequences, own.thoughts, own.latent, s.tok, 0)
    return evaluation.answer_all(s, items, asked, think_and_answer, thoughts=thoughts, **more)


def test_thoughts_are_those_that_were_fed_back(thinker):
    """Read in one go after the question, they lead to the same answers: of Coconut, of CODI (past
    its projection), and where rows have different numbers."""
    s, sequences, think_and_answer = thinker
    own = answered(thinker)
    assert own.latent.any() and len(set(own.texts.values())) > 1
    for i, sequence in enumerate(sequences):
        thoughts = own.thoughts[i][own.latent[i]]
        assert own.texts[i] == s.tok.decode(naive(s, sequence.prompt, thoughts, 65))
    again = answered(thinker, Change("keep"))
    assert again.texts == own.texts and torch.equal(again.latent, own.latent)
    if s.model.switch is not None:
        assert len(set(own.latent.sum(1).tolist())) > 1


@pytest.mark.parametrize("at", [None, 1, 2])
def test_remove_is_a_sequence_without_the_positions(thinker, at):
    s, sequences, _ = thinker
    own, found = answered(thinker), answered(thinker, Change("remove", at=at))
    for i, sequence in enumerate(sequences):
        left = own.thoughts[i][own.latent[i]]
        left = left[:0] if at is None else torch.cat([left[:at - 1], left[at:]])
        assert found.texts[i] == s.tok.decode(naive(s, sequence.prompt, left, 65))
        assert len(left) == found.latent[i].sum()


@pytest.mark.parametrize("at", [None, 2])
@pytest.mark.parametrize("kind", ["zero", "mean", "noise", "swap"])
def test_others_are_read_where_the_own_were(thinker, kind, at):
    s, sequences, _ = thinker
    own, found = answered(thinker), answered(thinker, Change(kind, at=at))
    thoughts, latent = others(Change(kind, at=at), own.thoughts, own.latent, 0)
    for i, sequence in enumerate(sequences):
        assert found.texts[i] == s.tok.decode(
            naive(s, sequence.prompt, thoughts[i][latent[i]], 65))


@pytest.mark.parametrize("at", [None, 2])
def test_pause_tokens_are_removed(model, examples, tok, machine, at):
    """The same Sequences as with as many <pause> tokens fewer, from the start."""
    def look(c):
        return [coconut.curriculum(e, 3, c, 1, "pause-as-thought", tok) for e in examples]

    assert battery.without_pauses(look(4), tok, at) == (look(0) if at is None else look(3))
    s = setup_of(model, tok, machine, decoding(method="pause-as-thought"))
    found = answered((s, look(4), coconut.think_and_answer), Change("remove", at=at))
    for i, sequence in enumerate(look(0) if at is None else look(3)):
        none = torch.zeros(0, 32)
        assert found.texts[i] == tok.decode(naive(s, sequence.prompt, none, 65))


def rows_of(thinker, **more):
    """All rows of the battery; the model's own answers are right for every other question."""
    s, sequences, think_and_answer = thinker
    own = answered(thinker)
    items = [dict(answer=scoring.extract_answer(own.texts[i]) if i % 2 == 0 else "-1")
             for i in range(len(sequences))]
    changes = [Change("keep"), Change("noise", 2.0), *map(Change, KINDS)]
    return battery.measure(s, items, sequences, think_and_answer, changes, **more)


def test_rows(thinker):
    """Every kind changes answers of this model: a battery that ignored one would be seen."""
    keep, *rest = rows_of(thinker)
    assert keep["accuracy"] == 3 / 5 and keep["p"] is None and keep["changed"] is None
    assert keep["interval"] == scoring.wilson(3, 5) and keep["n"] == 5
    for row in rest:
        assert 0 < row["changed"] <= 1, row["thoughts"]
        lost = 3 - round(5 * row["accuracy"])
        assert row["p"] == scoring.mcnemar(lost, 0) and row["interval"][1] < 1
    by_kind = {row["thoughts"]: row for row in rest}
    assert by_kind["zero"]["distance_item"] == by_kind["mean"]["distance_across"] == 0
    assert by_kind["remove"]["distance_item"] is None and keep["distance_across"] > 0


def test_a_battery_that_changes_nothing_is_seen(thinker, monkeypatch):
    monkeypatch.setattr(battery, "others", lambda change, thoughts, latent, *_: (thoughts, latent))
    for row in rows_of(thinker)[1:]:
        assert (row["changed"], row["p"], row["accuracy"]) == (0, 1, 3 / 5)


def test_rows_do_not_depend_on_the_batch(thinker):
    """Five rows in one batch, one by one, in batches of three and two."""
    whole = rows_of(thinker)
    for batch_size in (1, 3):
        for row, other in zip(whole, rows_of(thinker, batch_size=batch_size), strict=True):
            for name in row.keys() - {"seconds"}:
                assert other[name] == pytest.approx(row[name], abs=2e-3), (row["thoughts"], name)


def test_swap_of_pairs_is_between_pairs(thinker):
    """The item before a rewritten question is its original, which asks almost the same."""
    s, sequences, think_and_answer = thinker
    items = [dict(answer="1", pair=i // 2) for i in range(4)] + [dict(answer="1")]
    own = evaluation.answer_all(s, items, sequences, think_and_answer)
    seen = []

    def spy(s, asked, thoughts=None):
        seen.append(thoughts)
        return think_and_answer(s, asked, **({} if thoughts is None else dict(thoughts=thoughts)))

    battery.measure(s, items, sequences, spy, [Change("keep"), Change("swap")])
    order = sorted(range(5), key=lambda i: len(sequences[i].prompt))
    expected, _ = others(Change("swap"), own.thoughts, own.latent, step=2)
    assert torch.allclose(seen[-1], expected[order][:, :seen[-1].size(1)], atol=1e-4)


# ---------------------------------------------------------------- pairs

def test_of_pairs():
    items = [dict(pair=4), dict(pair=4), {}, dict(pair=1), dict(pair=1), dict(pair=2), dict(pair=2)]
    assert scoring.pairs_of(items) == [0, 3, 5]
    found = scoring.of_pairs(items, [True, True, True, True, False, False, True])
    assert (found["n"], found["original"], found["both"]) == (3, 2, 1)
    assert (found["share"], found["follows"]) == (1 / 3, 1 / 2)
    assert found["interval"] == scoring.wilson(1, 3)
    assert found["follows_interval"] == scoring.wilson(1, 2)
    none = scoring.of_pairs(items, [False] * 7)
    assert (none["share"], none["follows"]) == (0, None)
    assert scoring.of_pairs([{}, {}], [True, True]) is None
    assert scoring.of_pairs(items[:1], [True]) is None


@pytest.fixture(scope="session")
def pair_data(data, tmp_path_factory):
    """The data of the tiny runs, whose test questions come in pairs."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    splits = {split: list(items) for split, items in data_prep.load(data).items()}
    splits["test"] = [item | dict(pair=i // 2) for i, item in enumerate(splits["test"])]
    data_prep.write_dataset(folder, splits)
    return folder


def test_the_field_is_kept(pair_data):
    assert [item["pair"] for item in data_prep.load(pair_data)["test"]] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("numbers, words", [
    ([1, 2, 1], "test.json: pair 1 is that of item 1, 3; a pair needs two items"),
    ([1, 1, 1], "item 1, 2, 3"), ([1, 1, 3], "pair 3 is that of item 3"),
    (["a", "a"], "item 1: field 'pair' is 'a', not a whole number")])
def test_bad_pairs(tmp_path, numbers, words):
    items = [dict(question=f"{i}?", steps=[], answer="1", pair=n) for i, n in enumerate(numbers)]
    with pytest.raises(runtime.UserError, match=words):
        data_prep.validate(dict(test=items), tmp_path)


# ---------------------------------------------------------------- the scripts

SCRIPTS = {"coconut": test_runs, "codi": test_codi}


@pytest.fixture(scope="module")
def trained(pair_data, tmp_path_factory):
    """{name: best.pt}"""
    folder, found = tmp_path_factory.mktemp("trained"), {}
    for name, script, more in (("coconut", "coconut", ""), ("codi", "codi", ""),
                               ("cot", "coconut", "--method cot"),
                               ("pause-as-thought", "coconut", "--method pause-as-thought"),
                               ("words", "codi", "--method cot")):
        start = SCRIPTS[script].start
        assert SCRIPTS[script].run(start(pair_data, folder / name, more)) == 0
        found[name] = folder / name / "best.pt"
    return found


def run(name, path, *more):
    script = SCRIPTS["codi" if name in ("codi", "words") else "coconut"]
    return script.run(["--eval-only", path, *more])


@pytest.mark.parametrize("name", ["coconut", "codi"])
def test_eval_only_with_all(trained, capsys, name):
    """A line per kind, keep first; battery.json has their numbers; pairs have their own lines."""
    argv = ["--thoughts", "all", "--noise-std", "0.1,2"]
    assert run(name, trained[name], *argv) == 0
    out = capsys.readouterr().out
    assert "8 test questions" in out and "manifold" in out and max(map(len, out.split("\n"))) < 140
    labels = ["keep", "remove", "zero", "mean", "noise", "noise +0.1", "noise +2", "shuffle",
              "swap"]
    lines = out[out.index("\nthoughts"):].splitlines()[2:2 + len(labels)]
    assert [line[:12].strip() for line in lines] == labels
    path = trained[name].with_name("battery.json")
    assert f"wrote {path}" in out
    rows = json.loads(path.read_text())["rows"]
    assert [row["thoughts"] for row in rows] == [label.split()[0] for label in labels]
    assert [row["noise_std"] for row in rows if row["noise_std"]] == [0.1, 2.0]
    assert out.count("pairs: both right") == 1 and out.count("pairs, swap: both right") == 1
    for row, line in zip(rows, lines):
        assert f"{100 * row['accuracy']:.1f} %" in line and row["pairs"]["n"] == 4
    assert run(name, trained[name]) == 0                  # the plain table has pairs too
    out = capsys.readouterr().out
    assert "dist. item" in out and out.count("both right") == (1 if name == "coconut" else 2)


def test_keep_is_what_is_without(trained, capsys):
    """keep has the numbers of --eval-only; typed or not it comes first, once."""
    assert run("coconut", trained["coconut"], "--thoughts", "swap,keep,swap") == 0
    rows = json.loads(trained["coconut"].with_name("battery.json").read_text())["rows"]
    assert [row["thoughts"] for row in rows] == ["keep", "swap"]
    s, stage = coconut.trained_model(trained["coconut"], {})
    plain = staged.test_row(s, data_prep.load(s.flags.data)["test"], stage, coconut.sequences_of,
                            coconut.think_and_answer)
    for name in ("accuracy", "tokens", "sample", "thought_norms", "distance_item", "pairs"):
        assert json.loads(json.dumps(plain[name])) == rows[0][name]


def test_pause_tokens(trained, capsys):
    assert run("pause-as-thought", trained["pause-as-thought"], "--thoughts", "all") == 0
    rows = json.loads(trained["pause-as-thought"].with_name("battery.json").read_text())["rows"]
    assert [row["thoughts"] for row in rows] == ["keep", "remove"]
    capsys.readouterr()
    assert run("coconut", trained["pause-as-thought"], "--thoughts", "remove", "--at", "2") == 0
    assert "only thought 2" in capsys.readouterr().out


@pytest.mark.parametrize("name, more, words", [
    ("cot", "--thoughts zero", "no thoughts to replace"),
    ("words", "--thoughts all", "no thoughts to replace"),
    ("cot", "--thoughts zero --ask x?", "no thoughts to replace"),
    ("pause-as-thought", "--thoughts zero", "only be removed"),
    ("pause-as-thought", "--thoughts all --noise-std 1", "--noise-std"),
    ("pause-as-thought", "--thoughts remove --at 3", "has 2 thoughts"),
    ("coconut", "--thoughts zero --at 3", "--at 3"), ("codi", "--thoughts zero --at 3", "--at 3"),
    ("coconut", "--thoughts swap --ask x?", "--ask"), ("codi", "--thoughts mean --ask x?", "--ask"),
    ("coconut", "--thoughts zero,noise --ask x?", "--ask"),
    ("coconut", "--thoughts all --ask x?", "--ask"),
    ("coconut", "--thoughts noise --noise-std 1 --ask x?", "--ask"),
    ("codi", "--thoughts zero --noise-std 1", "--noise-std"),
    ("coconut", "--thoughts noise --noise-std 1,0", "--noise-std"),
    ("coconut", "--thoughts noise --noise-std 1;2", "--noise-std"),
    ("coconut", "--thoughts shuffle --at 1", "--at"), ("codi", "--at 1", "--at"),
    ("coconut", "--thoughts zero --at 0", "--at"), ("codi", "--thoughts zero,other", "other")])
def test_refused(trained, capsys, name, more, words):
    assert run(name, trained[name], *more.split()) == 2
    error = capsys.readouterr().err
    assert words in error.splitlines()[-1] and "Traceback" not in error


@pytest.mark.parametrize("script", [coconut, codi])
@pytest.mark.parametrize("more", ["--thoughts zero", "--at 1", "--noise-std 1",
                                  "--table --thoughts zero"])
def test_needs_a_trained_model(capsys, script, more):
    with pytest.raises(SystemExit) as stop:
        script.parse_flags(more.split())
    assert stop.value.code == 2 and "add --eval-only" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["coconut", "codi"])
@pytest.mark.parametrize("more", ["zero", "remove", "noise", "shuffle", "zero --at 1"])
def test_ask(trained, capsys, name, more):
    """The model's own thoughts are shown, what it says is said after others."""
    argv = ["--ask", "Ned has 3 pens. How many pens does Ned have?", "--thoughts", *more.split()]
    assert run(name, trained[name], *argv) == 0
    assert capsys.readouterr().out.count("thought ") == 2


def test_ask_reads_others(thinker, capsys):
    s, sequences, think_and_answer = thinker
    tok = s.tok
    for kind in ("zero", "remove"):
        s.flags.thoughts, s.flags.at, s.flags.noise_std = kind, None, None
        battery.show(s, sequences[1], think_and_answer, kind=kind)
        assert capsys.readouterr().out.splitlines()[-1] == answered(thinker, Change(kind)).texts[1]


# ---------------------------------------------------------------- --table

def test_table_of_codi(pair_data, tmp_path, capsys):
    """Below codi, and only there, the battery; changed and p of each seed; settings for figures."""
    out = tmp_path / "t"
    argv = test_codi.start(pair_data, out, "--table --rows codi,no-kd --seeds 2")
    assert test_codi.run(argv) == 0
    shown = json.loads((out / "table.json").read_text())
    assert [(row["method"], row["thoughts"]) for row in shown["rows"]] == [
        *[("codi", kind) for kind in battery.KINDS], ("no-kd", "keep")]
    assert list(shown["rows"][0]["more"]) and shown["rows"][1]["more"] == {}
    for row in shown["rows"][1:len(battery.KINDS)]:
        assert len(row["p"]) == len(row["changed"]) == len(row["pairs"]) == 2
    settings = shown["settings"]
    assert (settings["n_layer"], settings["n_latent"], settings["seeds"]) == (1, 2, [0, 1])
    text = (out / "table.md").read_text()
    assert "| codi, thoughts swap |" in text and "changed, % | p (largest) |" in text
    rows = tables.read_tables(str(out / "table.json"))         # with columns of its own, or without
    assert "changed, %" in tables.markdown(rows)[0]
    for row in shown["rows"]:
        for name in ("p", "changed", "distance_item", "distance_across", "interval", "pairs"):
            row.pop(name, None)
        row["seconds_batch_1"] = row["seconds_batch_1"] or 0.01
    (tmp_path / "old.json").write_text(json.dumps(dict(rows=shown["rows"])))
    old = tables.markdown(tables.read_tables(str(tmp_path / "old.json")))
    assert "changed" not in old[0] and len(old) == 2 + len(shown["rows"])


def test_settings_of_released_weights(pair_data, tmp_path, trained):
    """The shape in table.json is that of the weights, not of the defaults."""
    argv = ["--table", *test_runs.start(pair_data, tmp_path / "t",
                                        f"--init {trained['cot']} --methods cot --seeds 1")]
    assert test_runs.run(argv) == 0
    settings = json.loads((tmp_path / "t" / "table.json").read_text())["settings"]
    assert (settings["n_layer"], settings["n_embd"], settings["stage_max"]) == (1, 16, 2)
