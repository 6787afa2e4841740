"""docs/index.html, the page that thinks: its numbers under Node, its scenes in Chromium.

The page's data file has all that is needed: the models in it are opened in PyTorch, too.
"""

import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))

import browser
import coconut
import export
import probe
import soft_thinking
from common import evaluation
from common.lab import Lab
from common.runtime import UserError
from tiny import tiny_model

DOCS = ROOT / "docs"
NODE = shutil.which("node")
N = {"chains-coconut": 100, "prosqa-coconut": 100, "chains-cot": 10, "prosqa-cot": 10}
ERROR = 1e-4             # of logits, of which the largest are near 20

in_node = pytest.mark.skipif(not NODE, reason="Node is not installed: docs/model.js is not run")
in_chromium = pytest.mark.skipif(not browser.CHROMIUM, reason="Chromium is not installed: "
                                 "docs/index.html is not opened")


@pytest.fixture(scope="module")
def data():
    """What docs/data.js gives to the page."""
    lines = (DOCS / "data.js").read_text().splitlines()[2:-1]
    return json.loads("{" + "".join(lines) + "}")


@pytest.fixture(scope="module")
def computed():
    """{model: what page_numbers.js prints}; the processes run while PyTorch computes the same."""
    running = {}
    for name, n in N.items():
        command = [NODE, str(ROOT / "tests/page_numbers.js"), str(DOCS), name, str(n)]
        running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                         text=True)
    found = {}

    def result(name):
        if name not in found:
            out, error = running[name].communicate()
            assert running[name].returncode == 0, error
            found[name] = json.loads(out)
        return found[name]
    yield result
    for process in running.values():
        process.kill()
        process.communicate()


def asked(data, name, n=None):
    """A model of the page in PyTorch: Setup, stage, items, Examples."""
    s = export.setup_of(data["models"][name])
    items = data[name.split("-")[0]][:n or N[name]]
    examples = coconut.examples_of(s, "test", items)
    return evaluation.with_limit(s, examples), s.flags.stage_max, items, examples


def texts_with(s, items, sequences, thoughts=None):
    found = evaluation.answer_all(s, items, sequences, coconut.think_and_answer, thoughts=thoughts)
    return [found.texts[i] for i in range(len(items))]


def same(found, wanted, error=ERROR):
    torch.testing.assert_close(torch.tensor(found), torch.as_tensor(wanted), atol=error, rtol=0)


# ---------------------------------------------------------------- numbers

@in_node
@pytest.mark.parametrize("name", N)
def test_tokens_logits_and_answers(data, computed, name):
    s, stage, items, examples = asked(data, name)
    texts, thoughts, logits = export.answers(s, stage, items, examples)
    rows = computed(name)
    assert [row["ids"] for row in rows] == [example.question for example in examples]
    same([row["logits"] for row in rows], logits)
    assert [row["keep"] for row in rows] == texts
    if s.flags.method == "coconut":
        same([row["thoughts"] for row in rows], thoughts)


@in_node
@pytest.mark.parametrize("name", ["chains-coconut", "prosqa-coconut"])
def test_other_thoughts(data, computed, name):
    """Without thoughts the model goes back to words; with those of the question before it guesses:
    as PyTorch says, and as RESULTS.md says."""
    s, stage, items, examples = asked(data, name)
    rows, sequences = computed(name), coconut.sequences_of(examples, stage, s)
    none = [q._replace(n_latent=0) for q in sequences]
    assert [row["remove"] for row in rows] == texts_with(s, items, none)
    thoughts = torch.tensor([row["thoughts"] for row in rows]).roll(1, 0)
    swapped = texts_with(s, items[:40], sequences[:40], thoughts[:40])
    assert [row["swap"] for row in rows[:40]] == swapped

    def right(kind):
        found = [row[kind].endswith(f"### {item['answer']}") for row, item in zip(rows, items)
                 if kind in row]
        return sum(found) / len(found)
    assert right("keep") >= 0.9
    least, most = (0.85, 0.3) if name == "chains-coconut" else (0.5, 0.7)
    assert right("remove") >= least and right("swap") <= most


@in_node
def test_node_values_are_those_of_probe(data, computed):
    s, _, items, examples = asked(data, "prosqa-coconut")
    rows = computed("prosqa-coconut")
    for k, shipped in data["probe"].items():
        found = sum((row["values"][k] for row in rows), [])
        same(found, sum(probe.node_values(s, items, examples, int(k)), []), 1e-5)
        # what is shipped is of the checkpoint, before its weights became float16
        same(found, sum(shipped[:len(items)], []), 0.02)


