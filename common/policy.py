"""A policy whose thoughts are soft tokens, and its rollouts: many answers to each question.

What a thought is, a method says with the four functions of a Policy; nothing here knows more of it.

    q q q q | o o o o "###" | a a eos    o: thoughts; the first whose leading token is "###" ends
                                         them and is read as that token; the answer is in words
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from common import evaluation, experiment, imitation
from common.runtime import UserError
from common.sampling import draw_tokens, mixture_entropy, pass_at, seeded
from common.scoring import extract_answer, is_correct
from common.text import COCONUT_MARK, Sequence, collate
from gpt2 import GrowingCache, StaticCache

SPARE = 8                # tokens that a rollout may have more than the longest gold text
ONE_HOT = 0.05           # nats: a soft token of less has one part of about 0.99 or more
PASS_AT = (1, 8, 32)
OF_UPDATES = ("ratio", "off", "clipped", "kl", "entropy")
LOGGED = ("reward", "length", "soft_entropy", "one_hot", "learned", *OF_UPDATES)


class Thought(NamedTuple):
    """What is drawn at one position of each row, or at many (..)."""
    token: torch.Tensor      # (..) the leading token: it says when thinking ends
    indices: torch.Tensor    # (.., K) what is mixed ..
    weights: torch.Tensor    # (.., K) .. and how
    drawn: torch.Tensor      # (.., D) what else the density needs


class Policy(NamedTuple):
    """A method's functions; flags are its settings, wte (V, C) the embeddings."""
    noise: Callable              # T, model, flags, generator -> noise (T, D) of a rollout
    draw: Callable               # logits (B, V), noise (B, D), wte, flags -> Thought (B)
    log_likelihood: Callable     # logits (N, V), Thought (N), wte, flags -> (N,)
    mixed: Callable              # Thought (..), wte, flags -> what is read as it (.., C)


class Rollouts(NamedTuple):
    """R rollouts of T positions each."""
    thought: Thought         # (R, T): where the answer is in words, only `token` counts
    thinks: torch.Tensor     # (R, T) bool: was drawn as a thought
    soft: torch.Tensor       # (R, T) bool: and is read as one: all but the last, "###"
    there: torch.Tensor      # (R, T) bool: comes before the rollout's end
    log_p: torch.Tensor      # (R, T) log-likelihood under the policy that drew it


# ---------------------------------------------------------------- start


def examples_of(s, split, items):
    """Examples of the items, with room for rollouts that are longer."""
    return experiment.examples_of(s, items, f"{s.flags.data}, {split}.json", SPARE, COCONUT_MARK)


def prepared(s):
    """A Setup with what its run finds out, how long it imitates first and how long a rollout may
    be, and {split: Examples}. Raises UserError if --init does not think in words."""
    examples = {split: examples_of(s, split, items) for split, items in s.data.items()}
    flags, init = s.flags, s.flags.init
    updates = flags.steps_start
    if updates is None:
        updates = 0 if s.state or s.resumed else 1200
    before = s.state.get("flags", {})
    if s.state and not updates and (before.get("method") != "cot"
                                    or before.get("prompt", COCONUT_MARK) != COCONUT_MARK):
        raise UserError(f"--init {init} does not think in words as coconut.py --method cot does; "
                        "give a model of that, or let it learn to first: --steps-start 1200.")
    if not len(marks(s.tok)):
        raise UserError(f"--init {init}: its tokenizer has no token for "
                        f"{COCONUT_MARK.strip()!r}, which ends thinking; train another model.")
    longest = max((of.lengths.steps.sum(1) + of.lengths.answer).max() for of in examples.values())
    found = dict(steps_start=updates, max_new=flags.max_new or int(longest) + SPARE, method="cot",
                 prompt=COCONUT_MARK)
    return s._replace(flags=argparse.Namespace(**vars(flags) | found)), examples


# ---------------------------------------------------------------- drawing, and reading it again


