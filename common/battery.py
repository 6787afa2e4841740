"""The sceptic's battery: do continuous thoughts do the work? Replace them and ask again.

A model answers the whole test set with its own thoughts, which are kept. Then it reads others in
their place, and answers again:

    keep     question <bot> o1 o2 o3 <eot> ..      its own
    zero     question <bot> 0  0  0  <eot> ..      as many positions, with nothing on them
    swap     question <bot> o1 o2 o3 <eot> ..      those that it thought about another question
    remove   question <bot> <eot> ..               fewer positions, too

If the answers stay, the thoughts were not needed. Read on in this order: KINDS, others, measure.
"""

import argparse
import os
from typing import NamedTuple

import torch

from common import evaluation, runtime
from common.files import write_json
from common.runtime import UserError, count, generator
from common.scoring import extract_answer, mcnemar, meaning, pairs_of, wilson

KINDS = {                            # --thoughts; see others
    "keep": "the model's own",
    "remove": "none, <eot> comes right after <bot>",
    "zero": "zeros",
    "mean": "the mean of that position over the test set",
    "noise": "a random direction, with the norm of the thought",
    "shuffle": "in another order",
    "swap": "another question's",
}
OF_PAUSE = ("keep", "remove")        # what can be done to <pause> tokens
OF_OTHERS = ("mean", "swap")         # what needs other questions


# ---------------------------------------------------------------- what is read instead

class Change(NamedTuple):
    """A row of the battery: what becomes of the thoughts."""
    kind: str                        # of KINDS
    std: float = None                # noise: added with this deviation; None: instead of a thought
    at: int = None                   # only this thought, counted from 1; None: all

    def label(self):
        return self.kind if self.std is None else f"{self.kind} +{self.std:g}"


def others(change, thoughts, latent, seed=0, step=1):
    """What is read in place of the thoughts (n, k, C) of n items, latent (n, k): True where an item
    has its i-th thought (its first ones are True). Returns both anew; remove and swap change how
    many thoughts an item has. step: how many items before it another question is, for swap.

    mean is over the items that have that thought, shuffle and noise are within an item's own. Noise
    depends on the seed and the item's number only: each deviation has the same directions.
    """
    kind, std, at = change
    column = torch.ones(latent.size(1), dtype=torch.bool)                       # (k,)
    if at is not None:
        column = torch.arange(latent.size(1)) == at - 1
    chosen = latent & column                                                    # (n, k)
    if kind == "remove":
        # an item without the thought that goes has none after it, so its mask is right too
        return thoughts[:, ~column], latent[:, ~column]
    if kind == "swap" and at is None:
        return thoughts.roll(step, 0), latent.roll(step, 0)
    if kind == "swap":
        new = thoughts.clone()
        have = chosen.any(1).nonzero()[:, 0]
        new[have, at - 1] = thoughts[have.roll(step), at - 1]
        return new, latent
    if kind == "keep":
        return thoughts, latent
    if kind == "zero":
        new = torch.zeros_like(thoughts)
    elif kind == "mean":
        n = latent.sum(0).clamp(min=1)[:, None]                                 # (k, 1)
        new = ((thoughts * latent[..., None]).sum(0) / n).expand_as(thoughts)
    elif kind == "noise":
        normal = normals(thoughts.shape, seed)
        if std is None:
            new = normal * thoughts.norm(dim=-1, keepdim=True) / normal.norm(dim=-1, keepdim=True)
        else:
            new = thoughts + std * normal
    else:
        new = shuffled(thoughts, latent, seed)
    return torch.where(chosen[..., None], new, thoughts), latent


def normals(shape, seed):
    """Standard normal numbers (n, k, C), those of an item from a generator of its own."""
    drawn = torch.zeros(shape)
    for i in range(shape[0]):
        drawn[i] = torch.from_numpy(generator(seed, i).standard_normal(shape[1:]))
    return drawn


