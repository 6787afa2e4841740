"""soft_grpo.py, common/policy.py and common/imitation.py: densities against integration and
finite differences, ratios, rollouts one by one, advantages and Pass@k by hand, whole runs."""

import math
import os
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

import soft_grpo
from common import policy, runtime, sampling
from common.run import Run
from common.text import Example
from gpt2 import GrowingCache, StaticCache
from test_runs import metrics, outcome, run as run_coconut, same
from tiny import setup_of, tiny_model

CHOICES = {**soft_grpo.ROWS, "gumbel-tau-1": dict(thoughts="gumbel", density=True, tau=1.0),
           "ksample-hot": dict(thoughts="ksample", temperature=2.0)}
SMALL = ("--device cpu --dtype float32 --n-layer 1 --n-head 2 --n-embd 16 --batch-size 4 --group 3 "
         "--steps-start 5 --steps 6 --eval-every 3 --eval-items 4 --max-new 12 --save-every 2 "
         "--draws 2 --block-size 128 --lr 1e-2")


def flags_of(name="tokens", **changed):
    return SimpleNamespace(**soft_grpo.DEFAULTS | dict(max_new=14, group=3, seed=3)
                           | CHOICES[name] | changed)


class Words:
    """A tokenizer of the tiny vocabulary: token 7 is "###"."""
    eos, bot, eot, pause = 62, 64, 65, 66

    def encode(self, text):
        return [7, 1] if text.startswith("###") else [1]

    def decode(self, ids):
        return " ".join("###" if i == 7 else str(i) for i in ids)


QUESTIONS = [Example([5, 9, 2], [], []), Example([44, 3, 17, 8, 25, 31], [], []),
             Example([1, 30], [], [])]
KEYS = [(4, 0), (4, 1), (4, 2)]


def tiny_setup(machine, flags, model=None):
    """A Setup of the tiny model. "###" and eos are made likely, so that rollouts end by both."""
    model = model or tiny_model()
    with torch.no_grad():
        model.ln_f.bias[0] = 3.0
        model.wte.weight[:, 0] = 0.0
        model.wte.weight[[7, 62], 0] = 0.8
    return setup_of(model, Words(), machine, flags)


def drawn_of(name, machine, **changed):
    s = tiny_setup(machine, flags_of(name, **changed))
    return s, *policy.sample(s, soft_grpo.POLICY, QUESTIONS, 3, KEYS)


# ---------------------------------------------------------------- densities

def test_ksample_of_one_is_tokens(machine):
    """The same tokens, likelihoods and inputs, to the bit."""
    _, _, one, texts = drawn_of("ksample", machine, k=1)
    _, _, tokens, expected = drawn_of("tokens", machine)
    assert texts == expected and one.there.sum() > 20
    for a, b in zip((*one.thought, *one[1:]), (*tokens.thought, *tokens[1:])):
        assert torch.equal(a, b)


def some(name, N=4, V=6, C=5, seed=0, **changed):
    """Logits (N, V), embeddings (V, C) and drawn Thoughts, float64."""
    flags = flags_of(name, top_k=4, top_p=1.0, **changed)
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=g, dtype=torch.float64)
    wte = torch.randn(V, C, generator=g, dtype=torch.float64)
    shape = SimpleNamespace(config=SimpleNamespace(vocab_size=V, n_embd=C))
    noise = soft_grpo.noise_of(N, shape, flags, g).double()
    return logits, wte, soft_grpo.draw(logits, noise, wte, flags), flags


@pytest.mark.parametrize("name", CHOICES)
def test_gradient_of_the_likelihood(name, monkeypatch):
    """Against central differences, in logits and embeddings (through sigma there is none)."""
    logits, wte, thought, flags = some(name)
    monkeypatch.setattr(soft_grpo, "rms", lambda _: torch.tensor(0.9))

    def total(logits, wte):
        return soft_grpo.log_likelihood(logits, thought, wte, flags).double().sum()

    a, b = logits.clone().requires_grad_(), wte.clone().requires_grad_()
    total(a, b).backward()
    eps = 1e-5 if not flags.density else 1e-2      # the exact density is returned in float32
    for x, gradient in ((logits, a.grad), (wte, b.grad)):
        if gradient is None:
            assert x is wte and flags.thoughts != "gaussian"
            continue
        for i in range(x.numel()):
            step = torch.zeros_like(x).view(-1)
            step[i] = eps
            step = step.view_as(x)
            up, down = ((total(logits + sign * step, wte) if x is logits else
                         total(logits, wte + sign * step)) for sign in (1, -1))
            assert gradient.view(-1)[i].item() == pytest.approx(((up - down) / 2 / eps).item(),
                                                                rel=1e-2, abs=2e-3)
    assert a.grad.abs().max() > 0.1


