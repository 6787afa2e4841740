"""Llama from scratch, with gpt2.py's interface: the family of LLaMA, SmolLM2, and many others.

What differs from GPT-2, and why (4: Ainslie et al. 2023, arXiv 2305.13245; the rest: Touvron et
al. 2023, arXiv 2302.13971):
1. positions turn queries and keys (rotary): attention then depends on how far apart two are;
2. RMSNorm only divides by the root mean square: no mean, no bias, cheaper, and as good;
3. SwiGLU, silu(gate) * up, in place of GELU: a gated feed-forward learns more per parameter;
4. grouped queries: several heads share keys and values, so the cache is that much smaller;
5. no biases anywhere, no learned positions, and the head may have a matrix of its own.

    h = model(ids, cache=cache)                   # (B, T) -> (B, T, C), the state after ln_f
    h = model(embeds=h[:, -1:], cache=cache)      # one continuous thought
    logits = model.head(h)

Shapes as in gpt2.py; G heads of keys and values serve H heads of queries, each of D = C / H.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt2 import GrowingCache, LanguageModel, grown


@dataclass
class LlamaConfig:
    block_size: int = 8192
    vocab_size: int = 49152
    n_layer: int = 30
    n_head: int = 9
    n_kv_head: int = 3            # heads of keys and values, G
    n_embd: int = 576
    n_hidden: int = 1536          # width inside the feed-forward
    norm_eps: float = 1e-5
    rope_base: float = 100000.0
    rope_factor: float = 1.0      # LLaMA 3.1's longer context: slow pairs turn this factor slower
    rope_low: float = 1.0         # slow: fewer turns than this in rope_original positions
    rope_high: float = 4.0        # pairs with more turns than this stay as they are
    rope_original: int = 8192
    tied: bool = True             # the head is the token embedding
    dropout: float = 0.0
    embd_std: float = 0.02        # initial spread of token embeddings
    state_std: float = 1.0        # initial spread of the states after ln_f, which are fed back
    switch: bool = False          # a linear head on the state: is this thought the last?


PRESETS = {
    "smollm2": dict(),                                     # SmolLM2-135M: the defaults above
    "llama-1b": dict(block_size=131072, vocab_size=128256, n_layer=16, n_head=32, n_kv_head=8,
                     n_embd=2048, n_hidden=8192, rope_base=500000.0, rope_factor=32.0),
}


# ---------------------------------------------------------------- rotary positions


def rotary(positions, config):
    """Cosines and sines, (B, 1, T, D), by which `turn` turns what is at positions (B, T).

    Pair p of a head turns by rope_base^(-2 p / D) a position (RoFormer, arXiv 2104.09864,
    section 3.2.2): the first pairs tell neighbours apart, the last ones the ends of a long text.
    """
    D = config.n_embd // config.n_head
    pair = torch.arange(D // 2, device=positions.device, dtype=torch.float32)
    speed = 1 / config.rope_base ** (2 * pair / D)                        # (D / 2,)
    if config.rope_factor != 1:
        turns = config.rope_original * speed / (2 * math.pi)
        share = (turns - config.rope_low) / (config.rope_high - config.rope_low)
        share = share.clamp(0, 1)
        speed = speed * (share + (1 - share) / config.rope_factor)
    angle = positions[:, None, :, None] * speed                           # (B, 1, T, D / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)      # signs: as turn needs them


def turn(x, cos, sin):
    """Turn each pair (a, b) = (x_i, x_{i + D/2}) of x (B, H, T, D) by its angle, to
    (a cos - b sin, b cos + a sin)."""
    other = x.roll(x.size(-1) // 2, -1)                                   # b where a is, a at b
    return torch.addcmul(x * cos, other, sin).to(x.dtype)


# ---------------------------------------------------------------- the model


def dropped(x, p, training):
    """Dropout; when decoding not even a call."""
    return F.dropout(x, p) if training and p else x


class RMSNorm(nn.Module):
    """x / sqrt(mean of x^2 over the channels) * weight; in float32 under autocast, too."""

    def __init__(self, C, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x):
        x = x.float()
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.D = config.n_embd // config.n_head
        keys = config.n_kv_head * self.D
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, keys, bias=False)
        self.v_proj = nn.Linear(config.n_embd, keys, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def heads(self, x, angles):
        """x (B, T, C) -> queries (B, H, T, D) and keys, both turned, and values (B, G, T, D)."""
        B, T, _ = x.shape
        q, k, v = (project(x).view(B, T, -1, self.D).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = turn(torch.cat([q, k], 1), *angles).split([q.size(1), k.size(1)], 1)
        return q, k, v

    def forward(self, x, cache, mask, angles, last=None):
        q, k, v = self.heads(x, angles)                                      # (B, H or G, T, D)
        k, v = cache.write(self.layer, k, v)                                 # (B, G, S, D)
        if last:
            q = q[:, :, -last:]
            mask = None if mask is None else mask[..., -last:, :]
        y = F.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask,
            is_causal=mask is None and q.size(2) > 1,
            dropout_p=self.dropout if self.training else 0.0, enable_gqa=True)
        y = y.transpose(1, 2).flatten(2)                                     # (B, T, C)
        return dropped(self.o_proj(y), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config, layer)
        self.ln_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = nn.ModuleDict(dict(
            gate_proj=nn.Linear(config.n_embd, config.n_hidden, bias=False),
            up_proj=nn.Linear(config.n_embd, config.n_hidden, bias=False),
            down_proj=nn.Linear(config.n_hidden, config.n_embd, bias=False)))
        self.dropout = config.dropout

    def forward(self, x, cache, mask, angles, last=None):
        y = self.attn(self.ln_1(x), cache, mask, angles, last)
        x = (x[:, -last:] if last else x) + y                                # (B, T or last, C)
        h = self.ln_2(x)
        h = F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h)              # (B, T, n_hidden)
        return x + dropped(self.mlp.down_proj(h), self.dropout, self.training)


class Llama(LanguageModel):
    """Llama. `forward` gives hidden states, `head` turns them into logits."""

    def __init__(self, config):
        super().__init__()
        for whole, part in (("n_embd", "n_head"), ("n_head", "n_kv_head")):
            if getattr(config, whole) % getattr(config, part):
                raise ValueError(f"{whole} {getattr(config, whole)} is not a multiple of {part} "
                                 f"{getattr(config, part)}")
        if config.n_embd // config.n_head % 2:
            raise ValueError(f"{config.n_embd // config.n_head} channels of a head are no pairs")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:     # as GPT-2: projections into the residual stream smaller
                std = config.embd_std if name.startswith("wte") else 0.02
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std = 0.02 / math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=std)
        nn.init.constant_(self.ln_f.weight, config.state_std)
        self.switch = None
        if config.switch:
            self.add_switch()

    def forward(self, ids=None, *, embeds=None, cache=None, keep=None, last=None, all_states=False):
        """Read T new positions after those in `cache`: as gpt2.py's, to the letter.

        ids (B, T) or embeds (B, T, C); cache: GrowingCache, StaticCache or None; keep (B, T) bool:
        the real ones among the new positions; last: only the states of that many last positions.
        Returns the state after ln_f, (B, T, C); with all_states a list of n_layer + 1 tensors.
        """
        x = self.wte(ids) if embeds is None else embeds
        B, T, _ = x.shape
        cache = GrowingCache() if cache is None else cache
        positions, mask = cache.open(B, T, keep, x.device)
        if mask is None and last and 1 < last < T:   # "causal" would count from the wrong corner
            mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        angles = rotary(positions, self.config)
        x = dropped(x, self.config.dropout, self.training)
        states = [x]
        for block in self.h:
            x = block(x, cache, mask, angles, last if block is self.h[-1] else None)
            states.append(x)
        states[-1] = self.ln_f(x)
        return states if all_states else states[-1]

    def head(self, h):
        """Logits (..., V) of hidden states h (..., C)."""
        return F.linear(h, (self.wte if self.lm_head is None else self.lm_head).weight)

    # ------------------------------------------------------------ weights

    @classmethod
    def from_weights(cls, config, state, where):
        """Model from a state dict in the names used here, of any floating-point type. Raises
        ValueError naming the first weight that is missing, unexpected or of another shape."""
        with torch.device("meta"):                   # no random weights that would be overwritten
            model = cls(config)
        state = {name: value.to(torch.float32, copy=True) for name, value in state.items()}
        return model.load(state, where, assign=True)

    def grow_vocab(self, vocab_size, copy_from=None):
        """Add embedding rows up to vocab_size, and rows of a head of its own: copies of row
        `copy_from`, or N(0, 0.02)."""
        super().grow_vocab(vocab_size, copy_from)
        if self.lm_head is not None:
            self.lm_head.weight = nn.Parameter(grown(self.lm_head.weight.data, vocab_size,
                                                     copy_from))