@torch.no_grad()
def rollouts(s, policy, batch, n, noise, uniform):
    """Rollouts, n of each question of a Batch, on one prefill. s: experiment.Setup. noise (R, T, D)
    draws the thoughts, uniform (R, T, 1), numbers from [0, 1), the words of the answers."""
    model, flags, wte = s.model, s.flags, s.model.wte.weight
    ends = marks(s.tok).to(wte.device)
    Q, T = len(batch.prompt), noise.size(1)
    cache = StaticCache(model.config, Q, batch.prompt.size(1) + T, wte.device, s.machine.dtype)
    h = model(batch.prompt, cache=cache, keep=batch.keep, last=1)[:, -1]            # (Q, C)
    cache, h = cache.repeat(n), h.repeat_interleave(n, 0)                           # (R, C)
    room = model.config.block_size - cache.keep.sum(1)
    thinks = torch.ones_like(room, dtype=torch.bool)
    done, steps = ~thinks, []
    for t in range(T):
        logits = model.head(h).float()
        thought = policy.draw(logits, noise[:, t], wte, flags)
        word = draw_tokens(logits.softmax(-1), uniform[:, t])[:, 0]
        thought = thought._replace(token=torch.where(thinks, thought.token, word))
        soft = thinks & ~torch.isin(thought.token, ends)
        log_p = likelihoods(policy, logits, thought, thinks, wte, flags)
        steps.append((*thought, thinks, soft, ~done, log_p))
        done = done | (thought.token == s.tok.eos) | (t + 1 >= room)
        if done.all():
            break
        thinks = soft
        x = inputs(policy, thought, soft, model, flags)[:, None]
        h = model(embeds=x, cache=cache, keep=~done[:, None])[:, -1]
    stacked = [torch.stack(parts, 1) for parts in zip(*steps)]
    return Rollouts(Thought(*stacked[:4]), *stacked[4:])


def inputs(policy, thought, soft, model, flags):
    """What is fed back (.., C): the soft token where soft (..), the leading token elsewhere."""
    mixed = policy.mixed(thought, model.wte.weight, flags)
    return torch.where(soft[..., None], mixed, model.wte(thought.token))


def likelihoods(policy, logits, thought, thinks, wte, flags):
    """(N,): that of the thought where one was drawn, log p(token) where it was a word."""
    word = logits.log_softmax(-1).gather(-1, thought.token[..., None])[..., 0]
    return torch.where(thinks, policy.log_likelihood(logits, thought, wte, flags), word)


def replay(policy, model, batch, made, n, flags):
    """Logits (N, V) at all positions that are there in the Rollouts, in one forward with gradients:
    each question is read once, then its n rollouts at all positions together."""
    cache = GrowingCache()
    h = model(batch.prompt, cache=cache, keep=batch.keep, last=1).repeat_interleave(n, 0)
    x = inputs(policy, made.thought, made.soft, model, flags)
    states = model(embeds=x, cache=cache.fork(n), keep=made.there)                  # (R, T, C)
    return model.head(torch.cat([h, states[:, :-1]], 1)[made.there]).float()


def sample(s, policy, examples, n, keys):
    """n Rollouts of each of the Examples: a Batch of the questions, the Rollouts, their texts.
    keys: integers for each; a rollout's noise depends on these, --seed and its number only."""
    with s.machine.autocast():
        batch = collate([Sequence(e.question, 0, []) for e in examples], s.tok.eos,
                        s.machine.device)
        drawn = []
        for key in keys:
            for i in range(n):
                g, T = seeded(s.flags.seed, *key, i), evaluation.limit(s)
                drawn.append((policy.noise(T, s.model, s.flags, g), torch.rand(T, 1, generator=g)))
        noise, uniform = (torch.stack(parts).to(s.machine.device) for parts in zip(*drawn))
        made = rollouts(s, policy, batch, n, noise, uniform)
    texts = []
    for tokens, there in zip(made.thought.token.tolist(), made.there.sum(1).tolist()):
        texts.append(s.tok.decode([t for t in tokens[:there] if t != s.tok.eos]))
    return batch, made, texts


