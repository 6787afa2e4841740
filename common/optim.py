"""Learning: schedules, parameter groups, Muon, LoRA."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.runtime import count, real


# ---------------------------------------------------------------- learning rate


def trapezoid(update, total, peak, warmup=0, decay=0.3):
    """Rate at `update` of 0..total-1: linear warm-up over `warmup` updates, constant, then linear
    to 0 over the last `decay` (0..1) of them."""
    rate = peak * min(1.0, (update + 1) / max(1, warmup))
    left = (total - update) / max(1, total)
    return rate * min(1.0, left / decay) if decay else rate


def cosine(update, total, peak, warmup=0):
    """Rate at `update` of 0..total-1: linear warm-up over `warmup` updates, half a cosine to 0."""
    if update < warmup:
        return peak * (update + 1) / warmup
    return peak * (1 + math.cos(math.pi * (update - warmup) / max(1, total - warmup))) / 2


SCHEDULES = {"cosine": cosine, "trapezoid": trapezoid}


def set_rate(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def step(optimizers, parameters, clip):
    """An update from the gradients, whose norm is clipped to `clip` (0: it is not); clears them."""
    if clip:
        nn.utils.clip_grad_norm_(parameters, clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------- optimizers


def new_optimizers(flags, model, projection=None, decoder=None):
    """The optimizers of a run, a list: AdamW for everything that learns, or with --optimizer muon
    Muon for the matrices of blocks and of a projection, and AdamW for the rest.

    Only matrices decay: those of the blocks and of a projection. Embeddings, biases, norms and a
    switch do not. flags: optimizer, lr, weight_decay, momentum, beta2. decoder: SIM-CoT's, whose
    token embeddings are the model's.
    """
    matrices, rest = [], []
    named = list(model.named_parameters())
    if decoder is not None:
        named += [(name, p) for name, p in decoder.named_parameters() if p is not model.wte.weight]
    for name, p in named:
        if p.requires_grad:
            in_block = p.dim() == 2 and name.startswith("h.")
            (matrices if in_block else rest).append(p)
    for p in projection.parameters() if projection is not None else ():
        (matrices if p.dim() == 2 else rest).append(p)
    optimizers, groups = [], [dict(params=matrices, weight_decay=flags.weight_decay)]
    if flags.optimizer == "muon":
        optimizers, groups = [Muon(groups, flags.lr, momentum=flags.momentum)], []
    groups = [group for group in [*groups, dict(params=rest, weight_decay=0.0)] if group["params"]]
    return optimizers + [torch.optim.AdamW(groups, flags.lr, betas=(0.9, flags.beta2), fused=True)]


def load_state(optimizer, saved):
    """Load a state dict into an optimizer. Raises ValueError unless its settings are of the same
    types and the state of each parameter is of its shape and complete, and what torch raises."""
    kinds = [{k: type(v) for k, v in g.items()} for g in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    if kinds != [{k: type(v) for k, v in g.items()} for g in optimizer.param_groups]:
        raise ValueError("settings of another type")
    names = {"mean"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
    for p, state in optimizer.state.items():
        for name, value in state.items():
            shape = () if name == "step" else p.shape
            if getattr(value, "shape", None) != shape or value.dtype != torch.float32:
                raise ValueError(f"{name} is not a tensor of shape {tuple(shape)}")
        if state.keys() != names:
            raise ValueError(f"the state of a parameter has {', '.join(map(str, state))}")


class Muon(torch.optim.Optimizer):
    """Muon for matrices (Jordan 2024, https://kellerjordan.github.io/posts/muon).

    The momentum of each matrix is brought near the closest orthogonal matrix by five Newton-Schulz
    steps, so that all its directions are learned at one pace. Scaled by 0.2 sqrt(longer side) it
    takes AdamW's learning rate and decay (Liu et al. 2025, arXiv 2502.16982). torch.optim.Muon
    computes the same in bfloat16, which made updates five times slower on a CPU without bfloat16
    units.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                mean = state["mean"]
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(mean, group["momentum"]))    # Nesterov's look ahead
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonal(m, steps=5):
    """Matrix -> one with its singular vectors and singular values between about 0.7 and 1.2, by
    the Newton-Schulz iteration with Jordan's coefficients.

    Each step multiplies x by a polynomial p of x x^T. Products of them are collected in q, so that
    x itself, up to four times as large, is read once more only, at the end: 0.6 of the time. The
    price: errors of up to 1e-3 of the norm where m is nearly singular. In float32 on a GPU too, as
    rounding to bfloat16 can make an eigenvalue of x x^T negative, and then it grows.
    """
    tall = m.size(0) > m.size(1)
    x = m / (m.norm() + 1e-7)
    a = x.T @ x if tall else x @ x.T                                # (shorter, shorter)
    for i in range(steps):
        p = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)
        p.diagonal().add_(3.4445)
        q = q @ p if i else p
        if i + 1 < steps:
            a = p @ a @ p
    return x @ q if tall else q @ x


# ---------------------------------------------------------------- LoRA

LORA = {
    "LoRA": [
        ("lora_r", 0, count(0), "rank of LoRA on the blocks' matrices, which then stay as they "
                                "were (0: train all)"),
        ("lora_alpha", 32.0, real(), "LoRA's update is scaled by this / rank"),
        ("lora_dropout", 0.1, real(0, 1), "dropout before LoRA"),
        ("train_marks", True, bool, "train the embeddings of <bot> and <eot> too (CODI's authors: "
                                    "they stay frozen)"),
    ]}


class LoRA(nn.Module):
    """A frozen Linear plus a trained update of rank r: y = W x + b + (alpha / r) B A x (Hu et al.
    2021, arXiv 2106.09685). B starts at zero, so the model starts as it was."""

    def __init__(self, linear, r, alpha, dropout):
        super().__init__()
        self.linear, self.scale, self.dropout = linear, alpha / r, nn.Dropout(dropout)
        self.a = nn.Parameter(torch.empty(r, linear.in_features).normal_(std=1 / r))
        self.b = nn.Parameter(torch.zeros(linear.out_features, r))

    def forward(self, x):
        update = F.linear(F.linear(self.dropout(x), self.a), self.b)
        return self.linear(x) + update * self.scale


def add_lora(model, flags, marks):
    """With --lora-r, freeze the model and add LoRA to every matrix of its blocks. marks: token ids
    whose embeddings learn all the same with --train-marks: those of latent mode, which a released
    model lacks."""
    if not flags.lora_r:
        return
    model.requires_grad_(False)
    for block in model.h:
        for name, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear):
                owner, _, last = name.rpartition(".")
                block.get_submodule(owner)._modules[last] = LoRA(
                    linear, flags.lora_r, flags.lora_alpha, flags.lora_dropout)
    if flags.train_marks:
        mask = torch.zeros_like(model.wte.weight[:, :1])
        mask[marks] = 1
        model.wte.weight.requires_grad_(True)
        model.wte.weight.register_hook(lambda gradient: gradient * mask.to(gradient))


def merged(state, alpha, r):
    """A state dict with LoRA's updates added to their matrices: that of a plain model."""
    plain = {}
    for name, value in state.items():
        if name.endswith("linear.weight"):
            a, b = (state[name.replace("linear.weight", side)] for side in "ab")
            value = value + b @ a * (alpha / r)
        if not name.endswith((".a", ".b")):
            plain[name.replace("linear.", "")] = value
    return plain