def shuffled(thoughts, latent, seed):
    """An item's m thoughts moved on by 1 + seed % (m - 1) places, the last ones to the front."""
    m = latent.sum(1, keepdim=True)                                             # (n, 1)
    by = 1 + seed % (m - 1).clamp(min=1)
    old = (torch.arange(latent.size(1)) - by) % m.clamp(min=1)                  # (n, k)
    return thoughts.gather(1, old[..., None].expand_as(thoughts))


def without_pauses(sequences, tok, at=None):
    """The Sequences without <pause> tokens in their prompts, or without the `at`-th of them."""
    found = []
    for sequence in sequences:
        places = [i for i, token in enumerate(sequence.prompt) if token == tok.pause]
        gone = places if at is None else places[at - 1:at]
        prompt = [token for i, token in enumerate(sequence.prompt) if i not in gone]
        found.append(sequence._replace(prompt=prompt))
    return found


def changed(change, sequences, thoughts, latent, tok, seed, step=1):
    """What a model reads under a Change: Sequences, and the thoughts (n, k, C) in place of its own,
    or None if it has none and <pause> tokens go."""
    if not thoughts.size(1):
        return without_pauses(sequences, tok, change.at), None
    thoughts, latent = others(change, thoughts, latent, seed, step)
    n = latent.sum(1).tolist()
    return [q._replace(n_latent=n_latent) for q, n_latent in zip(sequences, n)], thoughts


# ---------------------------------------------------------------- what can be changed

def possible(sequences, tok, at=None):
    """The kinds that these Sequences allow, and how many thoughts or <pause> tokens they have."""
    n = max(q.n_latent for q in sequences)
    if n:
        return [kind for kind in KINDS if kind != "shuffle" or at is None], n
    n = max(q.prompt.count(tok.pause) for q in sequences)
    return [kind for kind in KINDS if kind in (OF_PAUSE if n else ("keep",))], n


def changes_of(flags, sequences, tok, where):
    """The Changes that --thoughts, --noise-std and --at ask for, keep first. Raises UserError if a
    model has no such thoughts; where: its file."""
    kinds, n = possible(sequences, tok, flags.at)
    typed = flags.thoughts.split(",")
    if not n:
        raise UserError(f"--thoughts {flags.thoughts}: {where} has no thoughts to replace.")
    if flags.at is not None and flags.at > n:
        raise UserError(f"--at {flags.at}: {where} has {n} thoughts; choose one of them.")
    for kind in typed:
        if kind not in (*kinds, "all"):
            raise UserError(f"--thoughts {kind}: the thoughts of {where} are <pause> tokens, which "
                            "have no state to replace; they can only be removed.")
    if flags.noise_std and "noise" not in kinds:
        raise UserError(f"--noise-std: the thoughts of {where} are <pause> tokens, which have no "
                        "state to add noise to; leave it out.")
    if "all" not in typed:
        kinds = list(dict.fromkeys(["keep", *typed]))
    found = []
    for kind in kinds:
        found.append(Change(kind, None, flags.at))
        if kind == "noise":
            found += [Change(kind, std, flags.at) for std in numbers(flags.noise_std)]
    return found


def some_kinds(text):
    """argparse type of --thoughts: some of KINDS with commas, or all. Stays a text, as a checkpoint
    keeps it."""
    for kind in text.split(","):
        if kind not in (*KINDS, "all"):
            raise argparse.ArgumentTypeError(f"there is no {kind!r}; choose among all, "
                                             + ", ".join(KINDS))
    return text


def numbers(text):
    """The numbers of --noise-std, or of None."""
    return [float(number) for number in text.split(",")] if text else []


def deviations(text):
    """argparse type of --noise-std: numbers above 0, with commas; stays a text too."""
    try:
        good = all(0 < number < 1e9 for number in numbers(text)) and text
    except ValueError:
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers above 0, as 0.1,0.2 are")
    return text


SETTINGS = [
    ("thoughts", "keep", some_kinds, "--eval-only: what is read as thoughts, with commas, or all: "
     + "; ".join(f"{kind}: {what}" for kind, what in KINDS.items())),
    ("noise_std", None, deviations, "--thoughts noise: also rows with N(0, this^2) added to each "
                                    "channel of each thought; numbers with commas"),
    ("at", None, count(1), "--thoughts: change only this thought (1: the first)"),
]
FLAGS = tuple(name for name, *_ in SETTINGS)