def rewarded(s, policy, items, examples, chosen, n, key):
    """n Rollouts of each of the items with the numbers `chosen`, and their rewards (Q, n): 1.0
    where the answer is right. Returns a Batch, the Rollouts, the rewards. key: see sample."""
    batch, made, texts = sample(s, policy, [examples[i] for i in chosen], n,
                                [(key, i) for i in chosen])
    answers = [items[i]["answer"] for i in chosen for _ in range(n)]
    right = [float(is_correct(text, answer)) for text, answer in zip(texts, answers)]
    return batch, made, torch.tensor(right).view(-1, n)


def to_learn(batch, made, rewards, flags):
    """A Batch, its Rollouts and their rewards (Q, n) without the questions whose rewards are all
    equal: only --kl has a gradient there. At least one question stays."""
    if flags.kl:
        return batch, made, rewards
    differ = (rewards != rewards[:, :1]).any(1)                                     # (Q,)
    differ[0] |= not differ.any()
    questions = differ.to(batch.prompt.device)
    rows = questions.repeat_interleave(rewards.size(1))                             # (R,)
    thought = Thought(*(part[rows] for part in made.thought))
    made = Rollouts(thought, *(part[rows] for part in made[1:]))
    batch = batch._replace(prompt=batch.prompt[questions], keep=batch.keep[questions])
    return batch, made, rewards[differ]


def marks(tok):
    """Tokens that "### " begins with, before a word and before a number: they end thinking."""
    first = {tok.encode(COCONUT_MARK + answer)[0] for answer in ("a", "1")}
    return torch.tensor([t for t in first if tok.decode([t]).strip() == COCONUT_MARK.strip()])


# ---------------------------------------------------------------- evaluation


def thoughts_of(made):
    """Sums over Rollouts: soft_entropy, the mean entropy in nats of a rollout's soft tokens,
    one_hot, the share of those that are nearly one token, and length in positions."""
    at = made.soft & made.there                                                     # (R, T)
    n = at.sum(1).clamp(min=1)
    entropy = mixture_entropy(made.thought.indices, made.thought.weights)
    return dict(soft_entropy=((entropy * at).sum(1) / n).sum(),
                one_hot=(((entropy < ONE_HOT) & at).sum(1) / n).sum(), length=made.there.sum())


def means(machine, logged, n, passes=1):
    """{name: mean} of dicts of sums over rollouts, of all processes: over the n rollouts that were
    drawn, or for OF_UPDATES over those that were learned from. learned: the share of them. passes:
    how often each was."""
    sums = {name: sum(float(of.get(name, 0)) for of in logged) for name in LOGGED}
    found = dict(zip(LOGGED, machine.sum(*sums.values())))
    learned = found["learned"] / passes
    return {name: total / passes / learned if name in OF_UPDATES else total / n
            for name, total in (found | dict(learned=learned)).items()}


def validate(s, run, examples, optimizers, shown={}):
    """Greedy accuracy on some of the validation set; the best model so far is saved."""
    n = s.flags.eval_items
    sequences = [imitation.in_words(e) for e in examples["valid"][:n]]
    v = evaluation.evaluate(s, s.data["valid"][:n], sequences, imitation.greedy_in_words)
    run.valid(v, shown)
    if run.is_best(v):
        run.save("best.pt", optimizers)


