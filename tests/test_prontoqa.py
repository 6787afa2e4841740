"""ProntoQA: what every generated question must hold, and the original generator's output."""

import json
import random
import re

import pytest

import data_prep as dp
from common.puzzles import generate, prontoqa_item
from common.runtime import UserError


def parse(sentence):
    """'Wumpuses are not shy.' -> (wumpus, shy, False); kinds come without article and plural."""
    words = sentence.removesuffix(".").split()
    subject = words[1] if words[0] in ("Every", "Each") else words[0]
    rest = words[words.index("is" if "is" in words else "are") + 1:]
    positive, what = rest[0] != "not", rest[-1]
    subject, what = (re.sub("uses$", "us", w.lower()) for w in (subject, what))
    return subject, what, positive


def derivations(rules, subject, goal):
    """In how many ways do the rules lead from the subject to (property, positive)?"""
    ways = 0
    for a, b, positive in rules:
        if a == subject:
            ways += (b, positive) == goal or (positive and derivations(rules, b, goal))
    return ways


@pytest.fixture(scope="module")
def items():
    splits = generate(lambda rng: [prontoqa_item(rng)], (900, 50, 50), 0)
    return sum(splits.values(), [])


def test_exactly_one_derivation(items):
    """One way, of five hops, leads to the property asked for, and none to its opposite: the answer
    follows."""
    for item in items:
        *facts, premise, query = re.split(r"(?<=\.) ", item["question"])
        rules, (entity, start, _) = [parse(f) for f in facts], parse(premise)
        _, asked, positive = parse(query.removeprefix("True or false: "))
        ways = {p: derivations(rules, start, (asked, p)) for p in (True, False)}
        assert sorted(ways.values()) == [0, 1]
        assert item["answer"] == str(ways[positive] == 1)
        assert not [r for r in rules if r[1] == entity] and len(set(facts)) == len(facts)


def test_steps_are_the_proof(items):
    """Premise, then rule and conclusion in turn; rules are in the question word for word."""
    for item in items:
        steps = item["steps"]
        assert len(steps) == 11
        assert all(f" {s} " in f" {item['question']} " for s in [steps[0], *steps[1::2]])
        here = parse(steps[0])
        for rule, conclusion in zip(map(parse, steps[1::2]), map(parse, steps[2::2])):
            assert rule[0] == here[1] and conclusion == (here[0], *rule[1:])
            here = conclusion


def test_answers_are_balanced_and_have_no_shortcut(items):
    """True in half; neither the asked sign nor the position of the last rule tells it."""
    def share(found):
        return sum(found) / len(found)

    denied = ["not" in i["question"].rpartition(":")[2] for i in items]
    true = [i["answer"] == "True" for i in items]
    assert abs(share(true) - 0.5) < 0.07
    assert abs(share([a == b for a, b in zip(denied, true)]) - 0.5) < 0.2
    for item in items:       # the asked property is there twice, once denied
        asked = item["question"].split()[-1][:-1]
        facts = re.split(r"(?<=\.) ", item["question"])[:-2]
        signs = [parse(s)[2] for s in facts if s.endswith(f" {asked}.")]
        assert sorted(signs) == [False, True]


def test_distractors(items):
    """Every concept of the proof has a second parent."""
    for item in items[:100]:
        rules = [parse(s) for s in re.split(r"(?<=\.) ", item["question"])[:-2]]
        for s in item["steps"][0:-2:2]:
            kinds = [r for r in rules if r[0] == parse(s)[1] and r[1].endswith("pus")]
            assert len(kinds) == 2 or parse(item["steps"][-2])[0] == parse(s)[1]


def test_sentences_per_step():
    a, b = (prontoqa_item(random.Random(3), sentences_per_step=n) for n in (1, 2))
    assert len(b["steps"]) == 6 and " ".join(a["steps"]) == " ".join(b["steps"])
    assert a["question"] == b["question"]


def test_too_many_hops():
    assert len(prontoqa_item(random.Random(0), n_hops=16)["steps"]) == 33
    with pytest.raises(UserError, match="--n-hops 17"):
        prontoqa_item(random.Random(0), n_hops=17)


def original(n):
    """What asaparov/prontoqa writes."""
    examples = {}
    for i in range(n):
        examples[f"example{i + 1}"] = {"test_example": {
            "question": f"Wumpuses are cats. Item {i} is a wumpus.",
            "query": f"True or false: Item {i} is a cat.",
            "chain_of_thought": [f"Item {i} is a wumpus.", "Wumpuses are cats.",
                                 f"Item {i} is a cat."],
            "answer": "True"}}
    return examples


def test_from_the_original_generator(tmp_path):
    (tmp_path / "5hop.json").write_text(json.dumps(original(10)))
    argv = ["prontoqa", "--from", str(tmp_path / "5hop.json"), "--out", str(tmp_path / "p"),
            "--sizes", "7,1,2"]
    assert dp.main(argv) == 0
    splits = dp.load(tmp_path / "p")
    assert {s: len(items) for s, items in splits.items()} == dict(train=7, valid=1, test=2)
    assert splits["test"][0] == {
        "question": "Wumpuses are cats. Item 8 is a wumpus. True or false: Item 8 is a cat.",
        "answer": "True",
        "steps": ["Item 8 is a wumpus.", "Wumpuses are cats.", "Item 8 is a cat."]}
    assert dp.main([*argv, "--sentences-per-step", "2"]) == 0
    steps = dp.load(tmp_path / "p")["test"][0]["steps"]
    assert steps == ["Item 8 is a wumpus. Wumpuses are cats.", "Item 8 is a cat."]


BAD = {"question": "a", "query": "b", "chain_of_thought": ["c"], "answer": True}


@pytest.mark.parametrize("content, words", [
    ("[1]", "5hop.json"), ("{", "5hop.json"), ('{"example1": {}}', "test_example"),
    (json.dumps(original(3)), "--sizes"),
    (json.dumps(original(9) | {"x": {"test_example": BAD}}), "example 10")])
def test_bad_original(tmp_path, capsys, content, words):
    (tmp_path / "5hop.json").write_text(content)
    argv = ["prontoqa", "--from", str(tmp_path / "5hop.json"), "--out", str(tmp_path / "p"),
            "--sizes", "7,1,2"]
    assert dp.main(argv) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "p").exists()
