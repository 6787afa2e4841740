"""The stages of a curriculum: their settings, recipes, lengths, mixing, and what is reported of
each."""

import numpy as np

from common.evaluation import distance_cells, print_cut, print_pairs
from common.runtime import UserError, count, real
from common.settings import AS_GPT2

SETTINGS = {
    "schedule": [
        ("steps_stage_0", 600, count(0), "updates of stage 0 (all in words)"),
        ("steps_per_stage", 350, count(0), "updates of each stage between"),
        ("steps_last", 650, count(0), "updates of the last stage"),
        ("epochs_stage_0", None, real(), "the same in passes over the training data"),
        ("epochs_per_stage", None, real(), "the same in passes over the training data"),
        ("epochs_last", None, real(), "the same in passes over the training data"),
        ("warmup", 20, count(0), "updates of linear warm-up in each stage"),
        ("lr_decay", 0.4, real(0, 1),
         "last share of each stage over which the rate falls to 0 (0: constant)"),
        ("again", True, bool, "a stage that is not learned is trained again (not in the paper, and "
                              "not with --table)"),
        ("reset_optimizer", False, bool, "new optimizer at each stage"),
        ("uniform_prob", 0.15, real(0, 1),
         "share of items trained at a random stage (stage mixing, section 5)"),
        ("stage_mix", "uniform", ("uniform", "linear"),
         "uniform: that stage is any; linear: stage i with weight i + 1"),
        ("drop_last_steps", False, bool, "one more stage: all language steps go, thoughts stay at "
                                         "stage-max * c (the paper on GSM8k)"),
        ("plain_stage_0", False, bool, "stage 0 is CoT: no <bot> <eot> (the paper on GSM8k), no "
                                       "mixing"),
    ]}
PAPER = AS_GPT2 | dict(              # section 4.2 of Coconut and the authors' configuration files
    block_size=1024, dropout=0.1, batch_size=128, optimizer="adamw", lr=1e-4, weight_decay=0.01,
    beta2=0.999, warmup=0, lr_decay=0.0, grad_clip=0.0, uniform_prob=0.0, again=False,
    reset_optimizer=True, eval_every=0, eval_items=10**9, max_new=128)
GSM8K = PAPER | dict(
    data="gsm8k", stage_max=3, c=2, epochs_stage_0=6, epochs_per_stage=3, epochs_last=35,
    drop_last_steps=True, plain_stage_0=True)
CHAINS_MIXED = dict(data="chains-mixed", lr=3e-3, pos_std=0.01)      # two layers from scratch
PROSQA_MINI = dict(                  # uniform_prob 0.3: three of nine seeds fail (RESULTS.md, 3)
    data="prosqa-mini", block_size=256, tokenizer="compact-is-a", c=2, plain_stage_0=True,
    uniform_prob=0.8, lr=2e-3, warmup=150, lr_decay=0.2, steps_stage_0=1500, steps_per_stage=500,
    steps_last=1200, eval_every=300, pos_std=0.1, again=False)
LEARNED, LAST_LEARNED = 0.9, 0.98    # accuracy in validation from which on a stage is learned
STUCK = 0.5                          # a stage, from the third on, below this misses the one before
MOST_AGAIN = 5                       # times in a run that a stage, or a whole run, comes again
EITHER = tuple((f"steps_{part}", f"epochs_{part}") for part in ("stage_0", "per_stage", "last"))


def n_updates(steps, epochs, n_batches, least=1):
    """--steps, or --epochs of n_batches updates each, where they are given."""
    return steps if epochs is None else max(least, round(epochs * n_batches))


def stages(flags, n_batches):
    """The list of (stage, updates). n_batches: updates in a pass over the training data."""
    def updates(part):
        steps, epochs = (getattr(flags, f"{unit}_{part}") for unit in ("steps", "epochs"))
        return n_updates(steps, epochs, n_batches, least=0)
    last = flags.stage_max + flags.drop_last_steps
    plan = [(s, updates("stage_0" if s == 0 else "per_stage")) for s in range(last)]
    if updates("last") == 0:
        raise UserError("--steps-last 0 or --epochs-last near 0 leaves the last stage untrained; "
                        "raise it, or lower --stage-max.")
    return plan + [(last, updates("last"))]


def at_once(plan, stage):
    """A plan of one stage only, with as many updates."""
    return [(stage, sum(n for _, n in plan))]


def by_tokens(plan, tokens, longest):
    """A plan whose stages are numbers of tokens: 0, then `tokens` more each time over the updates
    between, then `longest`."""
    removed = range(tokens, longest, tokens)
    ends = np.linspace(0, sum(n for _, n in plan[1:-1]), len(removed) + 1).astype(int)
    return [plan[0], *zip(removed, np.diff(ends).tolist()), (longest, plan[-1][1])]


def mixed(stage, n_steps, flags, rng):
    """The stage that one item is trained at: mostly `stage`, with probability --uniform-prob a
    random one of those that its number of steps allows (section 5 of Coconut)."""
    if rng.random() >= flags.uniform_prob:
        return stage
    n = min(n_steps, flags.stage_max) + 1
    if flags.stage_mix == "uniform":
        return int(rng.integers(n))
    return int(rng.choice(n, p=np.arange(1, n + 1) / sum(range(n + 1))))


