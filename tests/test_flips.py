"""common/flips.py: pairs of questions that differ in one edge or number, and in their answers."""

import functools
import json
import os
import random
import re

import pytest

import data_prep
import test_runs
from common import flips
from common.graphs import graph_stats
from common.puzzles import CHAINS_SIZES, MINI_SIZES, chains, generate, prosqa_item, prosqa_mini
from common.runtime import UserError
from common.scoring import pairs_of
from test_text import solve


@pytest.fixture(scope="module", autouse=True)
def made_once():
    """The test questions of prosqa-mini take nine seconds to make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flips, "prosqa_mini", functools.cache(prosqa_mini))
        yield


@pytest.fixture(scope="module")
def mini():
    return flips.prosqa_mini_flips()["test"]


@pytest.fixture(scope="module")
def mini_test():
    """The test questions of prosqa-mini."""
    return flips.prosqa_mini((0, 0, MINI_SIZES[2]))["test"]


@pytest.fixture(scope="module")
def numbers():
    return flips.chains_flips()["test"]


@pytest.fixture(scope="module")
def prosqa():
    """Test questions of the paper's size."""
    return generate(lambda rng: [prosqa_item(rng)], (0, 0, 120), 0)["test"]


@pytest.fixture(scope="module")
def edges(mini, prosqa):
    """{name: the pairs of a data set}"""
    sets = {"prosqa-mini": mini, "prosqa": flips.prosqa_flips(prosqa)["test"]}
    return {name: list(zip(items[::2], items[1::2])) for name, items in sets.items()}


def without_pair(item):
    return {field: value for field, value in item.items() if field != "pair"}


def in_one_word(original, changed):
    """The two words in which the questions differ; there are no others."""
    a, b = original["question"].split(), changed["question"].split()
    (one, other), = [words for words in zip(a, b, strict=True) if words[0] != words[1]]
    return one, other


# ---------------------------------------------------------------- edges

def told(question):
    """What the text alone says: sentences as pairs of names, the one asked, the two options."""
    *facts, asked = re.split(r"(?<=\.) ", question)
    facts = [re.fullmatch(r"(?:Every (?=[a-z]))?(\w+) is a ([a-z]+)\.", fact).groups()
             for fact in facts]
    asked, *options = re.fullmatch(r"Is (\w+) a (\w+) or (\w+)\?", asked).groups()
    return facts, asked, options


def ways(facts, a):
    """All walks along facts that begin at the name a, as tuples of names. Raises on a cycle."""
    found = [(a,)]
    for way in found:
        for one, other in facts:
            if one == way[-1]:
                assert other not in way
                found.append((*way, other))
    return found


@pytest.mark.parametrize("name, least, most", [("prosqa-mini", 3, 3), ("prosqa", 3, 6)])
def test_a_moved_edge_flips_the_answer(edges, name, least, most):
    """By a search over the sentences: one sentence ends with another concept, and the root reaches
    the other option; nothing else differs."""
    for pair in edges[name]:
        original, changed = pair
        both = zip(original["edges"], changed["edges"], strict=True)
        place, = [i for i, (edge, moved) in enumerate(both) if edge != moved]
        (a, b), (same, c) = original["edges"][place], changed["edges"][place]
        names = original["idx_to_symbol"]
        assert a == same and in_one_word(*pair) == (f"{names[b]}.", f"{names[c]}.")
        assert original["answer"] != changed["answer"]
        assert original["pair"] == changed["pair"] and original["root"] == changed["root"]
        assert names == changed["idx_to_symbol"]
        assert original["target"] == changed["neg_target"]
        assert original["neg_target"] == changed["target"]
        for item in pair:
            facts, asked, options = told(item["question"])
            assert sorted(facts) == sorted((names[v], names[w]) for v, w in item["edges"])
            assert len(set(facts)) == len(facts)
            assert {name for fact in facts for name in fact} == set(names)
            reached = ways(facts, asked)
            right, = [option for option in options if any(way[-1] == option for way in reached)]
            assert item["answer"] == f"{asked} is a {right}."
            assert asked == names[item["root"]] and right == names[item["target"]]
            shortest = min(len(way) - 1 for way in reached if way[-1] == right)
            assert least <= shortest == len(item["steps"]) <= most
            steps = [re.fullmatch(r"(?:Every )?(\w+) is a (\w+)\.", step).groups()
                     for step in item["steps"]]
            assert (asked, *[b for _, b in steps]) in reached
            assert all(one[1] == other[0] for one, other in zip(steps, steps[1:]))
            assert all(step in item["question"] for step in item["steps"])
            for start in {one for one, _ in facts}:
                ways(facts, start)                  # no cycle, wherever one begins


