"""common/text.py and chain problems: tokenizers, examples, batches; the learning rate."""

import functools
import random
import re

import numpy as np
import pytest
import tiktoken
import torch

from common.optim import trapezoid
from common.puzzles import chain_item, chains, has_detour, prosqa_item
from common.readers import check_item
from common.runtime import UserError, generator
from common.text import PATTERNS, SPECIAL, Tokenizer, batches, collate, tokenize

BITS = (" 7", "7", "  ", "\n", "\r\n", "<<7+4=11>>", "it's", "_", "## ", "\x1c", "é", "e\u0301",
        "٣", "½")


def random_texts(n, seed=0):
    """Strings nobody would type: decoded random bytes, any code points, bits of real problems."""
    rng = random.Random(seed)

    def code_point():
        return chr(rng.choice((rng.randrange(0x80), rng.randrange(0x3000),
                               rng.randrange(0xE000, 0x110000))))

    bits = (lambda: rng.randbytes(rng.randrange(12)).decode("utf-8", "replace"),
            lambda: rng.randbytes(rng.randrange(12)).decode("latin-1"),
            lambda: "".join(code_point() for _ in range(rng.randrange(12))),
            lambda: rng.choice(BITS),
            lambda: rng.choice(SPECIAL))
    return ["".join(rng.choice(bits)() for _ in range(rng.randrange(8))) for _ in range(n)]


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("pattern", PATTERNS)
def test_round_trip(pattern):
    """Any text comes back as it was, seen in training or not, and uses no special token, even
    where it spells one."""
    texts = random_texts(3000)
    for known in ([], texts[:1500], ["How many pens does Ann have? <<7+4=11>>"]):
        tok = Tokenizer.compact(known, pattern)
        for text in texts:
            ids = tok.encode(text)
            assert tok.decode(ids) == text and max(ids, default=0) < tok.eos


def test_special_tokens():
    """The four special ids are the last ones, differ, and decode to their names."""
    tok = Tokenizer.compact(["a b"])
    assert [tok.eos, tok.bot, tok.eot, tok.pause] == list(range(tok.n_vocab - 4, tok.n_vocab))
    assert tok.decode([tok.eos, tok.bot, tok.eot, tok.pause]) == "<|endoftext|><bot><eot><pause>"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_text_is_whole_pieces(pattern):
    """Python's split, which chooses the pieces, is tiktoken's: what was seen is a token a piece."""
    texts = []
    for item in chains((300, 1, 1), shuffled=True)["train"]:
        texts += [item["question"] + "\n", *item["steps"], "### " + item["answer"]]
    texts += ["It's 3.5 km, isn't it? (about 1,200 words)", "x_1 = -2;  y\n\n", "déjà vu, naïve"]
    tok = Tokenizer.compact(texts, pattern)
    for text in texts:
        pieces = re.findall(PATTERNS[pattern], text)
        assert [tok.decode([i]) for i in tok.encode(text)] == pieces and "".join(pieces) == text


def test_numbers_are_single_tokens(text_tok):
    """A number below the limit is one token, the same in a question, a step and an answer."""
    for n in range(20):
        number, = text_tok.encode(str(n))
        for text in (f"Ann has {n} pens.", f"<<{n}+4=", f"<<4+{n}=", f"={n}>>", f"### {n}",
                     f"\n{n}\n", f"{n} more", f"({n})"):
            assert text_tok.encode(text).count(number) == 1 + (n == 4 and text.startswith("<<"))


def test_compact_keeps_the_most_frequent():
    """`most` bounds the vocabulary; what is left out falls back to bytes and stays lossless."""
    tok = Tokenizer.compact(["pens pens pens books"], most=1)
    assert tok.n_vocab == 256 + 1 + 4 and len(tok.encode("pens")) == 4
    assert len(tok.encode(" pens")) == 1 and tok.decode(tok.encode(" books pens")) == " books pens"


def test_state_brings_the_same_tokenizer_back(text_tok):
    """A tokenizer that went through a checkpoint gives the same ids, special ones included."""
    twin = Tokenizer.from_state(text_tok.state())
    assert all(twin.encode(t) == text_tok.encode(t) for t in random_texts(300, 1))
    for name in ("n_vocab", "eos", "bot", "eot", "pause"):
        assert getattr(twin, name) == getattr(text_tok, name)


def test_gpt2_tokenizer(monkeypatch):
    """gpt2 is tiktoken's encoding with our special tokens after its ranks (here 257 of them)."""
    ranks = {bytes([b]): b for b in range(256)} | {b"<<": 256}
    own = tiktoken.Encoding("gpt2", pat_str=r"\w+|\W+", mergeable_ranks=ranks,
                            special_tokens={"<|endoftext|>": 257})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": own}[name])
    tok = Tokenizer.gpt2()
    assert (tok.eos, tok.n_vocab) == (257, 261) and tok.encode("<<7") == [256, 55]


def test_gpt2_tokenizer_without_network(monkeypatch):
    """A failed download is one sentence that says what to do."""
    def fail(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError, match="cannot download the gpt2 tokenizer.*TIKTOKEN_CACHE_DIR"):
        Tokenizer.gpt2()