def passes(s, policy, items, examples):
    """--draws rollouts of each item: {"Pass@k": share}, soft_entropy and one_hot."""
    n, right, summaries = s.flags.draws, [], []
    order = sorted(range(len(items)), key=lambda i: len(examples[i].question))
    for chunk in np.array_split(order, min(len(order), -(-len(order) * n // 512))):
        _, made, rewards = rewarded(s, policy, items, examples, chunk.tolist(), n, 0)
        right += rewards.sum(1).int().tolist()
        summaries.append(thoughts_of(made))
    found = {}
    for k in PASS_AT:
        if k <= n:
            found[f"Pass@{k}"] = float(np.mean([pass_at(k, n, r) for r in right]))
    found |= {name: sum(float(of[name]) for of in summaries) / (len(items) * n)
              for name in ("soft_entropy", "one_hot")}
    return found


def test_row(s, policy, items, examples, who):
    """A row of the result table: evaluation.test_row of greedy decoding in words; `columns`: Pass@k
    with the policy's thoughts, and of the same model thinking in words; how many soft tokens are
    nearly one token."""
    sequences = [imitation.in_words(e) for e in examples]
    row = evaluation.test_row(s, items, sequences, imitation.greedy_in_words, rationale=True)
    found = passes(s, policy, items, examples)
    row |= {name: found.pop(name) for name in ("soft_entropy", "one_hot")}
    in_words = found
    if s.flags.thoughts != "tokens":
        flags = argparse.Namespace(**vars(s.flags) | dict(thoughts="tokens"))
        in_words = passes(s._replace(flags=flags), policy, items, examples)
    for k in PASS_AT:
        if k <= s.flags.draws:
            found[f"Pass@{k}, words"] = in_words[f"Pass@{k}"]
    found["one-hot"] = row["one_hot"]
    return row | dict(who=who, data=s.flags.data, columns=found)


def test_rows(s, run, policy, examples, models):
    """The rows that end a Run, which logs them: {who: model} -> list of test_row."""
    rows = []
    for who, model in models.items():
        rows.append(test_row(s._replace(model=model), policy, s.data["test"], examples, who))
        run.log("test", seed=s.flags.seed, updates=run.at["done"], **rows[-1])
    return rows


def show_table(rows, flags):
    """The result of a run: a line per row."""
    print(f"\n{flags.thoughts} on {flags.data}, {rows[0]['n']} test questions, {flags.draws} "
          "rollouts of each; in %")
    titles = [*rows[0]["columns"], "entropy", "tokens", "ms, batch 1"]
    print("  ".join(["        ", "greedy", *titles]))
    for r in rows[::-1]:
        cells = [f"{100 * share:.1f}" for share in r["columns"].values()]
        cells += [f"{r['soft_entropy']:.3f}", f"{r['tokens']:.1f}",
                  f"{1000 * r['seconds_batch_1']:.1f}"]
        print("  ".join([r["who"].ljust(8), f"{100 * r['accuracy']:.1f}".rjust(6),
                         *(cell.rjust(len(title)) for cell, title in zip(cells, titles))]))
    print("greedy and words: thoughts are tokens; entropy, in nats: of the soft tokens; one-hot: "
          f"those of them with less than {ONE_HOT}")
    if flags.thoughts != "tokens" and rows[0]["one_hot"] > 0.9:
        before = f" (before: {100 * rows[-1]['one_hot']:.0f} %)" if len(rows) > 1 else ""
        print(f"the policy is nearly one-hot: {100 * rows[0]['one_hot']:.0f} % of its soft tokens "
              f"are one token, or to 99 %{before}")


def ask(s, policy, question):
    """--ask: a rollout of a question with what its soft tokens mix, and all rollouts' answers."""
    example = evaluation.asked(s, question, SPARE, COCONUT_MARK)
    _, made, texts = sample(s, policy, [example], s.flags.draws, [(0, 0)])
    said = []
    for t in range(int(made.there[0].sum())):
        token, indices, weights, _ = (part[0, t] for part in made.thought)
        words = s.tok.decode([int(token)]) if token != s.tok.eos else ""
        if made.soft[0, t]:
            parts = {}
            for i, w in zip(indices.tolist(), weights.tolist()):
                parts[i] = parts.get(i, 0) + w
            mixed = [f"{s.tok.decode([i])} {100 * w:.0f} %" for i, w in parts.items() if w > 0.05]
            words = f"[{' |'.join(mixed)}]" if len(mixed) > 1 else words
        said.append(words)
    print("".join(said))
    answers = [extract_answer(text) for text in texts]
    for found in sorted(set(answers), key=answers.count, reverse=True):
        print(f"{answers.count(found):>5} of {len(answers)}  {found or '(no answer)'}")
