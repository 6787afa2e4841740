"""Evaluation: what is decoded and what it costs, controls of the thoughts, --ask."""

import argparse
import functools
import time

import numpy as np
import torch

from common import text
from common.runtime import UserError
from common.scoring import is_correct
from gpt2 import StaticCache

LIMIT = 64                           # tokens decoded per answer, if no gold text is longer
CONTROLS = {                         # --thoughts; see control
    "keep": "the model's own",
    "zero": "zeros",
    "noise": "normal, with the mean and spread of each",
    "shuffle": "in another order",
    "swap": "another question's",
}


def given(s, sequences):
    """The Batch of what is given of each Sequence: prompt, n_latent, first language token."""
    return text.collate([q._replace(language=q.language[:1]) for q in sequences], s.tok.eos,
                        s.machine.device)


def new_cache(s, batch):
    """A StaticCache with room for a Batch and the tokens that are decoded."""
    size = batch.prompt.size(1) + batch.latent.size(1) + 1 + limit(s)
    return StaticCache(s.model.config, len(batch.prompt), size, s.machine.device, s.machine.dtype)


def limit(s):
    """Most tokens decoded per answer."""
    return s.flags.max_new or LIMIT


@functools.cache                     # once is enough
def warn(sentence):
    print(sentence)


def with_limit(s, examples):
    """s with a --max-new that cuts off no gold text of the Examples, their steps and answers; a
    shorter one that was typed stays, with a warning."""
    longest = max(sum(map(len, e.steps)) + len(e.answer) for e in examples)
    if limit(s) >= longest:
        return s
    if s.flags.max_new:
        warn(f"warning: --max-new {s.flags.max_new} cuts off answers; the longest has {longest} "
             "tokens")
        return s
    return s._replace(flags=argparse.Namespace(**vars(s.flags) | dict(max_new=longest)))


