"""Soft GRPO: reinforcement learning where thoughts are soft tokens, drawn at random.

A model that thinks in words draws each token from its distribution p, and a policy gradient needs
the probability of what was drawn. A soft token, a mixture of embeddings e_i, can be learned by
reinforcement too, if it is drawn from something whose density is known (--thoughts):

                drawn                          read                  log-likelihood
    tokens      i ~ p                          e_i                   ln p(i)
    ksample     i_1 .. i_K ~ p                 mean of the e_i_k     sum_k ln p(i_k)
    gumbel      g' = ln p + Gumbel noise       sum_i y_i e_i with    sum_i -u_i - exp(-u_i)
                                               y = softmax(g'/tau)   with u = g' - ln p
    gaussian    h = sum_i p_i e_i + sigma n    h                     -|h - sum_i p_i e_i|^2
                                                                     / (2 sigma^2)

(ksample: Multiplex, arXiv 2601.08808, and CoT2, 2505.23648; gumbel: SofT-GRPO, 2511.06411;
gaussian: Soft Tokens, 2509.19170.) The rest is GRPO (Shao et al. 2024, 2402.03300): G rollouts of
each question, reward r = 1 where the answer is right and 0 elsewhere, and at every position

    A = (r - mean r) / std r             over the question's rollouts
    ratio = pi(thought) / pi_old(thought)
    L = -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + beta KL(pi, start)

Read on in this order: draw, log_likelihood, grpo_loss, train; then common/policy.py.
    python soft_grpo.py                  # a CoT model first, then GRPO with ksample
    python soft_grpo.py --init CKPT      # from a model of coconut.py --method cot
"""

import numpy as np
import torch

import data_prep
from common import experiment, imitation, optim, policy, runtime, settings, tables
from common.policy import Policy, Thought, likelihoods, replay
from common.runtime import count, real
from common.sampling import (draw_noise, draw_tokens, filtered, gumbel_log_density, likeliest,
                             rms, soft_embedding)
from common.text import COCONUT_MARK, Sequence, batches

THOUGHTS = {                         # name -> what is read as a thought
    "tokens": "a drawn token: ordinary CoT",
    "ksample": "the mean of K drawn tokens",
    "gumbel": "likely tokens, weighted by softmax((ln p + Gumbel noise) / tau)",
    "gaussian": "all tokens, weighted by p, and Gaussian noise",
}


# ---------------------------------------------------------------- the method

def noise_of(T, model, flags, generator):
    """The noise (T, D) of a rollout's thoughts, on the CPU; D: top_k, C, or how many tokens."""
    if flags.thoughts == "gumbel":
        W = min(flags.top_k, model.config.vocab_size)
        return draw_noise("gumbel", (T, W), generator)
    if flags.thoughts == "gaussian":
        return torch.randn(T, model.config.n_embd, generator=generator)
    return torch.rand(T, flags.k if flags.thoughts == "ksample" else 1, generator=generator)


def draw(logits, noise, wte, flags):
    """The Thoughts (policy.Thought) of logits (B, V) and noise (B, D) of noise_of. drawn: gumbel's
    g' (B, top_k), -inf where top-p filters out; gaussian's h (B, C); else nothing, (B, 0)."""
    logits = logits / flags.temperature
    if flags.thoughts == "gumbel":
        indices, p = filtered(logits, flags.top_k, flags.top_p)
        noisy = p.log() + noise
        y = (noisy / flags.tau).softmax(-1)
        return Thought(likeliest(indices, y), indices, y, noisy)
    if flags.thoughts == "gaussian":
        p = logits.softmax(-1)
        h = p @ wte + flags.sigma * rms(wte) * noise
        weights, indices = p.topk(min(flags.top_k, p.size(-1)))          # only to be looked at
        return Thought(torch.cdist(h, wte).argmin(-1), indices, weights, h)
    indices = draw_tokens(logits.softmax(-1), noise)                     # (B, K)
    weights = torch.full_like(noise, 1 / noise.size(-1))
    return Thought(indices[:, 0], indices, weights, noise[:, :0])