def test_originals_are_the_test_questions(mini, mini_test, numbers):
    for items, test in ((mini, mini_test), (numbers, chains((5, 0, CHAINS_SIZES[2]))["test"])):
        assert pairs_of(items) == list(range(0, len(items), 2))
        originals = [without_pair(item) for item in items[::2]]
        assert originals == [test[item["pair"]] for item in items[::2]]
    assert len(mini) == 2 * 319 and len(numbers) == 2 * CHAINS_SIZES[2]


def test_questions_without_a_move_are_left_out(mini, mini_test):
    """An independent list of all moves of the first questions: each flipped one has some, and the
    one that was taken is among them."""
    taken = {item["pair"]: item["edges"] for item in mini[1::2]}
    for i, item in enumerate(mini_test[:25]):
        good, wrong = [], item["neg_target"]
        for place, (a, b) in enumerate(item["edges"]):
            for c in range(len(item["idx_to_symbol"])):
                edges = [list(e) for e in item["edges"]]
                edges[place] = [a, c]
                if a == c or [a, c] in item["edges"] or item["idx_to_symbol"][c][0].isupper():
                    continue
                if {v for e in edges for v in e} != {v for e in item["edges"] for v in e}:
                    continue
                try:
                    for v in {v for v, _ in edges}:
                        ways(edges, v)
                except AssertionError:
                    continue
                found = ways(edges, item["root"])
                lengths = [len(way) - 1 for way in found if way[-1] == wrong]
                if lengths and min(lengths) == 3 and all(w[-1] != item["target"] for w in found):
                    good.append(edges)
        assert bool(good) == (i in taken)
        assert not good or taken[i] in good


def test_floors_are_those_of_the_docstring(mini):
    table = re.findall(r"^ +(more ancestors|fewer in-edges) +([\d.]+) +([\d.]+)$",
                       flips.prosqa_mini_flips.__doc__, re.M)
    assert len(table) == 2
    for name, *written in table:
        found = [graph_stats(items)[f"floor: {name}, %"] for items in (mini[::2], mini[1::2])]
        assert [f"{value:.1f}" for value in found] == written


def test_the_same_again(prosqa, edges):
    """Those of prosqa-mini and chains: see test_commands."""
    assert flips.prosqa_flips(prosqa)["test"] == [item for pair in edges["prosqa"] for item in pair]


def test_bad_graphs(prosqa):
    item = next(item for item in prosqa if flips.edge_moves(item, (3, 6)))
    for changed, words in (
            ({"question": item["question"].replace(" is a ", " is an ")}, "not have the sentence"),
            ({"question": item["question"] + " " + item["question"]}, "not have the sentence")):
        with pytest.raises(UserError, match=words):
            flips.prosqa_flips([item | changed])
    without = {field: value for field, value in item.items() if field != "edges"}
    with pytest.raises(UserError, match="without its graph"):
        flips.prosqa_flips([without])


# ---------------------------------------------------------------- numbers