def test_gumbel_noise_density_integrates_to_one():
    """exp(log-likelihood) of g' over two coordinates, whatever p; and the share of the g' whose
    first is larger is p_1."""
    p = torch.tensor([0.8, 0.2], dtype=torch.float64)
    grid = torch.linspace(-8, 25, 700, dtype=torch.float64)
    noisy = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).view(-1, 2)
    indices = torch.tensor([0, 1]).expand_as(noisy)
    thought = policy.Thought(indices[:, 0], indices, noisy, noisy)
    flags = flags_of("gumbel")
    found = soft_grpo.log_likelihood(p.log().expand(len(noisy), 2), thought, None, flags)
    mass = found.exp() * (grid[1] - grid[0]) ** 2
    assert mass.sum().item() == pytest.approx(1, abs=1e-3)
    assert mass[noisy[:, 0] > noisy[:, 1]].sum().item() == pytest.approx(0.8, abs=0.02)


def test_gumbel_density_is_that_of_y():
    """--density: the log-likelihood of g' + c, which reads as the same y, is the same; SofT-GRPO's
    is not. And it is gumbel_log_density, which test_soft_thinking.py integrates."""
    logits, wte, thought, flags = some("gumbel-density", tau=0.5)
    moved = thought._replace(drawn=thought.drawn + 1.7)
    own, other = (soft_grpo.log_likelihood(logits, t, wte, flags) for t in (thought, moved))
    assert torch.allclose(own, other, atol=1e-5)
    p = logits.gather(1, thought.indices).softmax(1)
    density = sampling.gumbel_log_density(thought.weights.log(), p.log(), 0.5)
    assert torch.allclose(own.double(), density, atol=1e-5)
    flags.tau = 0.001                            # weights that underflow, also in float64
    small = soft_grpo.log_likelihood(logits, moved._replace(drawn=40 * thought.drawn), wte, flags)
    assert torch.isfinite(small).all()
    flags.density = False
    own, other = (soft_grpo.log_likelihood(logits, t, wte, flags) for t in (thought, moved))
    assert ((own - other).abs() > 0.1).all()


def test_gumbel_density_has_the_smaller_gradients():
    """The gradients of the two log-likelihoods have the same mean over the noise, 0, and that of
    y's is the conditional mean of the other's: less variance, component by component."""
    logits = torch.tensor([[1.0, 0.3, -0.5]], dtype=torch.float64)
    found = {}
    for density in (False, True):
        flags = flags_of("gumbel", density=density, top_p=1.0, top_k=3)
        g = torch.Generator().manual_seed(0)
        noise = sampling.draw_noise("gumbel", (20000, 3), g).double()
        many = logits.expand(20000, 3).clone().requires_grad_()
        thought = soft_grpo.draw(many.detach(), noise, torch.zeros(3, 2), flags)
        soft_grpo.log_likelihood(many, thought, None, flags).sum().backward()
        found[density] = many.grad
    for gradient in found.values():
        error = gradient.std(0) / 20000 ** 0.5
        assert (gradient.mean(0).abs() < 5 * error).all()
    assert (found[True].var(0) < 0.9 * found[False].var(0)).all()


