"""Evaluation: what is decoded and what it costs, how far apart thoughts are, --ask."""

import argparse
import functools
import time
from typing import NamedTuple

import numpy as np
import torch

from common import text
from common.scoring import is_correct, of_pairs
from gpt2 import StaticCache

LIMIT = 64                           # tokens decoded per answer, if no gold text is longer
N_TIMED = 20                         # questions that are answered one at a time, for their seconds


def given(s, sequences):
    """The Batch of what is given of each Sequence: prompt, n_latent, first language token."""
    return text.collate([q._replace(language=q.language[:1]) for q in sequences], s.tok.eos,
                        s.machine.device)


def new_cache(s, batch):
    """A StaticCache with room for a Batch and the tokens that are decoded."""
    decoded = min(limit(s), s.model.config.block_size)
    size = batch.prompt.size(1) + batch.latent.size(1) + 1 + decoded
    return StaticCache(s.model.config, len(batch.prompt), size, s.machine.device, s.machine.dtype)


@torch.no_grad()
def written(s, decoder, vectors, batch_size=256):
    """What a decoder writes greedily after vectors (n, c, C), which are all that it reads: n
    texts."""
    room, texts = min(limit(s), decoder.config.block_size), []
    for x in vectors.to(s.machine.device).split(batch_size):
        with s.machine.autocast():
            cache = StaticCache(decoder.config, len(x), x.size(1) + room, x.device, s.machine.dtype)
            h = decoder(embeds=x, cache=cache, last=1)[:, 0]
            said = decoder.decode(cache, h, room, s.tok.eos)
        texts += [s.tok.decode(ids).strip() for ids in said]
    return texts


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


class Answers(NamedTuple):
    """What n items were answered with. All processes know all of it, but for the texts."""
    row: dict                # what evaluate returns
    texts: dict              # {i: decoded text} of the items of this process
    right: torch.Tensor      # (n,) bool
    thoughts: torch.Tensor   # (n, k, C) what was fed back
    latent: torch.Tensor     # (n, k) bool, True where an item has its i-th thought


def evaluate(s, items, sequences, think_and_answer, batch_size=256, rationale=False):
    """Accuracy by real decoding, and its cost. Each rank answers its share of the items.

    think_and_answer: (Setup, Sequences) -> token-id lists, thoughts (B, k, C) and latent (B, k),
    True where a row has its i-th thought. rationale: count also the tokens before the answer.
    Returns a dict: accuracy (0..1), n, tokens (decoded tokens, without eos, plus thoughts: what
    Coconut counts), cut (share of answers cut off by --max-new or block_size), seconds (per
    question, of one process), sample (text, on rank 0), thought_norms (mean L2 norm of the 1st,
    2nd .. thought), distance_item and distance_across (see distances); with items in pairs, pairs
    (see scoring.of_pairs) and, if asked for, rationale (mean).
    """
    return answer_all(s, items, sequences, think_and_answer, batch_size, rationale).row