def alike(parts, saving=0.1):
    """Cut each list of Sequences in two where that leaves the least padding, unless it saves less
    than this share of the positions. Stage mixing brings long and short language into one update:

        q q q <bot> o o o <eot> a a
        q q q <bot> o o o <eot> a a
        ................................................. cut here, nothing above is padded
        q q q <bot> o - - <eot> s s s s s s s s s s s a a
    """
    for rows in parts:
        rows = sorted(rows, key=lambda q: len(q.language))
        size = np.array([(len(q.prompt), q.n_latent, len(q.language)) for q in rows])    # (n, 3)
        before = np.arange(1, len(rows) + 1)                        # rows of the first part
        first = np.maximum.accumulate(size).sum(1)                  # its positions per row
        rest = np.maximum.accumulate(size[::-1])[::-1].sum(1)
        area = first * before
        area[:-1] += (rest * before[::-1])[1:]
        cut = before[area.argmin()]
        if area.min() > (1 - saving) * area[-1]:
            cut = len(rows)
        yield from (part for part in (rows[:cut], rows[cut:]) if part)


def epoch_of(at, n_batches):
    """(epoch, k): the next update reads the k-th batch of that pass over the training data. A stage
    that is trained again reads in another order."""
    epoch, k = divmod(at["update"], n_batches)
    return epoch + 10 ** 6 * at.get("backs", 0), k


def again(run, plan, optimizers):
    """Was the stage not learned? Then prepare to train it again, or together with the one before
    it, and return True.

    Some seeds are slow: they need a stage once more. Others are stuck: a model can learn stage s
    without the use of its last thought, as what that thought should hold it may work out later, in
    the pass that needs it. Only stage s + 1 fails then, which builds on the thought, and it stays
    failed; more of stage s helps (RESULTS.md, "Why a seed fails").
    """
    at, part = run.at, run.at["part"]
    enough = LAST_LEARNED if part == len(plan) - 1 else LEARNED
    valid = at.get("valid", 1.0)
    if len(plan) == 1 or valid >= enough or at.get("backs", 0) == MOST_AGAIN:
        return False
    first = part - 1 if part >= 2 and valid < STUCK else part
    run.say(f"stage {plan[part][0]} is not learned ({100 * valid:.1f} % in validation): stage "
            f"{plan[first][0]} again (--no-again: never)")
    at["backs"] = at.get("backs", 0) + 1
    at["part"], at["update"] = first, 0
    del at["rows"][first:]
    run.lengthen(sum(updates for _, updates in plan[first:part + 1]))
    run.log("again", stage=plan[first][0], update=at["done"])
    run.save("last.pt", optimizers)
    return True


def once_more(run, updates):
    """Is the model of a run without stages not learned? Then prepare for as many updates again."""
    at = run.at
    if at["valid"] >= LAST_LEARNED or at.get("backs", 0) == MOST_AGAIN:
        return
    run.say(f"not learned after {at['done']:,} updates ({100 * at['valid']:.1f} % in validation): "
            f"{updates:,} again (--no-again: never)")
    at["backs"] = at.get("backs", 0) + 1
    run.lengthen(updates)
    run.log("again", update=at["done"])


def stage_of(at, plan, path):
    """The stage that a checkpoint is evaluated at: the last one of the plan, or if its run has not
    come so far the one it was in, which is said."""
    part = max(0, at["part"] - (at["update"] == 0))      # between stages: the one that is done
    if part >= min(at.get("parts", 0), len(plan)) - 1:
        return plan[-1][0]
    print(f"{path}: its run is at stage {plan[part][0]} of {plan[-1][0]}, and so is the evaluation")
    return plan[part][0]


def finish_stage(run, s, row, stage, last):
    """A stage is done: log its row of the table and say how it went; after the last one, the
    result of the run. run: run.Run; s: experiment.Setup."""
    at = run.at
    at["rows"].append(row)
    run.log("stage", **row)
    norms = ", ".join(f"{norm:.2f}" for norm in row["thought_norms"]) or "(none)"
    embeddings = s.model.wte.weight.norm(dim=1).mean().item()
    run.say(f"stage {stage} is done; it writes {row['sample']!r}; norm of token embeddings "
            f"{embeddings:.2f}, of thoughts {norms}")
    if last:
        run.log("final", method=s.flags.method, data=s.flags.data, stage=stage,
                n_latent=row["n_latent"], test_accuracy=row["accuracy"], test_n=row["n"],
                tokens=row["tokens"], updates=at["done"], seed=s.flags.seed, seconds=run.seconds())
    at["part"], at["update"] = at["part"] + 1, 0


def print_stages(rows, flags):
    """The result of a run: a line per stage."""
    line = "{:>5} {:>9} {:>14} {:>10} {:>8} {:>14} {:>14} {:>11} {:>7}".format
    print(f"\n{flags.method} on {flags.data}, {rows[0]['n']} test questions")
    print(line("stage", "thoughts", "tokens of steps", "accuracy", "tokens", "ms, batch 1",
               "ms, batched", "dist. item", "across"))
    for r in rows:
        print(line(r["stage"], r["n_latent"], f"{r['step_tokens']:.1f}",
                   f"{100 * r['accuracy']:.1f} %", f"{r['tokens']:.1f}",
                   f"{1000 * r['seconds_batch_1']:.1f}", f"{1000 * r['seconds']:.2f}",
                   *distance_cells(r)))
    print_pairs({"": rows[-1]})
    print_cut(rows)