def test_top_p_leaves_out():
    """What is filtered out has no weight and no part in the likelihood; one token left: no
    gradient."""
    logits = torch.tensor([[4.0, 3.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    for density in (False, True):
        flags = flags_of("gumbel", density=density, top_p=0.9, top_k=4, tau=0.5)
        noise = torch.tensor([[0.3, -0.2, 50.0, 50.0]], dtype=torch.float64)
        thought = soft_grpo.draw(logits.detach(), noise, None, flags)
        assert thought.weights[0, 2:].tolist() == [0, 0] and thought.weights[0, 1] > 0
        found = soft_grpo.log_likelihood(logits, thought, None, flags)
        gradient, = torch.autograd.grad(found.sum(), logits)
        assert gradient[0, 2:].tolist() == [0, 0] and gradient[0, 0].abs() > 0.01
        flags.top_p = 0.5
        thought = soft_grpo.draw(logits.detach(), noise, None, flags)
        found = soft_grpo.log_likelihood(logits, thought, None, flags)
        gradient, = torch.autograd.grad(found.sum(), logits)
        assert not gradient.any() and torch.isfinite(found).all()


def test_gaussian_is_a_normal_density():
    """Up to a constant: torch's, sigma = 0.33 RMS of the embeddings' entries."""
    logits, wte, thought, flags = some("gaussian")
    normal = torch.distributions.Normal(logits.softmax(1) @ wte,
                                        0.33 * (wte ** 2).mean() ** 0.5)
    expected = normal.log_prob(thought.drawn).sum(1) + wte.size(1) * math.log(2 * math.pi) / 2
    assert torch.allclose(soft_grpo.log_likelihood(logits, thought, wte, flags), expected)


def test_draw_tokens_follows_p():
    """Chi-square of 60,000 draws, two of each row, below what chance passes once in 10,000; the two
    are independent."""
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    g = torch.Generator().manual_seed(1)
    found = sampling.draw_tokens(p.expand(30000, 5), torch.rand(30000, 2, generator=g))
    counts, n = torch.bincount(found.flatten(), minlength=5).double(), 60000
    assert counts[1] == 0
    kept = p > 0
    assert ((counts - n * p) ** 2 / (n * p))[kept].sum() < 21.1          # 3 degrees of freedom
    both = ((found[:, 0] == 0) & (found[:, 1] == 0)).float().mean()
    assert both == pytest.approx(0.25, abs=0.015)


@pytest.mark.parametrize("indices, weights, expected", [
    ([3], [1.0], 0.0), ([3, 3, 3], [1 / 3] * 3, 0.0), ([1, 2], [0.5, 0.5], math.log(2)),
    ([1, 2, 1], [1 / 3] * 3, math.log(3) - 2 / 3 * math.log(2)), ([1, 2], [1.0, 0.0], 0.0)])
def test_mixture_entropy(indices, weights, expected):
    found = sampling.mixture_entropy(torch.tensor([indices]), torch.tensor([weights]))
    assert found.item() == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- rollouts

@pytest.mark.parametrize("name", CHOICES)
def test_ratio_is_one_before_the_first_update(name, machine):
    """Decoding step by step with a cache, and one forward over all positions, agree; the loss is
    then minus the mean advantage, and its gradient is not zero."""
    s, batch, made, _ = drawn_of(name, machine)
    a = torch.linspace(-1, 1, 9)
    loss, found = soft_grpo.grpo_loss(s.model, s.model, batch, made, a, s.flags)
    assert float(found["off"]) / 9 < 2e-3 if "gauss" in name else float(found["off"]) / 9 < 1e-4
    assert found["ratio"].item() == pytest.approx(9, abs=1e-3)
    assert found["clipped"] == 0 and abs(found["kl"]) < 1e-4
    assert loss.item() == pytest.approx(0, abs=1e-3)
    loss.backward()
    assert s.model.wte.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("name", CHOICES)
def test_rollouts_one_by_one(name, machine):
    """Batched rollouts are those of each question by itself, under the same noise."""
    s, _, made, texts = drawn_of(name, machine)
    assert name == "gaussian" or not made.there.all()             # of several lengths
    for i, (question, key) in enumerate(zip(QUESTIONS, KEYS)):
        _, one, said = policy.sample(s, soft_grpo.POLICY, [question], 3, [key])
        assert said == texts[3 * i:3 * i + 3]
        T = one.there.size(1)
        mine = made.there[3 * i:3 * i + 3]
        assert torch.equal(one.there, mine[:, :T]) and not mine[:, T:].any()
        old = made.log_p[3 * i:3 * i + 3, :T]
        assert torch.allclose(one.log_p[one.there], old[one.there], atol=1e-4)


def by_hand(s, question, thoughts):
    """The states that predict each position of one rollout, without a cache: inputs (T, C)."""
    x = torch.cat([s.model.wte(torch.tensor(question)), thoughts])[None]
    return s.model(embeds=x)[0, len(question) - 1:-1]


@pytest.mark.parametrize("name", ("tokens", "ksample", "gumbel", "gaussian"))
def test_replay_is_a_plain_forward(name, machine):
    """What is read: the mixture while it thinks, "###" as itself, the answer's tokens."""
    s, batch, made, _ = drawn_of(name, machine)
    logits = soft_grpo.replay(soft_grpo.POLICY, s.model, batch, made, 3, s.flags)
    expected, ended = [], 0
    for r in range(9):
        T, read = int(made.there[r].sum()), []
        for t in range(T):
            token, indices, weights, h = (part[r, t] for part in made.thought)
            before = 7 in made.thought.token[r, :t]
            if before or token == 7:
                assert not made.soft[r, t] and bool(made.thinks[r, t]) == (not before)
                read.append(s.model.wte.weight[token])
                ended += bool(token == 7)
            else:
                assert made.soft[r, t]
                mixture = weights @ s.model.wte.weight[indices]
                read.append(h if name == "gaussian" else mixture)
        states = by_hand(s, QUESTIONS[r // 3].question, torch.stack(read))
        expected.append(s.model.head(states))
    assert ended
    assert torch.allclose(logits, torch.cat(expected), atol=1e-4)


def test_a_rollout_ends_at_eos_or_where_room_ends(machine):
    model = tiny_model(n_positions=8)
    s = tiny_setup(machine, flags_of("tokens"), model)
    _, made, texts = policy.sample(s, soft_grpo.POLICY, QUESTIONS, 3, KEYS)
    assert made.there.sum(1).tolist()[3:6] == [2, 2, 2] or made.there[3:6].sum(1).max() <= 2
    s, _, made, texts = drawn_of("tokens", machine)
    for tokens, there, text in zip(made.thought.token, made.there, texts):
        said = tokens[there].tolist()
        assert 62 not in said[:-1] and "62" not in text.split()
        assert said[-1] == 62 or len(said) == 14


def test_growing_cache_repeat(model):
    """Rows n times in a row, as StaticCache has them; gradients of all copies add up."""
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    keep = torch.tensor([[False, True, True], [True, True, True]])
    cache, fixed = GrowingCache(), StaticCache(model.config, 2, 8, "cpu", torch.float32)
    model(ids, cache=cache, keep=keep)
    model(ids, cache=fixed, keep=keep)
    new = torch.arange(10, 16)[:, None]
    found = model(new, cache=cache.fork(3))
    assert torch.allclose(found, model(new, cache=fixed.repeat(3)), atol=1e-5)
    assert cache.length == 3
    alone = GrowingCache()
    model(ids[:1, 1:], cache=alone)
    assert torch.allclose(found[1], model(new[1:2], cache=alone)[0], atol=1e-5)


# ---------------------------------------------------------------- GRPO by hand

def test_advantages_by_hand():
    found = soft_grpo.advantages(torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1],
                                               [1, 0, 0, 0]]))
    assert torch.allclose(found[0], torch.tensor([1, -1, -1, 1]) * 0.75 ** 0.5, atol=1e-5)
    assert torch.equal(found[1:3], torch.zeros(2, 4))
    assert torch.allclose(found[3], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-5)


def test_questions_with_equal_rewards_can_be_left_out(machine):
    """The gradient of those that are left is that of all; with --kl all are kept."""
    s, batch, made, _ = drawn_of("ksample", machine)
    rewards, found = torch.tensor([[1.0, 1, 1], [0, 1, 0], [0, 0, 0]]), []
    few = policy.to_learn(batch, made, rewards, s.flags)
    s.flags.kl = 0.1
    assert policy.to_learn(batch, made, rewards, s.flags)[2] is rewards
    s.flags.kl = 0.0
    assert few[2].tolist() == [[0, 1, 0]] and few[1].there.size(0) == 3
    for batch, made, rewards in ((batch, made, rewards), few):
        a = soft_grpo.advantages(rewards).flatten()
        loss, logged = soft_grpo.grpo_loss(s.model, s.model, batch, made, a, s.flags)
        s.model.zero_grad()
        loss.backward()
        found.append(s.model.wte.weight.grad)
    assert torch.allclose(*found, atol=1e-5) and found[0].abs().max() > 1e-2
    assert logged["learned"].item() == pytest.approx(3)
    assert len(policy.to_learn(batch, made, torch.ones(1, 3), s.flags)[2]) == 1


def test_groups_with_equal_rewards_teach_nothing(machine):
    s, batch, made, _ = drawn_of("ksample", machine)
    loss, _ = soft_grpo.grpo_loss(s.model, s.model, batch, made, torch.zeros(9), s.flags)
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in s.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("a, shift, gains", [(1, 0.5, 1.2), (1, -0.5, math.exp(-0.5)),
                                             (-1, 0.5, -math.exp(0.5)), (-1, -0.5, -0.8)])
def test_clip(machine, a, shift, gains):
    """min(r A, clip(r) A) where all ratios are exp(shift); where it is the clipped one, no
    gradient."""
    s, batch, made, _ = drawn_of("tokens", machine)
    old = made._replace(log_p=made.log_p - shift)
    loss, found = soft_grpo.grpo_loss(s.model, s.model, batch, old, torch.full((9,), float(a)),
                                      s.flags)
    assert loss.item() / 9 == pytest.approx(-gains, abs=1e-3)
    assert found["clipped"].item() == pytest.approx(9, abs=1e-4)
    loss.backward()
    assert bool(s.model.wte.weight.grad.abs().max() > 1e-4) == (abs(gains) not in (1.2, 0.8))


def test_kl_from_the_start(machine):
    """The mean over positions of KL between next-token distributions, and --kl adds it."""
    s, batch, made, _ = drawn_of("tokens", machine)
    start = tiny_setup(machine, s.flags, tiny_model(seed=1)).model
    loss, found = soft_grpo.grpo_loss(s.model, start, batch, made, torch.zeros(9), s.flags)
    p, q = (soft_grpo.replay(soft_grpo.POLICY, m, batch, made, 3, s.flags).softmax(-1)
            for m in (s.model, start))
    kl = (p * (p / q).log()).sum(-1)
    rows = made.there.sum(1).tolist()
    expected = sum(part.mean() for part in kl.split(rows))
    assert found["kl"].item() == pytest.approx(expected.item(), rel=1e-4) and expected > 1
    s.flags.kl = 0.5
    loss, _ = soft_grpo.grpo_loss(s.model, start, batch, made, torch.zeros(9), s.flags)
    assert loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-4)


def test_pass_at_by_hand():
    """Of 4 rollouts 1 is right: two of them have it in 3 of 6 pairs."""
    assert sampling.pass_at(2, 4, 1) == pytest.approx(3 / 6)
    assert sampling.pass_at(1, 4, 3) == pytest.approx(3 / 4)
    assert sampling.pass_at(3, 4, 2) == 1 and sampling.pass_at(4, 4, 0) == 0


def test_many_rollouts_of_few_questions(machine, monkeypatch):
    """600 of each of 2: more chunks of 512 than questions would leave some without any."""
    s = tiny_setup(machine, flags_of("tokens", draws=600))
    asked = []

    def rewarded(s, policy, items, examples, chunk, n, key):
        asked.append(chunk)
        return None, None, torch.ones(len(chunk), n)

    monkeypatch.setattr(policy, "rewarded", rewarded)
    monkeypatch.setattr(policy, "thoughts_of", lambda made: dict(soft_entropy=0, one_hot=0))
    found = policy.passes(s, soft_grpo.POLICY, QUESTIONS[:2], QUESTIONS[:2])
    assert sorted(asked) == [[0], [1]] and found["Pass@1"] == 1


@pytest.mark.parametrize("name", soft_grpo.ROWS)
def test_it_learns(name, machine):
    """Rewarded for beginning with a certain token, or with an h in its direction, the policy does
    so more often: each choice of thoughts climbs the gradient of its own likelihood."""
    n = 64                                   # 16 may hold none that is rewarded
    s = tiny_setup(machine, flags_of(name, group=n, max_new=2, top_k=8, top_p=1.0))
    optimizer, shares = torch.optim.Adam(s.model.parameters(), 3e-3), []
    for update in range(8):
        batch, made, _ = policy.sample(s, soft_grpo.POLICY, QUESTIONS[:1], n, [(update, 0)])
        if update == 0:
            target = s.model.head(s.model(batch.prompt)[0, -1]).topk(2).indices[1]
            direction = s.model.wte.weight[target].detach().clone()
        rewards = (made.thought.token[:, 0] == target).float()
        if name == "gaussian":
            rewards = made.thought.drawn[:, 0] @ direction
        shares.append(rewards.mean().item())
        a = soft_grpo.advantages(rewards[None]).flatten()
        loss, _ = soft_grpo.grpo_loss(s.model, s.model, batch, made, a, s.flags)
        optimizer.zero_grad()
        (loss / n).backward()
        optimizer.step()
    assert sum(shares[-2:]) > sum(shares[:2]) + 0.3, shares


# ---------------------------------------------------------------- whole runs

def run(argv):
    """`python soft_grpo.py ARGV` in this process; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["soft_grpo.py", *map(str, argv)])
        runtime.run_main(soft_grpo.main)
    return stop.value.code or 0


@pytest.fixture(scope="module", autouse=True)
def rewards():
    """A model this small is never right: half of its rollouts are rewarded all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "is_correct", lambda text, answer: len(text) % 2 == 0)
        yield


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory, rewards):
    """The folder of a run of ksample with two passes and KL."""
    out = tmp_path_factory.mktemp("grpo") / "run"
    assert run(start(data, out, OF_FINISHED)) == 0
    return out


