"""probe.py on graphs drawn by hand, and its probabilities against a plain loop."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import codi
import data_prep
import probe
from common import comparison, frontier, runtime
from common.puzzles import chains, prosqa_mini
from common.text import Example, Tokenizer
from gpt2 import GrowingCache
from test_runs import SMALL, run
from tiny import codi_flags, decoding, setup_of, tiny_model

# Ann -> cat -> dog -> elk = target     Ann -> cow -> dog     Ann -> fox     dog -> gnu
# Bob -> hen = other option
NAMES = ["Ann", "Bob", "cat", "cow", "dog", "elk", "fox", "gnu", "hen"]
ITEM = dict(question="..", answer="Ann is a elk.", idx_to_symbol=NAMES, root=0, target=5,
            neg_target=8,
            steps=["Ann is a cat.", "Every cat is a dog.", "Every dog is a elk."],
            edges=[[0, 2], [0, 3], [0, 6], [2, 4], [3, 4], [4, 5], [4, 7], [1, 8], [2, 3]])


@pytest.fixture
def graph():
    return frontier.Graph(ITEM)


def test_graph(graph):
    assert {NAMES[v]: d for v, d in graph.depth.items()} == dict(
        Ann=0, cat=1, cow=1, fox=1, dog=2, elk=3, gnu=3)
    assert {NAMES[v] for v in graph.reaches} == {"Ann", "cat", "cow", "dog", "elk"}
    assert dict(zip(NAMES, (graph.height[v] for v in range(9)))) == dict(
        Ann=1, Bob=1, cat=2, cow=2, dog=1, elk=0, fox=0, gnu=0, hen=0)
    circle = frontier.Graph(ITEM | dict(edges=[[0, 1], [1, 0]]))
    assert circle.height[0] == 0                         # no leaf below it


@pytest.mark.parametrize("text, outcome", [
    ("Ann is a cat.\nEvery cat is a dog.\nEvery dog is a elk.\n### Ann is a elk.", "Correct Path"),
    ("Ann is a cow.\nEvery cow is a dog.\nEvery dog is a elk.\n### Ann is a elk.", "Correct Path"),
    ("Every cow is a dog.\nEvery dog is a elk.\n### Ann is a elk.", "Correct Path"),
    ("Every dog is a elk.\n### Ann is a hen.", "Correct Path"),     # the path counts, not the label
    ("Ann is a cat.\nEvery cat is a cow.\nEvery cow is a dog.\nEvery dog is a elk.\n"
     "### Ann is a elk.", "Longer Path"),
    ("Every cat is a cow.\nEvery cow is a dog.\nEvery dog is a elk.\n", "Longer Path"),
    ("Ann is a elk.\n### Ann is a elk.", "Hallucination"),                         # no such edge
    ("Ann is a cat.\nEvery dog is a elk.\n### Ann is a elk.", "Hallucination"),    # no path
    ("Bob is a hen.\n### Ann is a hen.", "Hallucination"),                         # not below root
    ("Every cat is a dog\n### Ann is a elk.", "Hallucination"),                    # no sentence
    ("Every cat is a wug.\n", "Hallucination"),
    ("Ann is a fox.\n### Ann is a elk.", "Wrong Target"),
    ("Every dog is a gnu.\n### Ann is a elk.", "Wrong Target"),
    ("Ann is a cat.\n", "Wrong Target"),
    ("### Ann is a elk.", "Correct Label"),
    ("### Ann is a hen.", "Incorrect Label"),
    ("", "Incorrect Label")])
def test_classify(graph, text, outcome):
    assert frontier.classify(text, graph, ITEM["answer"]) == outcome


def test_frontier(graph):
    """After one thought: cat and cow lead to the target, fox does not."""
    value = [0.0, 0.9, 0.4, 0.2, 0.1, 0.0, 0.2, 0.0, 0.0]
    got = frontier.frontier_summary([graph], [value], 1)
    q = np.array([0.5, 0.25, 0.25])
    effective = np.exp(-(q * np.log(q)).sum())
    assert got == pytest.approx(dict(n=1, size=3, mass=0.8, effective=effective, right=0.75,
                                     chance=2 / 3))
    assert frontier.frontier_summary([graph], [value], 2)["n"] == 0   # only dog: nothing to choose
    one = [0.0] * 9
    one[2] = 1.0
    assert frontier.frontier_summary([graph], [one], 1)["effective"] == pytest.approx(1)


def test_height(graph):
    value = [0.0, 0.9, 0.4, 0.2, 0.1, 0.5, 0.2, 0.3, 0.0]
    got = frontier.height_summary([graph, graph], [value, value], 1)
    assert got == {0: {"leads to target": (None, 0), "does not": (pytest.approx(0.2), 2)},
                   2: {"leads to target": (pytest.approx(0.3), 4), "does not": (None, 0)}}
    assert frontier.height_summary([graph], [value], 3) == {
        0: {"leads to target": (0.5, 1), "does not": (0.3, 1)}}


def test_cumulated():
    got = frontier.cumulated([[0.1, 0.5, 0.2, 0.05], [0.3, 0.4]])
    assert [got[n][2] for n in (1, 2, 3)] == pytest.approx([0.45, 0.7, 0.75])
    assert all(a <= b for a, b in zip(got[1], got[2]))


def test_tree(graph):
    """Each node below the root once, with its value, under a parent one step nearer to the root."""
    lines = frontier.tree_lines(graph, [0, 0, 0.5, 0.25, 0.1, 1.0, 0, 0, 0])
    names = [line.lstrip("│├└─ ").split()[0] for line in lines]
    assert names == ["Ann", "cat", "dog", "elk", "gnu", "cow", "fox"]
    assert lines[1].count("█") == 10 and "leads to target" in lines[1]
    assert lines[3].endswith("= target")


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("method", ["coconut", "pause", "cot"])
def test_node_values_are_products_over_tokens(model, machine, method, k, batch_size):
    """Names of one, two and three tokens: the product of each token's probability given all before
    it: the question, k thoughts or <pause> tokens, or neither and no marks."""
    words = {"Every": [5], "Every aa": [5, 11], "Every bb": [5, 12, 13],
             "Every cc": [5, 12, 14, 15], "Every d": [5, 40]}
    joined = {"Every d is a": [5, 41]}          # this tokenizer has a piece "d is a"

    def encode(text):
        return joined.get(text) or words[text.removesuffix(" is a")] + [50] * text.endswith(" is a")

    tok = SimpleNamespace(eos=62, bot=64, eot=65, pause=66, encode=encode)
    items = [dict(idx_to_symbol=["aa", "bb", "cc"]), dict(idx_to_symbol=["d", "bb"])]
    examples = [Example([1, 2, 3], [], []), Example([9], [], [])]
    s = setup_of(model, tok, machine, decoding(method=method))
    with torch.no_grad():
        got = probe.node_values(s, items, examples, k, batch_size)
        for item, example, values in zip(items, examples, got):
            read = dict(coconut=[tok.bot], pause=[tok.bot] + k * [tok.pause], cot=[])[method]
            x, end = model.wte(torch.tensor([example.question + read])), [tok.eot]
            if method == "coconut":
                for _ in range(k):
                    x = torch.cat([x, model(embeds=x)[:, -1:]], 1)
            if method == "cot":
                end = []
            for name, value in zip(item["idx_to_symbol"], values):
                ids, expected = joined.get(f"Every {name} is a") or words["Every " + name], 1.0
                for t in range(1, len(ids)):
                    given = torch.cat([x, model.wte(torch.tensor([end + ids[:t]]))], 1)
                    p = model.head(model(embeds=given)[0, -1]).softmax(-1)
                    expected *= p[ids[t]].item()
                assert value == pytest.approx(expected, rel=1e-3)


def run_probe(argv):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["probe.py", *map(str, argv)])
        runtime.run_main(probe.main)
    return stop.value.code or 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Little runs on ProsQA data."""
    folder = tmp_path_factory.mktemp("probe")
    data_prep.write_dataset(folder / "mini", prosqa_mini((40, 4, 6)))
    for method in ("coconut", "cot", "pause-as-thought", "no-thought"):
        assert run(["--data", folder / "mini", "--out", folder / method, "--method", method,
                    *SMALL.split(), "--block-size", "256"]) == 0
    return folder