def log_likelihood(logits, thought, wte, flags):
    """Log-density (N,) of Thoughts under logits (N, V), up to a constant.

    gumbel with --density: that of y, which is what the model reads. SofT-GRPO's is that of g',
    which says more than y (adding a number to g' leaves y as it is): its gradient has the same mean
    and more variance. In both, what top-k and top-p kept when g' was drawn is all there is.
    """
    logits = logits / flags.temperature
    if flags.thoughts == "gaussian":
        std, mean = flags.sigma * rms(wte), logits.softmax(-1) @ wte
        return -((thought.drawn - mean) / std).square().sum(-1) / 2 - wte.size(1) * std.log()
    log_p = logits.log_softmax(-1).gather(-1, thought.indices)           # (N, K)
    if flags.thoughts != "gumbel":
        return log_p.sum(-1)
    out = thought.drawn == -torch.inf
    log_p = log_p.masked_fill(out, -torch.inf).log_softmax(-1)
    if flags.density:
        log_y = (thought.drawn.double() / flags.tau).log_softmax(-1)
        return gumbel_log_density(log_y, log_p.double(), flags.tau).float()
    u = thought.drawn.masked_fill(out, 0) - log_p.masked_fill(out, 0)
    return (-u - (-u).exp()).masked_fill(out, 0).sum(-1)


def mixed(thought, wte, flags):
    """What is read as Thoughts (..): a soft token (.., C)."""
    if flags.thoughts == "gaussian":
        return thought.drawn
    return soft_embedding(wte, thought.indices, thought.weights)


POLICY = Policy(noise_of, draw, log_likelihood, mixed)