OF_FINISHED = "--thoughts ksample --passes 2 --kl 0.1"


def start(data, out, more=""):
    return ["--data", data, "--out", out, *SMALL.split(), *more.split()]


class Killed(BaseException):
    """Stands for kill -9."""


def interrupted(argv, how, n):
    """Run, and be stopped or killed in the n-th update."""
    step, calls = Run.step, []

    def call(*args, **more):
        calls.append(1)
        if len(calls) == n:
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", call)
        try:
            return run(argv)
        except Killed:
            return "killed"


@pytest.mark.parametrize("events", ["stop 3, stop 2, stop 2, kill 3"])
def test_resume_is_bit_identical(data, finished, tmp_path, events):
    """Stopped and killed in the imitation (5 updates), at its end, in GRPO (6): the same bits."""
    out = tmp_path / "run"
    argv = start(data, out, OF_FINISHED)
    for event in events.split(", "):
        how, n = event.split()
        assert interrupted(argv, how, int(n)) == (130 if how == "stop" else "killed")
        argv = ["--resume", "--out", out]
    assert run(argv) == 0
    for a, b in zip(outcome(out), outcome(finished)):
        assert same(a, b)


def test_what_is_logged(finished):
    """Every update of GRPO; with two passes the second one's ratios are off 1, and KL grows."""
    found = [line for line in metrics(finished) if line["event"] == "rl"]
    assert [line["update"] for line in found] == list(range(6, 12))
    assert all(math.isfinite(x) for line in found for x in line.values() if x != "rl")
    assert found[0]["kl"] < found[-1]["kl"] and all(line["off"] > 1e-6 for line in found)
    assert all(0 <= line[name] <= 1 for line in found for name in ("reward", "one_hot", "clipped"))
    before, after = (line for line in metrics(finished) if line["event"] == "test")
    assert (before["who"], after["who"]) == ("after", "before")
    assert list(after["columns"]) == ["Pass@1", "Pass@1, words", "one-hot"]