def test_probe_runs(trained, capsys):
    """Everything is printed and written: distributions sum to 1, values are probabilities."""
    assert run_probe([trained / "coconut" / "best.pt", "--item", "2", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    results = json.loads((trained / "coconut" / "probe.json").read_text())
    assert [row["k"] for row in results["k"]] == [0, 1, 2]
    assert results["n"] == 6 and len(results["thoughts"]) == 2
    for row in results["k"]:
        assert sum(row["outcomes"].values()) == pytest.approx(1)
        assert all(0 <= v <= 1 for v in row.get("values", []))
    assert "test item 2" in text and "Hallucination" in text and "─ " in text
    assert "stage mixing" not in text
    assert all(len(thought["top"]) == 5 for thought in results["thoughts"])


def test_probe_says_when_a_model_was_not_mixed(trained, capsys):
    state = torch.load(trained / "coconut" / "best.pt", weights_only=True)
    state["flags"]["uniform_prob"] = 0.0
    torch.save(state, trained / "plain.pt")
    assert run_probe([trained / "plain.pt", "--n", "2", "--out", trained / "o"]) == 0
    assert "--uniform-prob 0" in capsys.readouterr().out


def test_probe_without_graph(trained, tmp_path, capsys):
    data_prep.write_dataset(tmp_path / "chains", chains((4, 2, 3)))
    assert run_probe([trained / "coconut" / "best.pt", "--data", tmp_path / "chains",
                      "--out", tmp_path]) == 0
    text = capsys.readouterr().out
    assert "thought 1" in text and "items with a graph" in text


@pytest.mark.parametrize("argv, word", [
    (["{}/coconut/best.pt", "--item", "7"], "--item 7"),
    (["{}/none.pt"], "none.pt"), (["{}/coconut/best.pt", "--data", "nowhere"], "nowhere"),
    (["{}/coconut/metrics.jsonl"], "JSON text")])
def test_probe_refuses(trained, capsys, argv, word):
    assert run_probe([a.format(trained) for a in argv]) == 2
    assert word in capsys.readouterr().err


def test_plot(trained, tmp_path, capsys):
    """--plot: what thoughts look at, results of steps, and after each k > 0 two pictures, with a
    line for each of the best 1, 2, 3 nodes."""
    best = trained / "coconut" / "best.pt"
    assert run_probe([best, "--n", "4", "--plot", "--out", tmp_path]) == 0
    printed = capsys.readouterr().out
    names = {f"thoughts-{k}-{kind}.svg" for k in (1, 2) for kind in ("best", "height")}
    names |= {"thoughts-looks-at.svg", "thoughts-steps.svg"}
    assert {path.name for path in tmp_path.glob("*.svg")} == names
    assert all(f"wrote {tmp_path / name}" in printed for name in names)
    picture = ElementTree.parse(tmp_path / "thoughts-2-best.svg").getroot()
    assert len([e for e in picture.iter() if e.tag.endswith("polyline")]) == 3


# ---------------------------------------------------------------- what is read in place of thoughts

QUESTIONS = [[1, 2, 3, 4], [9, 8]]
WRITTEN = [[20, 21, 22, 23], [30, 31]]


def read_by_hand(model, ids, places):
    """The states at some positions of one sequence, read alone."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, places]


@pytest.mark.parametrize("method, ids, places", [
    ("pause", [[1, 2, 3, 4, 64, 66, 66], [9, 8, 64, 66, 66]], [[4, 5, 6], [2, 3, 4]]),
    ("pause-as-thought", [[1, 2, 3, 4, 64, 66, 66], [9, 8, 64, 66, 66]], [[4, 5, 6], [2, 3, 4]]),
    ("cot", [[1, 2, 3, 4, 20, 21, 22], [9, 8, 30, 31]], [[4, 5, 6], [2, 3]]),
    ("no-cot", QUESTIONS, [[1, 2, 3], [0, 1]]),
    ("no-thought", QUESTIONS, [[1, 2, 3], [0, 1]])])
def test_states_in_place_of_three_thoughts(model, tok, machine, method, ids, places):
    """<bot> and two of the three <pause> tokens; the first three tokens written, at the positions
    that these have (a short text has fewer); the end of the question. Whatever the batch."""
    s = setup_of(model, tok, machine, decoding(method=method))
    examples = [Example(question, [], []) for question in QUESTIONS]
    with torch.no_grad():
        got = probe.states_for(s, examples, 3, WRITTEN)
        for states, own, at in zip(got, ids, places):
            assert torch.allclose(states, read_by_hand(model, own, at), atol=1e-5)
        for example, text, own, at in zip(examples, WRITTEN, ids, places):
            looks = probe.looked_at(s, example, 3, text)
            whole = probe.attention(model, model.wte(torch.tensor([own])))
            assert torch.allclose(looks, whole[at, :len(example.question)], atol=1e-6)


def test_thoughts_are_the_states_before_them(model, tok, machine):
    """The first thought is the state at <bot>, the second that at the first thought; pauses are
    read at the same positions."""
    s = setup_of(model, tok, machine, decoding())
    with torch.no_grad():
        _, _, thoughts = probe.with_thoughts(s, [Example([1, 2, 3], [], [])], 2, [], 0)
        x = model.wte(torch.tensor([[1, 2, 3, tok.bot]]))
        first = model(embeds=x)[:, -1:]
        second = model(embeds=torch.cat([x, first], 1))[:, -1:]
        looks = probe.looked_at(s, Example([1, 2, 3], [], []), 2)
        whole = probe.attention(model, torch.cat([x, first], 1))
    assert torch.allclose(thoughts, torch.cat([first, second], 1), atol=1e-5)
    assert torch.allclose(looks, whole[3:, :3], atol=1e-6)


@pytest.mark.parametrize("method, sequence", [
    ("coconut", ([1, 2, 64], 2, [65, 5])), ("no-curriculum", ([1, 2, 64], 2, [65, 5])),
    ("pause", ([1, 2, 64, 66, 66], 0, [65, 5])), ("cot", ([1], 0, [2, 5])),
    ("pause-as-thought", ([1, 2, 64, 66, 66], 0, [65, 5])), ("no-thought", ([1], 0, [2, 5]))])
def test_what_is_asked_after_two_thoughts(model, tok, machine, method, sequence):
    s = setup_of(model, tok, machine, decoding(method=method))
    assert probe.after(s, Example([1, 2], [[3], [4]], [7]), 2, [5]) == sequence


def test_results_of_a_step_in_a_graph():
    """The name that a step reaches, also with " is a" joined to it, or its first token."""
    texts = ["Every cat is a dog. Every dog is a elk. Ann is a cat.", *ITEM["steps"]]
    for pattern in ("numbers-apart", "is-a"):
        tok = Tokenizer.compact(texts, pattern)
        assert comparison.results_of(ITEM, tok) == ["cat", "dog", "elk"]
    pieces = SimpleNamespace(encode=list, decode="".join)
    assert comparison.results_of(ITEM, pieces) == ["c", "d", "e"]
    assert comparison.bare(" dog is a") == comparison.bare("dog ") == "dog"
    assert comparison.results_of(dict(steps=["<<1+1=2>>", "Ann is a cat."]), tok) == ["2", None]


# ---------------------------------------------------------------- side by side

def test_pooled_by_hand():
    """Three items with results, one of them wrong, and one without any."""
    results = [["2", "5"], ["8"], [None], ["7", "1"]]
    decoded = [[{"2", "x"}, {"9"}], [{"8"}], [{"0"}], [{"3"}]]
    got = comparison.pooled(results, [True, True, True, False], decoded)
    means = {name: (own["mean"], own["n"]) for name, own in got.items()}
    assert means == {"results of steps in the top 5": (pytest.approx(2 / 5), 3),
                     "results of steps in the top 5, without the last": (pytest.approx(1 / 2), 3),
                     "results of steps in the top 5, other item's states": (0, 3),
                     "results of steps in the top 5, items answered right":
                     (pytest.approx(2 / 3), 2)}
    assert comparison.pooled([[None], []], [True, True], [[], []]) == {}


def test_a_control_reaches_a_model_or_does_not():
    """70 of 100: the interval of 62 of 100 ends at 0.709, that of 60 at 0.691."""
    def measures(part):
        return {"hits": comparison.share(part, 100, True), "chance": comparison.share(part, 100)}
    model, near, far = (("model", True, measures(0.70)), ("near", False, measures(0.62)),
                        ("far", False, measures(0.60)))
    found = comparison.verdicts([model, near, far], ["hits", "chance"])
    assert found == ["hits: model has 70.0 %, near up to 70.9 %: the control shows it too."]
    assert comparison.verdicts([far, model], ["hits"]) == ["No control reaches what a model has."]
    assert "no verdict" in comparison.verdicts([near, far], ["hits"])[0]


def columns(text):
    """{measure: its cells} of the table side by side, which ends what is printed."""
    lines = text.split("side by side")[1].splitlines()[2:]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[:lines.index("")]]
    return {first: cells for first, *cells in rows}


def test_side_by_side(trained, tmp_path, capsys):
    """Every kind of model has all tables, and results of its own in its own folder."""
    methods = ("coconut", "pause-as-thought", "cot", "no-thought")
    paths = [trained / method / "best.pt" for method in methods]
    assert run_probe([*paths, "--out", tmp_path, "--plot"]) == 0
    text = capsys.readouterr().out
    assert text.count("looks at  ") == 8 and text.count("in words after k thoughts") == 4
    assert "has no thoughts; in their place 2 states are read, at: <bot>, pauses" in text
    assert "state 1  at '<bot>'" in text and "state 2  at '<pause>'" in text
    assert text.count("asked right after the question") == 2       # cot, no-thought
    table = columns(text)
    assert table["2 states, at"] == ["<bot>, thoughts", "<bot>, pauses", "first tokens written",
                                     "last tokens of question"]
    for name in ("results of steps in the top 5", "k = 1, frontier: to the target",
                 "2 states, at", "item 1, state 2: likeliest token"):
        assert len(table[name]) == 4
    for method in methods:
        results = json.loads((tmp_path / method / "probe.json").read_text())
        assert results["checkpoint"].endswith(f"{method}/best.pt") and len(results["k"]) == 3
        assert (tmp_path / method / "thoughts-2-best.svg").exists()
        same = results["k"][1]["values"] == results["k"][2]["values"]
        assert same == (method in ("cot", "no-thought"))           # no k to depend on


def test_the_same_checkpoint_twice(trained, tmp_path, capsys):
    best = trained / "cot" / "best.pt"
    assert run_probe([trained / "coconut" / "best.pt", best, best, "--out", tmp_path]) == 0
    table = columns(capsys.readouterr().out)
    assert all(first == second for _, first, second in table.values())
    assert (tmp_path / "cot" / "probe.json").exists() and (tmp_path / "cot (3)").exists()


def test_probe_refuses_what_cannot_be_compared(trained, data, tmp_path, capsys):
    """Other data, other tokens, other numbers of thoughts, one file for two results."""
    mini, coconut = trained / "mini", trained / "coconut" / "best.pt"
    more = [*SMALL.split(), "--block-size", "256"]
    for name, flags in (("tokens", ["--data", mini, "--tokenizer", "compact-is-a"]),
                        ("more", ["--data", mini, "--c", "2"]), ("data", ["--data", data])):
        assert run([*flags, "--out", tmp_path / name, *more]) == 0
    for name, words in (("tokens", "another tokenizer"), ("data", "was trained on"),
                        ("more", "--stage-max 2 --c 2")):
        assert run_probe([coconut, tmp_path / name / "best.pt"]) == 2
        assert words in capsys.readouterr().err
    assert run_probe([coconut, coconut.parent / "last.pt"]) == 2
    assert "both would write probe.json" in capsys.readouterr().err


# ---------------------------------------------------------------- CODI models

@pytest.mark.parametrize("step, result", [
    ("<<2*8-9=7>>", "7"), ("<<600*30/100=180>>", "180"), ("30 - 2 * 7 = 16", "16"),
    ("<<1+1=>>", None), ("Bob is a cat.", None), ("<<3=1+2=3.5>>", "3.5")])
def test_result_of_a_step(step, result):
    assert comparison.result_of(step) == result


def test_agreement_by_hand():
    """Two correct items of two steps, one wrong one that must not count, one of a single step."""
    items = [dict(steps=["<<1+1=2>>", "<<2+3=5>>"]), dict(steps=["<<4+4=8>>", "<<8+1=9>>"]),
             dict(steps=["<<1+6=7>>", "<<1=1>>"]), dict(steps=["<<2+4=6>>"])]
    decoded = [[{"2", "x"}, {"5"}], [{"9"}, {"5"}], [{"7"}, {"1"}], [{"0"}]]
    results = [list(map(comparison.result_of, item["steps"])) for item in items]
    rows = comparison.agreement(results, [True, True, False, True], decoded)
    assert rows[2] == dict(n=2, all_steps=0.75, intermediate=0.5, swapped=0.25)
    assert rows[1] == dict(n=1, all_steps=0.0, intermediate=None, swapped=0.0)


def test_attention_is_that_of_the_model(model):
    """Rows sum to 1, nobody looks ahead, and the weights times the values give what the first
    block's attention gave."""
    one = tiny_model(n_layer=1)
    embeds = one.wte(torch.tensor([[3, 1, 4, 1, 5]]))
    weights = probe.attention(one, embeds)
    assert torch.allclose(weights.sum(1), torch.ones(5)) and weights.triu(1).abs().max() == 0
    x = one(embeds=embeds, all_states=True)[0]
    attn, x = one.h[0].attn, one.h[0].ln_1(x)
    q, k, v = (t.view(1, 5, 4, 8).transpose(1, 2) for t in attn.c_attn(x).split(32, 2))
    looks, seen = torch.zeros(4, 5, 5), torch.zeros(4, 5, 8)
    for h in range(4):
        for i in range(5):
            looks[h, i, :i + 1] = F.softmax((q[0, h, i] @ k[0, h, :i + 1].T) / 8 ** 0.5, -1)
            seen[h, i] = looks[h, i] @ v[0, h]
    ours = attn.c_proj(seen.transpose(0, 1).reshape(5, 32))
    assert torch.allclose(ours, attn(x, GrowingCache(), None)[0], atol=1e-5)
    assert torch.allclose(weights, looks.mean(0), atol=1e-5)


def test_looked_at_is_at_the_position_that_makes_the_thought(model, machine):
    """The first thought's row is that of <bot>, over the question only."""
    tok, projection = SimpleNamespace(bot=64), codi.make_projection(codi_flags(), 32).eval()
    s = setup_of(model, tok, machine, codi_flags(), projection)
    rows = probe.looked_at(s, Example([1, 2, 3], [], []), 2)
    assert rows.shape == (2, 3)
    whole = probe.attention(model, model.wte(torch.tensor([[1, 2, 3, 64]])))
    assert torch.allclose(rows[0], whole[3, :3], atol=1e-6)
    assert (rows.sum(1) < 1).all()


def test_probe_of_a_codi_run(data, tmp_path, capsys):
    from test_codi import run as run_codi, start
    assert run_codi(start(data, tmp_path / "run")) == 0
    capsys.readouterr()
    best = tmp_path / "run" / "best.pt"
    probe.main([str(best), "--n", "8", "--item", "3", "--plot"])
    assert {path.name for path in best.parent.glob("*.svg")} == {
        "thoughts-looks-at.svg", "thoughts-steps.svg"}
    out = capsys.readouterr().out
    assert out.count("looks at") == 2 and "8 test items" in out
    assert json.loads((tmp_path / "run" / "probe.json").read_text())["n"] == 8
    assert run_codi(start(data, tmp_path / "words", "--method cot --n-latent 5")) == 0
    assert run(["--data", data, "--out", tmp_path / "coconut", *SMALL.split()]) == 0
    capsys.readouterr()
    probe.main([str(tmp_path / name / "best.pt") for name in ("run", "words", "coconut")])
    table = columns(capsys.readouterr().out)           # CoT has no places, so it is given two
    assert table["2 states, at"] == ["<bot>, thoughts", "first tokens written", "<bot>, thoughts"]
    assert run_codi(start(data, tmp_path / "none", "--n-latent 0")) == 0
    with pytest.raises(runtime.UserError, match="no continuous thoughts"):
        probe.main([str(tmp_path / "none" / "best.pt")])