@in_node
@pytest.mark.parametrize("name", ["chains-coconut", "prosqa-coconut"])
def test_where_the_last_thought_looked(data, computed, name):
    s, _, items, examples = asked(data, name, 5)
    for row, example in zip(computed(name), examples):
        k = s.flags.c * s.flags.stage_max
        wanted = probe.looked_at(s, example, k)[-1]
        same(row["looks"][:len(example.question)], wanted, 1e-5)
        assert math.isclose(sum(row["looks"]), 1, abs_tol=1e-5)


@in_node
def test_soft_thinking(data, computed):
    """Greedy, the mixture, and Gumbel noise (the same numbers in both) lead to the same texts."""
    s, _, items, examples = asked(data, "prosqa-cot", 10)
    spec = data["models"]["prosqa-cot"]
    flags = SimpleNamespace(**soft_thinking.DEFAULTS | dict(max_think=40, max_new=24))
    questions = [example.question for example in examples]
    lab = Lab(flags, s.machine, s.model, s.tok, items, questions, "### ",
              spec["mark"], max(map(len, questions)) + 64)
    step, rank = torch.arange(40.0)[:, None], torch.arange(30.0)
    noise = (2 * torch.sin(1 + 7 * step + 3 * rank))[:, None].expand(-1, len(items), -1)
    for i, mode in enumerate(("greedy", "vanilla", "gumbel")):
        with torch.no_grad():
            cache, h = soft_thinking.prefill(lab, questions)
            found = soft_thinking.think_and_answer(lab, cache, h, mode, noise)
        wanted = [s.tok.decode(rollout.trace + rollout.answer) for rollout in found]
        assert [row["soft"][i] for row in computed("prosqa-cot")[:10]] == wanted


# ---------------------------------------------------------------- what is exported

def test_weights_travel_as_float16(text_tok):
    model = tiny_model(vocab_size=text_tok.n_vocab)
    tensors, content = export.packed(model)
    config = {k: v for k, v in vars(model.config).items() if isinstance(v, int)}
    spec = dict(config=config, tensors=tensors, weights=content, **text_tok.state())
    again, tok = export.unpacked(spec)
    assert tok.state() == text_tok.state()
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters()):
        assert torch.equal(ours, theirs.half().float()), name


def test_what_the_page_ships(data):
    assert list(data["models"]) == list(export.RUNS)
    assert (DOCS / "data.js").stat().st_size < 5.9e6
    for spec in data["models"].values():
        assert spec["rounding"]["logits"] < 0.1
        assert spec["rounding"]["answers"] <= 0.02 * spec["rounding"]["n"]