def test_a_finished_run(finished, capsys):
    """--resume prints the table again, --eval-only the row of its best model; --thoughts changes
    how that thinks; --ask shows a rollout and all answers."""
    def row(who):
        line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith(who)]
        return line.split()[:4]

    assert run(["--resume", "--out", finished]) == 0
    after = row("after")
    best = finished / "best.pt"
    assert run(["--eval-only", best]) == 0
    assert row("after") == after
    assert run(["--eval-only", best, "--thoughts", "gaussian", "--draws", 3, "--sigma", 2]) == 0
    assert "gaussian on" in capsys.readouterr().out
    assert run(["--eval-only", best, "--ask", "Ann has 3 pens. How many pens does Ann have?"]) == 0
    assert "of 2" in capsys.readouterr().out


def test_start_from_a_checkpoint(data, finished, tmp_path, capsys):
    """--init of a CoT model: no imitation, and the start is that model."""
    out = tmp_path / "run"
    argv = without_shape(start(data, out, "--thoughts gumbel --density --steps 1"))
    assert run([*argv, "--init", finished / "best.pt"]) == 0
    saved = [torch.load(path, weights_only=True)["model"]
             for path in (out / "start.pt", finished / "best.pt")]
    assert same(*saved)
    assert [line["update"] for line in metrics(out) if line["event"] == "rl"] == [1]