def check(flags, typed, error):
    """Refuse --thoughts, --noise-std, --at where they would do nothing or cannot be done."""
    for name in FLAGS:
        if name in typed and not flags.eval_only:
            error(f"--{name} needs a trained model: add --eval-only CKPT".replace("_", "-"))
    if not flags.eval_only:
        return
    kinds = flags.thoughts.split(",")
    if "noise_std" in typed and not {"noise", "all"} & set(kinds):
        error("--noise-std is for noise: add --thoughts noise, or all")
    if "at" in typed and "thoughts" not in typed:
        error("--at says which thought is changed: add --thoughts, zero or all, say")
    if "at" in typed and "shuffle" in kinds:
        error("--thoughts shuffle changes the order of all thoughts: leave out --at, or shuffle")
    if flags.ask is None:
        return
    for kind in kinds:
        if kind in OF_OTHERS:
            error(f"--thoughts {kind} needs other questions: leave out --ask")
    if len(kinds) > 1 or kinds == ["all"] or "noise_std" in typed:
        error("--ask shows one answer: give --thoughts a single kind, and no --noise-std")


# ---------------------------------------------------------------- measuring

def measure(s, items, sequences, think_and_answer, changes, batch_size=256):
    """Test rows, one of each Change, the first of which is keep. A row is what evaluation.evaluate
    returns (but seconds are without thinking, save for keep), and: thoughts (the kind), noise_std,
    at; interval (95 %, Wilson) of the accuracy; changed, the share of items whose answer is not
    that of keep; p of McNemar's exact test against keep (both None for keep)."""
    step = 2 if pairs_of(items) else 1           # the item before may be this one's original
    own = evaluation.answer_all(s, items, sequences, think_and_answer, batch_size)
    rows = []
    for change in changes:
        found, compared = own, dict(changed=None, p=None)
        if change.kind != "keep":
            asked, thoughts = changed(change, sequences, own.thoughts, own.latent, s.tok,
                                      s.flags.seed, step)
            found = evaluation.answer_all(s, items, asked, think_and_answer, batch_size,
                                          thoughts=thoughts)
            compared = compare(s, own, found)
        interval = wilson(int(found.right.sum()), len(items))
        rows.append(found.row | dict(thoughts=change.kind, noise_std=change.std, at=change.at,
                                     interval=interval) | compared)
    return rows


def compare(s, own, found):
    """changed and p of Answers against those with the model's own thoughts."""
    differ = sum(answer_in(said) != answer_in(found.texts[i]) for i, said in own.texts.items())
    differ, = s.machine.sum(differ)
    return dict(changed=differ / len(own.right),
                p=mcnemar(int((own.right & ~found.right).sum()),
                          int((found.right & ~own.right).sum())))


def answer_in(text):
    """The answer in a decoded text as the scorer reads it; two are equal if they score alike."""
    return meaning(extract_answer(text))


def all_rows(s, items, examples_of, sides, think_and_answer):
    """measure of all that can be done to a model's thoughts, for --table; [] if it has none.
    examples_of, sides: see evaluation.report; the first side is the one that thinks."""
    examples = examples_of(s, "test", items)
    sequences, *_ = sides(s, examples).values()
    kinds, n = possible(sequences, s.tok)
    if not n:
        return []
    return measure(evaluation.with_limit(s, examples), items, sequences, think_and_answer,
                   [Change(kind) for kind in kinds])


def report(s, path, test, examples_of, sides, think_and_answer):
    """--eval-only with --thoughts: measure and print a table for each test set of {name: items},
    and write battery.json next to the checkpoint `path`."""
    found = []
    for name, items in test.items():
        examples = examples_of(s, "test", items, name)
        sequences, *_ = sides(s, examples).values()
        changes = changes_of(s.flags, sequences, s.tok, path)
        rows = measure(evaluation.with_limit(s, examples), items, sequences, think_and_answer,
                       changes)
        print_table(rows, [change.label() for change in changes], s.flags, name)
        found += [row | dict(data=name) for row in rows]
    out = os.path.join(os.path.dirname(path), "battery.json")
    if runtime.RANK == 0:
        write_json(out, dict(checkpoint=str(path), method=s.flags.method, seed=s.flags.seed,
                             rows=found))
    print(f"wrote {out}")