def test_another_number_changes_the_answer(numbers):
    """All limits of the generator hold; each number is rewritten in about a quarter of the pairs,
    and every step from there on is another calculation."""
    places = []
    for pair in zip(numbers[::2], numbers[1::2]):
        one, other = (re.findall(r"\d+", item["question"]) for item in pair)
        place, = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        places.append(place)
        old, new = in_one_word(*pair)
        assert (old.rstrip("."), new.rstrip(".")) == (one[place], other[place])
        for item in pair:
            values, _, _, steps, _ = solve(item["question"])
            assert item["answer"] == str(values[-1]) and item["steps"] == steps
            assert 1 <= values[0] < 20 and all(0 <= v < 20 for v in values)
            assert all(int(n) < 40 for n in re.findall(r"\d+", item["question"]))
        assert pair[0]["answer"] != pair[1]["answer"] and len(pair[1]["steps"]) == 3
        differ = [a != b for a, b in zip(pair[0]["steps"], pair[1]["steps"])]
        assert differ == [i >= max(place - 1, 0) for i in range(3)]
    assert all(200 < places.count(place) < 300 for place in range(4))


def test_a_number_that_cannot_change():
    """With counts below 2 only n = 1 or 3 can take the place of 2; below 1 nothing can."""
    item = dict(question="Ned has 1 pens. Ben has what separates twice Ned from 2. How many pens "
                         "does Ben have?", steps=["<<2*1-2=0>>"], answer="0")
    for seed in range(5):
        changed = flips.with_another_number(random.Random(seed), item, limit=2)
        old, new = in_one_word(item, changed)
        assert old == "2." and new in ("1.", "3.") and changed["answer"] == "1"
    assert flips.with_another_number(random.Random(0), item, limit=1) is None
    words = "0 of 1 questions can be flipped by one number; take other questions"
    with pytest.raises(UserError, match=words):
        flips.in_pairs([item], lambda rng, item: None, "number")


# ---------------------------------------------------------------- data sets, evaluation

def test_commands(tmp_path, monkeypatch, capsys, mini, numbers, prosqa):
    monkeypatch.chdir(tmp_path)
    assert data_prep.main(["prosqa-flips"]) == 2
    assert "make it with 'python data_prep.py prosqa'" in capsys.readouterr().err
    data_prep.write_dataset("data/prosqa", dict(test=prosqa))
    assert data_prep.main(["prosqa-flips"]) == 0
    assert " of 120 questions can be flipped by one edge\n" in capsys.readouterr().out
    assert data_prep.main(["prosqa-flips", "--data", "data/prosqa", "--out", "again"]) == 0
    made = (tmp_path / "again" / "test.json").read_bytes()
    assert made == (tmp_path / "data" / "prosqa-flips" / "test.json").read_bytes()
    for name, items in (("prosqa-mini-flips", mini), ("chains-flips", numbers)):
        assert data_prep.load(name, need=("test",)) == {"test": items}       # made when absent
        assert "questions can be flipped by one" in capsys.readouterr().out
        assert os.listdir(tmp_path / "data" / name) == ["test.json"]
        with pytest.raises(UserError, match=f"{name} is a test set alone"):
            data_prep.load(name)
    assert data_prep.main(["chains-flips", "--out", "again"]) == 0
    assert json.loads((tmp_path / "again" / "test.json").read_text()) == numbers


def test_eval_only_prints_the_pairs(tmp_path, monkeypatch, capsys):
    """A tiny model that has read all numbers of chains answers chains-flips, made on the spot."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flips, "CHAINS_SIZES", (0, 0, 12))
    data_prep.write_dataset("data/some", chains((400, 6, 8)))
    assert test_runs.run(test_runs.start("some", tmp_path / "run")) == 0
    capsys.readouterr()
    argv = ["--eval-only", tmp_path / "run" / "best.pt", "--data", "chains-flips"]
    assert test_runs.run(argv) == 0
    out = capsys.readouterr().out
    assert "12 of 12 questions can be flipped by one number" in out and "24 test questions" in out
    assert re.search(r"^pairs: both right .* of 12; of the \d+ whose original is right", out, re.M)