def without_shape(argv):
    """A command line without the settings of a model from scratch, and without --steps-start."""
    gone = ("--n-layer", "--n-head", "--n-embd", "--block-size", "--steps-start")
    at = [argv.index(name) for name in gone]
    return [word for i, word in enumerate(argv) if i not in at and i - 1 not in at]


def test_table(data, tmp_path, capsys):
    """All rows of a seed from one start, whose own row is first."""
    out = tmp_path / "table"
    more = "--table --rows tokens,gumbel-density --seeds 1 --steps 2"
    assert run(start(data, out, more)) == 0
    text = (out / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert names[1:4] == ["start", "tokens", "gumbel-density"]
    assert "Pass@1, words" in text
    first = torch.load(out / "start-0" / "best.pt", weights_only=True)["model"]
    for name in ("tokens", "gumbel-density"):
        assert same(torch.load(out / f"{name}-0" / "start.pt", weights_only=True)["model"], first)


@pytest.mark.parametrize("more, words", [
    ("--thoughts tokens --k 2", "--k does nothing with --thoughts tokens"),
    ("--tau 0.5", "--thoughts gumbel"),
    ("--thoughts words", "invalid choice"),
    ("--group 1", "at least 2"),
    ("--table --thoughts gumbel", "--rows"),
    ("--table --rows tokens,words", "'words'"),
    ("--rows tokens", "--table"),
    ("--eval-only missing.pt", "no such checkpoint"),
    ("--ask What?", "--eval-only"),
    ("--resume", "no last.pt|No such file"),
    ("--data missing", "missing")])
def test_bad_flags(tmp_path, monkeypatch, capsys, more, words):
    """One sentence that names the flag, exit code 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "prosqa-mini-grpo-ksample-0").mkdir(parents=True)
    assert run(more.split()) == 2
    said = capsys.readouterr()
    assert re.search(words, said.err) and "Traceback" not in said.err
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("changed, words", [
    (dict(columns=7), "no named values"), (dict(columns={"Pass@1": 3.0}), "Pass@1 is 3.0"),
    (dict(one_hot=None), "one_hot is None"), (dict(who="nobody"), "who is 'nobody'")])
def test_damaged_rows(finished, tmp_path, capsys, changed, words):
    out = tmp_path / "run"
    out.mkdir()
    state = torch.load(finished / "last.pt", weights_only=True)
    state["at"]["rows"][0] |= changed
    torch.save(state, out / "last.pt")
    assert run(["--resume", "--out", out]) == 2
    assert words in capsys.readouterr().err


def test_start_must_think_in_words(data, tmp_path, capsys):
    """A model of coconut.py's curriculum, and a checkpoint of another script to --eval-only."""
    other = tmp_path / "coconut"
    argv = ("--n-layer 1 --n-head 2 --n-embd 16 --stage-max 1 --steps-stage-0 1 --steps-last 1 "
            "--batch-size 4 --eval-items 2 --device cpu")
    assert run_coconut(["--data", data, "--out", other, *argv.split()]) == 0
    argv = without_shape(start(data, tmp_path / "run"))
    assert run([*argv, "--init", other / "best.pt"]) == 2
    assert "does not think in words" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert run(["--eval-only", other / "best.pt"]) == 2
    assert "another script trained it" in capsys.readouterr().err