def advantages(rewards):
    """(r - mean) / std in each row of rewards (Q, G), a question's; 0 where all are equal."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)


def grpo_loss(model, reference, batch, made, advantage, flags):
    """The loss of Rollouts `made` of a Batch of questions: a mean over each one's positions, summed
    over the rollouts; and such sums of what is logged, {name: tensor}. reference: the model at the
    start; advantage (R,)."""
    there, thinks = made.there, made.thinks[made.there]                  # (R, T), (N,)
    thought = Thought(*(part[there] for part in made.thought))
    share = (there / there.sum(1, keepdim=True))[there]
    a = advantage[:, None].expand_as(there)[there]

    logits = replay(POLICY, model, batch, made, flags.group, flags)      # (N, V)
    log_pi = likelihoods(POLICY, logits, thought, thinks, model.wte.weight, flags)
    ratio = (log_pi - made.log_p[there]).exp()
    clipped = ratio.clamp(1 - flags.clip, 1 + flags.clip)
    with torch.no_grad():
        start = replay(POLICY, reference, batch, made, flags.group, flags).log_softmax(-1)
    log_p = logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - start)).sum(-1)                 # exact; GRPO estimates it
    loss = (share * (flags.kl * kl - torch.minimum(ratio * a, clipped * a))).sum()

    values = dict(ratio=ratio, off=(ratio - 1).abs(), clipped=clipped != ratio, kl=kl,
                  entropy=torch.special.entr(log_p.exp()).sum(-1), learned=1)    # a count
    return loss, {name: (share * x).sum().detach() for name, x in values.items()}


# ---------------------------------------------------------------- training

def train(s, examples, bar=None):
    """Update by update. s: experiment.Setup; examples: {split: Examples}; bar: the progress bar of
    --table. Returns the rows of the result table, or None if stopped."""
    flags, machine, model, training = s.flags, s.machine, s.model, examples["train"]
    first, total = flags.steps_start, flags.steps_start + flags.steps
    run = experiment.new_run(s, dict(done=0, best=-1.0, rows=None), total, bar)
    at, parameters, order = run.at, list(model.parameters()), None
    if not imitation.learn(s, run, training, first):
        return None

    # the start is kept: KL is measured from it, and what was learned
    optimizers = optim.new_optimizers(flags, model)
    if at["done"] == first:
        run.save("start.pt", optimizers)
        policy.validate(s, run, examples, optimizers)
    else:
        run.resume(optimizers)
    reference = experiment.frozen_teacher(s, f"{flags.out}/start.pt")
    model.eval()                                 # no dropout: it would be part of the ratio
    n_batches = -(-len(training) // flags.batch_size)

    while at["done"] < total:
        # data: its order is a function of seed and epoch, so resuming needs no replay
        epoch, k = divmod(at["done"] - first, n_batches)
        if order is None or k == 0:
            lengths = np.stack([training.lengths.question, training.lengths.answer], 1)
            order = batches(lengths, flags.batch_size, runtime.generator(flags.seed, 1, epoch))

        # rollouts of the policy as it is, and their rewards
        drawn, logged, n = [], [], len(order[k]) * flags.group
        for chosen in machine.share(order[k].tolist(), flags.accumulate):
            batch, made, rewards = policy.rewarded(s, POLICY, s.data["train"], training, chosen,
                                                   flags.group, at["done"])
            logged.append(policy.thoughts_of(made) | dict(reward=rewards.sum()))
            batch, made, rewards = policy.to_learn(batch, made, rewards, flags)
            drawn.append((batch, made, advantages(rewards).flatten().to(machine.device)))

        # forward, backward, step: once (on-policy: all ratios are 1), or --passes times
        optim.set_rate(optimizers, optim.trapezoid(at["done"] - first, flags.steps, flags.lr,
                                                   decay=flags.lr_decay))
        for _ in range(flags.passes):
            loss = torch.zeros((), device=machine.device)
            for batch, made, advantage in drawn:
                with machine.autocast():
                    part, found = grpo_loss(model, reference, batch, made, advantage, flags)
                (part / n).backward()
                loss += part.detach() / n
                logged.append(found)
            loss = machine.sum_gradients(parameters, loss)
            optim.step(optimizers, parameters, flags.grad_clip)
        end = at["done"] + 1 == total
        means = policy.means(machine, logged, n, flags.passes)
        n_read = round(flags.group * means["length"])                    # of all its rollouts
        run.step(loss, [Sequence(training[i].question, n_read, []) for i in order[k]], end)
        run.log("rl", update=at["done"], **means)

        # validation: the best model is kept
        if (at["done"] - first) % (flags.eval_every or n_batches) == 0 or end:
            policy.validate(s, run, examples, optimizers, means)
        if run.pause(optimizers, flags.save_every, end):
            return None

    # the rows of the table: the best model, and the start, which has a row of its own in --table
    experiment.load_best(s)
    models = dict(after=model, before=reference) if bar is None else dict(after=model)
    at["rows"] = policy.test_rows(s, run, POLICY, examples["test"], models)
    run.save("last.pt", optimizers)
    run.close()
    return at["rows"]


# ---------------------------------------------------------------- settings

RECIPES = {"prosqa-mini": dict(data="prosqa-mini")}
OF = dict(k="ksample", tau="gumbel", top_k="gumbel", top_p="gumbel", density="gumbel",
          sigma="gaussian")          # setting -> the thoughts that it is for
ROWS = {name: dict(thoughts=name) for name in THOUGHTS}          # of --table: what each changes
ROWS["gumbel-density"] = dict(thoughts="gumbel", density=True)
SETTINGS = settings.together({
    settings.MOST: [
        ("thoughts", "ksample", THOUGHTS, "what is read as a thought"),
        ("group", 8, count(2), "rollouts of each question, G"),
        ("steps", 200, count(0), "updates of GRPO"),
        ("steps_start", None, count(0), "CoT updates before (default: 1200; 0 with --init CKPT)")],
    "method": [
        ("k", 3, count(1), "ksample: tokens in a soft token"),
        ("tau", 0.1, real(1e-3), "gumbel: towards 0 a mixture becomes one token"),
        ("top_k", 5, count(1), "gumbel: most tokens in a soft token"),
        ("top_p", 0.95, real(1e-6, 1), "gumbel: the fewest of them with this probability"),
        ("density", False, bool, "gumbel: ratio of the densities of y, not of the noise"),
        ("sigma", 0.33, real(1e-6), "gaussian: noise, times the RMS of the embeddings' entries"),
        ("temperature", 1.0, real(1e-6), "divides the logits of thoughts"),
        ("clip", 0.2, real(), "eps: ratios beyond 1 - eps .. 1 + eps gain nothing"),
        ("kl", 0.0, real(), "beta: weight of the KL divergence from the start"),
        ("passes", 1, count(1), "updates from the same rollouts"),
        ("lr_decay", 0.5, real(0, 1), "last share of the updates over which the rate falls to 0")],
    settings.FILES: [
        ("draws", 32, count(1, 10 ** 5), "test: rollouts of each question, for Pass@k"),
        ("rows", None, str, f"--table: which of {', '.join(ROWS)} (default: all)")],
}, RECIPES, settings.PLAIN)
DEFAULTS = settings.defaults(
    SETTINGS, data="prosqa-mini", block_size=256, tokenizer="compact-is-a", optimizer="adamw",
    lr=3e-4, weight_decay=0.0, beta2=0.999, eval_every=50, eval_items=300, save_every=50)


def parse_flags(argv=None):
    """The settings of a run, as a Namespace, and those that were typed, as a dict."""
    flags, typed, error = settings.parse(argv, "soft_grpo.py", __doc__, SETTINGS, DEFAULTS, RECIPES,
                                         ("rows", ROWS, ROWS))
    name = "table" if flags.table else f"{flags.thoughts}-{flags.seed}"
    flags.out = settings.out_folder(flags, f"grpo-{name}")
    if flags.table and typed.keys() & {"thoughts", "density"}:
        error("--table chooses --thoughts and --density itself: name its rows with --rows")
    settings.refuse_of_others(flags, typed, error, "thoughts", OF)
    return flags, typed


# ---------------------------------------------------------------- main

def run(flags, typed, bar=None):
    """One training run, from its start or where its folder left it. Returns what train returns."""
    flags, resumed = experiment.open_run(flags, typed, SETTINGS, DEFAULTS)
    if resumed and resumed["at"]["rows"] is not None:
        return resumed["at"]["rows"]
    s = experiment.start(flags, resumed, data_prep.load, COCONUT_MARK)
    s, examples = policy.prepared(experiment.place(s))
    experiment.describe(s, bar)
    return train(s, examples, bar)


def evaluate_checkpoint(flags, changed):
    """--eval-only: the row of a checkpoint, or with --ask what it makes of a question."""
    s = experiment.place(experiment.open_checkpoint(flags.eval_only, SETTINGS, DEFAULTS, changed))
    if flags.ask is not None:
        return policy.ask(s, POLICY, flags.ask)
    items = experiment.test_sets(s, data_prep.load)[s.flags.data]
    row = policy.test_row(s, POLICY, items, policy.examples_of(s, "test", items), "after")
    policy.show_table([row], s.flags)


def train_table(flags):
    """--table: every choice of thoughts for every seed, all choices from the same starts."""
    data = experiment.load_first(flags, data_prep.load)
    variants = dict(start=dict(steps=0, thoughts="tokens"))
    for name in flags.rows:
        variants[name] = ROWS[name] | dict(init="{out}/start-{seed}/best.pt", steps_start=0)
    return tables.train_and_write("soft_grpo.py", flags, variants, 3, flags.steps, run, None, (),
                                  data_prep.write_json, data_prep.floors(data["test"]))


def main(argv=None):
    flags, typed = parse_flags(argv)
    return experiment.main("soft_grpo.py", flags, typed, run, policy.show_table,
                           evaluate_checkpoint, train_table,
                           ("thoughts", "draws", "temperature", *OF))


if __name__ == "__main__":
    runtime.run_main(main)