def evaluate(s, items, sequences, think_and_answer, batch_size=256, rationale=False):
    """Accuracy by real decoding, and its cost. Each rank answers its share of the items.

    think_and_answer: (Setup, Sequences) -> token-id lists, thoughts (B, k, C) and latent (B, k),
    True where a row has its i-th thought. rationale: count also the tokens before the answer.
    Returns a dict: accuracy (0..1), n, tokens (decoded tokens, without eos, plus thoughts: what
    Coconut counts), cut (share of answers cut off by --max-new or block_size), seconds (per
    question, of one process), sample (text, on rank 0), thought_norms (mean L2 norm of the 1st,
    2nd .. thought) and, if asked for, rationale (mean).
    """
    modules = [module for module in (s.model, s.projection) if module is not None]
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    machine = s.machine
    mine = sorted(range(machine.rank, len(items), machine.world),
                  key=lambda i: len(sequences[i].prompt))
    k = sequences[0].n_latent
    texts, n_tokens, n_cut, norms, rows_with = {}, 0, 0, torch.zeros(k), torch.zeros(k)
    start = time.perf_counter()
    for chunk in np.array_split(mine, -(-len(mine) // batch_size)) if mine else []:
        decoded, thoughts, latent = think_and_answer(s, [sequences[i] for i in chunk])
        width = latent.size(1)
        norms[:width] += (thoughts.float().norm(dim=-1) * latent).sum(0).cpu()
        rows_with[:width] += latent.sum(0).cpu()
        n_tokens += sum(map(len, decoded)) + int(latent.sum())
        for i, ids in zip(chunk, decoded):
            texts[i] = s.tok.decode(ids)
            room = s.model.config.block_size - len(sequences[i].prompt) - sequences[i].n_latent
            n_cut += len(ids) >= min(limit(s), room)
    seconds = (time.perf_counter() - start) / max(1, len(mine))
    right = sum(is_correct(said, items[i]["answer"]) for i, said in texts.items())
    spent = 0
    if rationale:
        spent = sum(n_before_answer(s, sequences[i], said) for i, said in texts.items())
    right, n_tokens, n_cut, spent, *sums = machine.sum(right, n_tokens, n_cut, spent,
                                                       *norms.tolist(), *rows_with.tolist())
    for module, training in zip(modules, modes):
        module.train(training)
    row = dict(accuracy=right / len(items), n=len(items), tokens=n_tokens / len(items),
               cut=n_cut / len(items), seconds=seconds, sample=texts.get(0),
               thought_norms=[round(norm / max(1, n), 3) for norm, n in zip(sums[:k], sums[k:])])
    return row | dict(rationale=spent / len(items)) if rationale else row


def n_before_answer(s, sequence, said):
    """Tokens before the answer prompt; of latent mode the thoughts, <bot> and <eot>: what CODI's
    compression compares."""
    if sequence.language[0] == s.tok.eot:
        return sequence.n_latent + 2
    return len(s.tok.encode(said.rpartition(s.flags.prompt.strip())[0]))


def test_row(s, items, sequences, think_and_answer, rationale=False):
    """What evaluate returns, and seconds_batch_1: per question, one question at a time, over the
    first 20."""
    row = evaluate(s, items, sequences, think_and_answer, 256, rationale)
    for n in (1, 20 * s.machine.world):          # the first one warms up
        one = evaluate(s, items[:n], sequences[:n], think_and_answer, 1)
        row["seconds_batch_1"] = one["seconds"]
    return row


def report(s, test, examples_of, sides, think_and_answer):
    """Test rows of {name: items}: on each, one of every side. sides: Examples -> {who: Sequences},
    student and teacher, say. A row is what test_row returns, who and data."""
    rows = []
    for name, items in test.items():
        examples = examples_of(s, "test", items, name)
        able = with_limit(s, examples)
        for who, sequences in sides(s, examples).items():
            row = test_row(able, items, sequences, think_and_answer, rationale=True)
            rows.append(row | dict(who=who, data=name))
    return rows


def print_cut(rows):
    """Say how many answers were cut off, if any: their accuracy says nothing of the model."""
    cut = max(row.get("cut", 0) for row in rows)
    if cut:
        print(f"up to {100 * cut:.1f} % of the answers were cut off; see --max-new, --block-size")


def control(thoughts, kind, seed):
    """Thoughts (B, k, C) -> what is read in their place: does what the model thought matter? Noise
    has the mean and standard deviation of each thought; swap takes those of the row before."""
    if kind == "zero":
        return torch.zeros_like(thoughts)
    if kind == "noise":
        fixed = torch.Generator().manual_seed(seed)
        normal = torch.randn(thoughts.shape, generator=fixed).to(thoughts)
        return thoughts.mean(-1, keepdim=True) + thoughts.std(-1, keepdim=True) * normal
    if kind == "shuffle":
        k = thoughts.size(1)
        return thoughts.roll(1 + seed % (k - 1) if k > 1 else 0, 1)
    return thoughts.roll(1, 0)


def asked(s, question, n_extra, mark):
    """The Example of a question that was typed. Raises UserError if others would be needed."""
    if getattr(s.flags, "thoughts", "keep") == "swap":
        raise UserError("--thoughts swap needs other questions; leave out --ask.")
    item = dict(question=question, steps=[], answer="")
    return text.tokenize([item], s.tok, s.model.config.block_size, n_extra, "--ask", mark,
                         "ask a shorter question")[0]


def show(s, sequence, think_and_answer, label=""):
    """Print the thoughts of a Sequence, each with its norm and nearest five tokens, and what is
    decoded after them."""
    decoded, thoughts, _ = think_and_answer(s, [sequence])
    for i, thought in enumerate(thoughts[0].float(), 1):
        top = s.model.head(thought).softmax(-1).topk(5)
        nearest = zip(top.values.tolist(), top.indices.tolist())
        print(f"thought {i}  norm {thought.norm():6.2f}  "
              + "  ".join(f"{s.tok.decode([t])!r} {100 * p:.0f} %" for p, t in nearest))
    print(label + s.tok.decode(decoded[0]))