# ---------------------------------------------------------------- examples and batches

def test_tokenize(text_tok):
    """The authors' format: question and steps end in newlines, the answer follows ###, then eos."""
    item = dict(question="How many?", steps=["<<1+1=2>>", "<<2+2=4>>"], answer="4")
    (question, steps, answer), = tokenize([item], text_tok, 99, 5, "here")
    assert text_tok.decode(question) == "How many?\n"
    assert [text_tok.decode(s) for s in steps] == ["<<1+1=2>>\n", "<<2+2=4>>\n"]
    assert text_tok.decode(answer[:-1]) == "### 4" and answer[-1] == text_tok.eos


def test_too_long_item_is_named(text_tok):
    """An item needs room for all its tokens and n_extra more; the first without it is named."""
    items = [dict(question="a", steps=[], answer="b"),
             dict(question="pens " * 20, steps=["x"], answer="b")]
    question, (step,), answer = tokenize(items, text_tok, 999, 0, "")[1]
    n = len(question) + len(step) + len(answer) + 6
    assert len(tokenize(items, text_tok, n, 6, "f")) == 2
    words = rf"f/test.json, item 2, .*{n} positions.* block_size {n - 1}"
    with pytest.raises(UserError, match=words):
        tokenize(items, text_tok, n - 1, 6, "f/test.json")


@functools.cache
def chains_lengths():
    items = chains((3000, 1, 1), n_steps=3, shuffled=True, distractors=1)["train"]
    return [(len(d["question"].split()) + 2, 5 * len(d["steps"]) + 4) for d in items]


@functools.cache
def prosqa_lengths():
    """As (words, words) of generated puzzles: 100 to 300 in the question, 15 to 45 in language."""
    rng = random.Random(0)
    items = [prosqa_item(rng) for _ in range(2000)]
    return [(len(d["question"].split()), len(" ".join(d["steps"]).split()) + 6) for d in items]


def gsm8k_lengths():
    """Lengths as in GSM8k-Aug's test split: questions of 57 tokens on average, language of 31."""
    rng = np.random.default_rng(0)
    prompt = rng.normal(57, 22, 20000).clip(15, 190)
    language = (8 + 0.4 * prompt + rng.normal(0, 10, 20000)).clip(6)
    return np.stack([prompt, language], 1).astype(int).tolist()


@pytest.mark.parametrize("lengths", [chains_lengths, prosqa_lengths, gsm8k_lengths])
@pytest.mark.parametrize("batch_size", [32, 128])
def test_batches_pad_little(lengths, batch_size):
    """Over an epoch, under 10 % of the columns of questions and language are padding."""
    lengths = np.array(lengths())
    groups = batches(lengths, batch_size, generator(0))
    columns = sum(len(g) * lengths[g].max(0).sum() for g in groups)
    assert 1 - lengths.sum() / columns < 0.10