def print_table(rows, labels, flags, data):
    """A line per row, and what has to be known to read it."""
    only = "" if rows[0]["at"] is None else f", only thought {rows[0]['at']}"
    print(f"\n{flags.method} on {data}, {rows[0]['n']} test questions: what is read in place of "
          f"its thoughts{only}")
    line = "{:<12} {:>9} {:>14} {:>10} {:>9} {:>6} {:>7} {:>11} {:>12}".format
    print(line("thoughts", "accuracy", "95 % interval", "p", "changed", "n", "tokens", "dist. item",
               "dist. across"))
    for label, row in zip(labels, rows):
        low, high = row["interval"]
        print(line(label, f"{100 * row['accuracy']:.1f} %",
                   f"{100 * low:.1f} - {100 * high:.1f}",
                   p_cell(row["p"]), changed_cell(row["changed"]), row["n"],
                   f"{row['tokens']:.1f}", *evaluation.distance_cells(row)))
    print("p: McNemar's exact test against keep; changed: answers that are not keep's; dist.: mean "
          "L2 distance\nof two thoughts of an item, and of two items' thoughts at one position")
    if max(row["tokens"] for row in rows) > rows[0]["tokens"] + 1:
        print("tokens: where they are more than keep's, it may be writing its steps in words again")
    if "zero" in labels:
        print("zero: no thought is near zero (it is off their manifold), so a drop may say no more "
              "than that")
    if "shuffle" in labels and len(rows[0]["thought_norms"]) == 1:
        print("shuffle: of a single thought there is no other order")
    evaluation.print_pairs({label if label != "keep" else "": row
                            for label, row in zip(labels, rows)})
    evaluation.print_cut(rows)


def p_cell(p):
    if p is None:
        return "-"
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def changed_cell(share):
    return "-" if share is None else f"{100 * share:.1f} %"


# ---------------------------------------------------------------- one question

def ask(s, question, n_extra, mark, sides, think_and_answer, in_words="", explain=None):
    """--ask: show what each side makes of a question. The first side's thoughts are replaced as
    --thoughts says. in_words: what is printed before the text of a side without a student.
    explain: see show."""
    example, kind = evaluation.asked(s, question, n_extra, mark), s.flags.thoughts
    for who, (sequence,) in sides(s, [example]).items():
        label = "student: " if who == "student" else in_words
        show(s, sequence, think_and_answer, label, kind, explain)
        kind = "keep"


def show(s, sequence, think_and_answer, label="", kind="keep", explain=None):
    """Print the thoughts of a Sequence, each with its norm and nearest five tokens, and what is
    decoded after them. kind: of KINDS, what is then read in their place. explain: a function of a
    Setup and thoughts (1, k, C) that returns the texts that they hold."""
    decoded, states, latent = think_and_answer(s, [sequence])
    for i, state in enumerate(states[0].float(), 1):
        top = s.model.head(state).softmax(-1).topk(5)
        nearest = zip(top.values.tolist(), top.indices.tolist())
        print(f"thought {i}  norm {state.norm():6.2f}  "
              + "  ".join(f"{s.tok.decode([t])!r} {100 * p:.0f} %" for p, t in nearest))
    for i, text in enumerate(explain(s, states)[0] if explain else (), 1):
        print(f"step {i}, as the decoder finds it in its thoughts: {text}")
    if kind != "keep":
        *_, change = changes_of(s.flags, [sequence], s.tok, "this model")
        own = evaluation.project(s, states.float().cpu())
        asked, thoughts = changed(change, [sequence], own, latent.cpu(), s.tok, s.flags.seed)
        given = {} if thoughts is None else dict(thoughts=thoughts.to(s.machine.device))
        decoded, *_ = think_and_answer(s, asked, **given)
    print(label + s.tok.decode(decoded[0]))