def answer_all(s, items, sequences, think_and_answer, batch_size=256, rationale=False,
               thoughts=None):
    """The Answers of a model to all items; see evaluate. thoughts (n, k, C): read them in place of
    its own, of each item as many as its Sequence has."""
    modules = [module for module in (s.model, s.projection) if module is not None]
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    machine = s.machine
    mine = sorted(range(machine.rank, len(items), machine.world),
                  key=lambda i: len(sequences[i].prompt))
    k = max(q.n_latent for q in sequences)
    texts, n_tokens, n_cut = {}, 0, 0
    fed_back = torch.zeros(len(items), k, s.model.config.n_embd)
    has = torch.zeros(len(items), k)
    start = time.perf_counter()
    for chunk in np.array_split(mine, -(-len(mine) // batch_size)) if mine else []:
        asked, given = [sequences[i] for i in chunk], {}
        if thoughts is not None:
            most = max(q.n_latent for q in asked)
            given = dict(thoughts=thoughts[chunk, :most].to(machine.device))
        decoded, states, latent = think_and_answer(s, asked, **given)
        width = latent.size(1)
        n_tokens += sum(map(len, decoded)) + int(latent.sum())
        fed_back[chunk, :width], has[chunk, :width] = states.float().cpu(), latent.float().cpu()
        for i, ids in zip(chunk, decoded):
            texts[i] = s.tok.decode(ids)
            room = s.model.config.block_size - len(sequences[i].prompt) - sequences[i].n_latent
            n_cut += len(ids) >= min(limit(s), room)
    seconds = (time.perf_counter() - start) / max(1, len(mine))
    if thoughts is None:
        fed_back[mine] = project(s, fed_back[mine])
    norms, rows_with = (fed_back.norm(dim=-1) * has).sum(0), has.sum(0)
    right = torch.zeros(len(items))
    for i, said in texts.items():
        right[i] = is_correct(said, items[i]["answer"])
    spent = 0
    if rationale:
        spent = sum(n_before_answer(s, sequences[i], said) for i, said in texts.items())
    n_right, n_tokens, n_cut, spent, *sums = machine.sum(int(right.sum()), n_tokens, n_cut, spent,
                                                         *norms.tolist(), *rows_with.tolist())
    for tensor in (right, fed_back, has):        # of others it has zeros: the sum is what all found
        machine.sum_(tensor)
    for module, training in zip(modules, modes):
        module.train(training)
    right, has = right.bool(), has.bool()
    item, across = distances(fed_back, has)
    row = dict(accuracy=n_right / len(items), n=len(items), tokens=n_tokens / len(items),
               cut=n_cut / len(items), seconds=seconds, sample=texts.get(0),
               thought_norms=[round(norm / max(1, n), 3) for norm, n in zip(sums[:k], sums[k:])],
               distance_item=item, distance_across=across)
    if pairs := of_pairs(items, right):
        row["pairs"] = pairs
    if rationale:
        row["rationale"] = spent / len(items)
    return Answers(row, texts, right, fed_back, has)


@torch.no_grad()
def project(s, states):
    """What a model feeds back for its states (n, k, C), on the CPU: those, or CODI's projection of
    them."""
    if s.projection is None or not states.numel():
        return states
    with s.machine.autocast():
        return s.projection(states.to(s.machine.device)).float().cpu()


def distances(thoughts, latent, most=2000):
    """How far apart are thoughts (n, k, C), where latent (n, k) is True? Mean L2 distances over all
    pairs, rounded to 0.001: of two thoughts of an item, and of two items' thoughts at the same
    position (of the first `most` items). None where there is no pair. Thoughts that have collapsed
    are near 0 across items: they are all alike, whatever the question."""
    within, across = [], []
    for i in range(thoughts.size(1)):
        for j in range(i):
            both = latent[:, i] & latent[:, j]
            within.append((thoughts[both, i] - thoughts[both, j]).norm(dim=-1))
        across.append(torch.pdist(thoughts[:most, i][latent[:most, i]]))

    def mean(parts):
        together = torch.cat([*parts, torch.zeros(0)])
        return round(together.mean().item(), 3) if len(together) else None
    return mean(within), mean(across)


def distance_cells(row):
    """Both distances of a row as a table shows them: '-' where there is none."""
    found = (row.get("distance_item"), row.get("distance_across"))
    return ["-" if distance is None else f"{distance:.2f}" for distance in found]


def share_cell(share, interval):
    """'93.1 % [91.4, 94.5]': a share and its 95 % interval."""
    if share is None:
        return "-"
    return f"{100 * share:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def print_pairs(rows):
    """A line for each row of {label: row} that comes from items in pairs. A label may be ''."""
    for label, row in rows.items():
        if found := row.get("pairs"):
            print(", ".join(filter(None, ["pairs", label])) + ": both right "
                  + share_cell(found["share"], found["interval"]) + f" of {found['n']}; of the "
                  f"{found['original']} whose original is right, the prediction follows the change "
                  "in " + share_cell(found["follows"], found["follows_interval"]))


def n_before_answer(s, sequence, said):
    """Tokens before the answer prompt; of latent mode the thoughts, <bot> and <eot>: what CODI's
    compression compares."""
    if sequence.language[0] == s.tok.eot:
        return sequence.n_latent + 2
    mark = getattr(s.flags, "prompt", text.CODI_MARK)
    return len(s.tok.encode(said.rpartition(mark.strip())[0]))


def test_row(s, items, sequences, think_and_answer, rationale=False):
    """What evaluate returns, and seconds_batch_1: per question, one question at a time, over the
    first N_TIMED."""
    row = evaluate(s, items, sequences, think_and_answer, 256, rationale)
    for n in (1, N_TIMED * s.machine.world):     # the first one warms up
        one = evaluate(s, items[:n], sequences[:n], think_and_answer, 1)
        row["seconds_batch_1"] = one["seconds"]
    return row


def report(s, test, examples_of, sides, think_and_answer):
    """Test rows of {name: items}: on each, one of every side. sides: Examples -> {who: Sequences},
    student and teacher, say. A row is what test_row returns, who and data."""
    rows = []
    for name, items in test.items():
        examples = examples_of(s, "test", items, name)
        s_test = with_limit(s, examples)
        for who, sequences in sides(s, examples).items():
            row = test_row(s_test, items, sequences, think_and_answer, rationale=True)
            rows.append(row | dict(who=who, data=name))
    return rows


def print_cut(rows):
    """Say how many answers were cut off, if any: their accuracy says nothing of the model."""
    cut = max(row.get("cut", 0) for row in rows)
    if cut:
        print(f"up to {100 * cut:.1f} % of the answers were cut off; see --max-new, --block-size")


def asked(s, question, n_extra, mark):
    """The Example of a question that was typed."""
    item = dict(question=question, steps=[], answer="")
    return text.tokenize([item], s.tok, s.model.config.block_size, n_extra, "--ask", mark,
                         "ask a shorter question")[0]