@pytest.mark.parametrize("n, batch_size", [(1, 4), (10, 4), (1000, 7), (64, 64)])
def test_batches_are_a_permutation(n, batch_size):
    """Each item comes once an epoch, in full batches but one; only the generator sets the order."""
    lengths = [(i % 37, i % 5) for i in range(n)]

    def draw(*key):
        return [g.tolist() for g in batches(lengths, batch_size, generator(*key))]

    groups = draw(0, 1)
    assert sorted(sum(groups, [])) == list(range(n))
    rest = [n % batch_size] if n % batch_size else []
    assert sorted(map(len, groups), reverse=True) == [batch_size] * (n // batch_size) + rest
    assert draw(0, 1) == groups and (n <= batch_size or draw(0, 2) != groups)


def test_batches_are_not_ordered_by_length():
    """Short batches do not come first: the mean length of the first half is that of the second."""
    lengths = [(i, 1) for i in range(2000)]
    means = [np.mean([lengths[i][0] for i in g]) for g in batches(lengths, 20, generator(3))]
    assert abs(np.mean(means[:50]) - np.mean(means[50:])) < 400


def test_collate():
    """The docstring's layout: questions left-padded, language right-padded, thoughts aligned."""
    rows = [([1, 2], 1, [8, 3, 9]), ([4, 5, 6], 3, [8, 9]), ([7], 0, [8, 5, 6, 9])]
    batch = collate(rows, pad=0)
    assert batch.prompt.tolist() == [[0, 1, 2], [4, 5, 6], [0, 0, 7]]
    assert batch.keep.tolist() == [[False, True, True], [True] * 3, [False, False, True]]
    assert batch.latent.tolist() == [[True, False, False], [True] * 3, [False] * 3]
    assert batch.language.tolist() == [[8, 3, 9, 0], [8, 9, 0, 0], [8, 5, 6, 9]]
    assert batch.where.tolist() == [0, 1, 4, 8, 9, 10]
    assert batch.labels.tolist() == [3, 9, 9, 5, 6, 9]
    assert batch.positions == (2 + 1 + 3) + (3 + 3 + 2) + (1 + 0 + 4)
    assert batch.prompt.dtype == batch.labels.dtype == torch.long


# ---------------------------------------------------------------- chain problems

def solve(question):
    """Read a chain problem in any order of its facts.

    -> values of the people on the way to the one asked for, those people, the facts' people in
    order, the steps, and {person: person before}."""
    *facts, asked = re.split(r"(?<=\.) ", question)
    asked, = re.findall(r"^How many \w+ does (\w+) have\?$", asked)
    before, number, order = {}, {}, []
    for fact in facts:
        if m := re.fullmatch(r"(\w+) has what separates twice (\w+) from (\d+)\.", fact):
            who, base, number[m[1]] = m[1], m[2], int(m[3])
        else:
            (who, start), = re.findall(r"^(\w+) has (\d+) \w+\.$", fact)
            first, base = who, None
        before[who] = base
        order.append(who)
    needed = [asked]
    while before[needed[0]]:
        needed.insert(0, before[needed[0]])
    assert needed[0] == first and len(set(order)) == len(order)
    values, steps = [int(start)], []
    for who in needed[1:]:
        double, n = 2 * values[-1], number[who]
        values.append(abs(double - n))
        if double >= n:
            steps.append(f"<<2*{values[-2]}-{n}={double - n}>>")
        else:
            steps.append(f"<<{n}-2*{values[-2]}={n - double}>>")
    return values, needed, order, steps, before


@pytest.mark.parametrize("n_steps, limit, shuffled, distractors", [
    (3, 20, False, 0), (3, 20, True, 0), (4, 10, False, 3), (1, 4, True, 2), (8, 50, True, 5)])
def test_chain_items(n_steps, limit, shuffled, distractors):
    """The facts give the steps and the answer; every number is below the limit; nobody needs the
    distractors; facts are in order unless shuffled."""
    in_order = 0
    for seed in range(200):
        item = chain_item(random.Random(seed), n_steps, limit, shuffled, distractors)
        values, needed, order, steps, before = solve(item["question"])
        assert item["steps"] == steps and item["answer"] == str(values[-1])
        assert len(needed) == n_steps + 1
        assert all(int(n) < 2 * limit for n in re.findall(r"\d+", item["question"]))
        assert all(0 <= v < limit for v in values)
        assert len(order) == n_steps + 1 + distractors
        assert not set(before.values()) & (set(order) - set(needed))
        in_order += [who for who in order if who in needed] == needed
        check_item(item, "item")
    assert in_order == 200 if not shuffled else in_order < 150


def test_chains_fold():
    """Either term of the difference may be the larger: no fixed signs give the answer."""
    steps = sum((item["steps"] for item in chains((1000, 1, 1))["train"]), [])
    assert 0.4 < np.mean([step.startswith("<<2*") for step in steps]) < 0.6


def test_too_many_people():
    with pytest.raises(UserError, match="names"):
        chain_item(random.Random(0), 15, distractors=5)


def test_chains_splits():
    """The sizes asked for, no question twice; the same items for the same seed only."""
    sizes = (300, 100, 100)
    splits = chains(sizes, seed=0, n_steps=2, limit=8)
    assert tuple(map(len, splits.values())) == sizes
    questions = [item["question"] for item in sum(splits.values(), [])]
    assert len(set(questions)) == 500
    assert chains(sizes, seed=0, n_steps=2, limit=8) == splits
    assert chains(sizes, seed=1, n_steps=2, limit=8) != splits
    assert chains((50, 100, 100), seed=0, n_steps=2, limit=8)["test"] == splits["test"]


# ---------------------------------------------------------------- schedule

def test_learning_rate():
    """Linear warm-up, constant, then linear towards zero over the last share of the updates."""
    rates = [trapezoid(u, 100, 2.0, warmup=10, decay=0.4) for u in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (u + 1) for u in range(10)])
    assert rates[9:61] == pytest.approx([2.0] * 52)
    assert rates[60:] == pytest.approx([2.0 * (100 - u) / 40 for u in range(60, 100)])
    assert rates[-1] > 0
    assert [trapezoid(u, 50, 1e-4, decay=0.0) for u in range(50)] == [1e-4] * 50
    assert 0 < trapezoid(0, 1, 1.0, warmup=20, decay=0.4) <= 1.0


@pytest.mark.parametrize("edges, detour", [
    ([(0, 2), (2, 3), (3, 4)], False),
    ([(0, 2), (2, 3), (3, 4), (0, 5), (5, 6)], False),        # another way that ends elsewhere
    ([(0, 2), (2, 3), (3, 4), (0, 5), (5, 3)], False),        # another way, as short
    ([(0, 2), (2, 3), (3, 4), (0, 5), (5, 2)], True),         # one step longer, from the root
    ([(0, 2), (2, 3), (3, 4), (2, 5), (5, 3)], True),         # from a node on the way
    ([(0, 2), (2, 3), (3, 4), (3, 5), (5, 4)], True),
    ([(0, 2), (2, 3), (3, 4), (0, 3)], True)])                # then 0-3-4 is the shortest
def test_detours(edges, detour):
    assert has_detour(edges, 0, 4) == detour