@pytest.mark.parametrize("methods, sentence", [
    ([], "no checkpoint of chains-coconut; train one (python coconut.py)"),
    (["cot", "cot"], "0.pt and 1.pt are both chains-cot"),
    (["icot"], "0.pt is of --method icot on chains-mixed, which the page does not show"),
])
def test_which_checkpoints_are_needed(monkeypatch, methods, sentence):
    def trained_model(path, _):
        method = methods[int(path[0])]
        return SimpleNamespace(flags=SimpleNamespace(data="chains-mixed", method=method)), 3
    monkeypatch.setattr(coconut, "trained_model", trained_model)
    monkeypatch.setattr(export.data_prep, "load", lambda *_, **__: dict(test=[]))
    with pytest.raises(UserError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        export.opened([f"{i}.pt" for i in range(len(methods))], 1)


# ---------------------------------------------------------------- in a browser

KINDS = ("keep", "remove", "zero", "noise", "swap", "mean")
USED = 8                 # questions that are left, so that "run all" does not take long


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page, opened from disk, without motion."""
    with browser.Page(tmp_path_factory.mktemp("profile")) as page:
        page.open((DOCS / "index.html").as_uri())
        page.run(f"DATA.chains.length = DATA.prosqa.length = {USED}")
        yield page
        assert page.errors == []


def part(scene, selector):
    """A JavaScript expression for an element of a scene."""
    return f"document.querySelector({json.dumps(f'#scene-{scene} {selector}')})"


def text(page, scene, selector):
    return page.run(part(scene, selector) + ".innerText")


def click(page, scene, selector):
    page.run(part(scene, selector) + ".click()")


def put(page, scene, selector, value):
    """What a visitor does to a slider, a number or a list."""
    element = part(scene, selector)
    page.run(f"{element}.value = {json.dumps(value)}")
    for event in ("input", "change"):
        page.run(f"{element}.dispatchEvent(new Event('{event}', {{bubbles: true}}))")


def go_to(page, scene):
    page.run(f"document.getElementById('tab-{scene}').click()")
    wait(page, f"!document.getElementById('scene-{scene}').hidden && scene === {scene}")


def wait(page, condition):
    page.run(f"""new Promise((done, fail) => {{
        const look = n => ({condition}) ? done() : n ? setTimeout(look, 20, n - 1) : fail(
            new Error({json.dumps(condition)}));
        look(1500);
    }})""")


def table(page, scene):
    """The rows of a scene's table of runs, once the last one is done."""
    wait(page, part(scene, "[data-runs] .note") + ".textContent === 'done'")
    return page.run(f"[...document.querySelectorAll('#scene-{scene} tbody tr')]"
                    ".map(row => [...row.cells].map(cell => cell.innerText.trim()))")


def counted(rows, items):
    return f"{sum(text.endswith('### ' + x['answer']) for text, x in zip(rows, items))} of {USED}"


@in_chromium
def test_words_or_thoughts(page, data):
    """Every control of scene 1 does what it says, and answers are PyTorch's."""
    s, stage, items, examples = asked(data, "chains-coconut", USED)
    sequences = coconut.sequences_of(examples, stage, s)
    own = evaluation.answer_all(s, items, sequences, coconut.think_and_answer)
    wanted = {"keep": [own.texts[i] for i in range(USED)]}
    for kind, thoughts in dict(zero=torch.zeros_like(own.thoughts), swap=own.thoughts.roll(1, 0),
                               mean=torch.tensor(data["models"]["chains-coconut"]["mean"])
                               .expand_as(own.thoughts)).items():
        wanted[kind] = texts_with(s, items, sequences, thoughts)
    go_to(page, "words")
    assert page.run("document.documentElement.dataset.firstThought") is not None
    for on in ("true", "false"):             # while the other scenes have not been started
        page.run("document.getElementById('large').click()")
        assert page.run("document.getElementById('large').ariaPressed") == on
    answer = "[data-coconut-answer] strong"
    for kind in KINDS:
        click(page, "words", f"[data-kind={kind}]")
        if kind in wanted:
            assert text(page, "words", answer) == wanted[kind][0].split("### ")[1], kind
        assert text(page, "words", ".thought select") == kind or page.run(
            part("words", ".thought select") + ".value") == kind
    click(page, "words", "[data-kind=remove]")
    assert "it went back to words" in text(page, "words", "[data-coconut-answer]")
    assert text(page, "words", "[data-coconut-counts] b") == "32"
    click(page, "words", "[data-kind=keep]")
    assert text(page, "words", "[data-coconut-counts] b") == "5"
    assert text(page, "words", "[data-cot-counts] b") == "32"
    put(page, "words", "[data-thought='2'] select", "swap")
    assert "the thought of the question before" in text(page, "words", "[data-detail] h3")
    click(page, "words", "[data-thought='3'] .face")
    detail = text(page, "words", "[data-detail]")
    assert "Thought 3" in detail and "norm " in detail and "most at" in detail
    assert page.run("document.querySelectorAll('#scene-words [data-detail] .bar').length") == 5

    for stage in (0, 1, 2, 3):
        put(page, "words", "[data-stage]", str(stage))
        shown = page.run("document.querySelectorAll('#scene-words .thought').length")
        pressed = page.run("[...document.querySelectorAll('#scene-words .row')]"
                           ".map(row => row.ariaPressed === 'true').indexOf(true)")
        assert shown == stage == pressed
    click(page, "words", "[data-kind=keep]")
    page.run("words.reveal(Infinity)")
    click(page, "words", "[data-step]")
    assert text(page, "words", "[data-cot-counts] b") == "1"
    click(page, "words", "[data-play]")
    assert text(page, "words", "[data-cot-counts] b") == "32"

    # "Ian has 18 eggs. Fay has what separates twice Ian from 19. .." -> 17, 4, 18
    put(page, "words", "[aria-label='number 4']", "20")
    assert text(page, "words", "[data-coconut-answer]").split()[1:] == ["12", "✓", "right"]
    put(page, "words", "[aria-label='person 1']", "Zoe")
    assert "twice Zoe" in text(page, "words", "[data-question]").replace("\n", " ")
    put(page, "words", "[aria-label='number 4']", "38")
    assert "training all were below 20" in text(page, "words", "[data-hint]")
    put(page, "words", "[aria-label='number 4']", "99")
    assert "from 0 to 39" in text(page, "words", "[data-hint]")
    click(page, "words", "[aria-label='next question']")
    click(page, "words", "[aria-label='question before']")
    assert text(page, "words", "[data-coconut-answer] strong") == items[0]["answer"]
    for typed, index in ("-393", -394 % 200), ("", 0):
        put(page, "words", "[aria-label='number of the test question']", typed)
        assert page.run("words.index") == index

    # what a run asks is settled when it begins
    made_at_1 = "words.change({ stage: 1 }); const job = words.job(['swap', 'swap', 'swap']);"
    asked_at_3 = "words.change({ stage: 3 }); return job.ask(0).tokens;"
    assert page.run(f"(() => {{ {made_at_1} {asked_at_3} }})()") > 15
    click(page, "words", "[data-kind=keep]")
    click(page, "words", "[data-run^='Run all']")
    rows = table(page, "words")
    assert rows[1][1] == counted(wanted["keep"], items) and rows[1][4] == "5.0"
    click(page, "words", "[data-run='Run every control']")
    for row in table(page, "words")[2:]:
        kind = row[0].split(": ")[1]
        if kind in wanted:
            assert row[1] == counted(wanted[kind], items), kind
    assert page.errors == []


@in_chromium
def test_a_frontier_that_moves(page, data):
    go_to(page, "search")
    item = data["prosqa"][0]
    for k in range(7):
        put(page, "search", "[data-k]", str(k))
        values = page.run("[...document.querySelectorAll('#scene-search .node')]"
                          ".map(node => Number(node.dataset.value))")
        assert len(values) == len(item["idx_to_symbol"])
        if str(k) in data["probe"]:
            same(values, data["probe"][str(k)][0], 0.02)
            assert "probe.py gives the same" in text(page, "search", "[data-frontier]")
    assert item["answer"] in text(page, "search", "[data-said]")
    before = text(page, "search", "[data-said]")
    for kind in KINDS[1:]:
        click(page, "search", f"[data-kind={kind}]")
        assert page.run(part("search", ".thought select") + ".value") == kind
    click(page, "search", "[data-kind=remove]")
    assert "Every" in text(page, "search", "[data-said]")
    click(page, "search", "[data-kind=keep]")
    assert text(page, "search", "[data-said]") == before
    put(page, "search", "[data-k]", "2")
    put(page, "search", "[data-thought='2'] select", "zero")
    assert "Thought 2" in text(page, "search", "[data-detail]")
    click(page, "search", "[data-play]")
    assert text(page, "search", "[data-k-out]").startswith("6 of 6")
    click(page, "search", "[data-kind=keep]")
    click(page, "search", "[data-run^='Run all']")
    s, stage, items, examples = asked(data, "prosqa-coconut", USED)
    texts = texts_with(s, items, coconut.sequences_of(examples, stage, s))
    assert table(page, "search")[1][1] == counted(texts, items)
    assert page.errors == []


@in_chromium
def test_a_soft_token(page):
    go_to(page, "soft")
    modes = page.run("[...document.querySelectorAll('#scene-soft [data-mode]')]"
                     ".map(lane => lane.dataset.mode)")
    assert modes == ["greedy", "soft", "gumbel"]
    before = text(page, "soft", "[data-fed=gumbel]")       # at an uncertain step
    click(page, "soft", "[data-noise]")
    assert text(page, "soft", "[data-fed=gumbel]") != before
    put(page, "soft", "[data-t]", "3")
    assert text(page, "soft", "[data-fed=greedy] h4").startswith("step 3")
    put(page, "soft", "[data-tau]", "-3")
    assert text(page, "soft", "[data-tau-out]") == "0.13"
    click(page, "soft", "[data-draws]")
    assert "of 32 right" in text(page, "soft", "[data-tally]")
    click(page, "soft", "[data-run^='Run all']")
    greedy, mixture, gumbel = table(page, "soft")
    assert greedy[1].endswith(f"of {USED}") and "τ = 0.13" in gumbel[0]
    assert page.errors == []


@in_chromium
def test_keys(page):
    for key, scene in ("2", "search"), ("3", "soft"), ("1", "words"):
        page.key(key)
        wait(page, f"!document.getElementById('scene-{scene}').hidden && scene === {scene}")
    page.run("document.activeElement.blur()")
    page.key("ArrowRight")
    assert page.run("words.index") == 1
    page.key("ArrowLeft")
    assert page.run("words.index") == 0
    page.key("d")
    assert page.run("document.documentElement.dataset.theme") == "dark"
    page.key("d")
    page.key("l")
    assert page.run("document.documentElement.classList.contains('large')")
    page.key("l")
    assert page.errors == []


TOO_WIDE = """[...document.querySelectorAll('main *')]
    .filter(one => one.getBoundingClientRect().right > innerWidth && !one.closest('.scroll'))
    .map(one => one.outerHTML.slice(0, 80))"""


@in_chromium
@pytest.mark.parametrize("width", [360, 1440])
def test_nothing_is_wider_than_the_window(page, width):
    page.size(width, 800)
    for scene in ("words", "search", "soft"):
        go_to(page, scene)
        for large in ("false", "true"):
            page.run(f"setLarge({large})")
            wide = page.run("document.documentElement.scrollWidth")
            assert wide <= width, (scene, large, page.run(TOO_WIDE))
    page.run("setLarge(false)")
    page.size(1440, 900)
    assert page.errors == []
