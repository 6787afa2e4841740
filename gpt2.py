"""GPT-2 from scratch, with the three things that latent reasoning needs.

A language model usually takes token ids and gives logits. Reasoning in hidden states needs more:

1. the input may be a vector instead of a token (`embeds`), so that a hidden state can be fed back;
2. the output is the hidden state after ln_f (what is fed back); logits are a separate, last step;
3. the keys and values of what was read stay in a cache, through which gradients can flow.

    h = model(ids, cache=cache)                   # (B, T) -> (B, T, C), the state after ln_f
    h = model(embeds=h[:, -1:], cache=cache)      # feed the last state back: one continuous thought
    logits = model.head(h)                        # (B, T, C) -> (B, T, V), where they are needed

Shapes: B batch, T new positions, S positions seen so far including the new ones, C channels,
V vocabulary, H heads. Numerically this is GPT-2 (Radford et al. 2019): pre-LayerNorm, tanh GELU,
learned positions, head tied to the token embedding.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPT2Config:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    embd_std: float = 0.02       # initial spread of token embeddings
    pos_std: float = 0.02        # that of position embeddings
    state_std: float = 1.0       # initial spread of the states after ln_f, which are fed back
    switch: bool = False         # a linear head on the state: is this thought the last?


PRESETS = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),           # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),   # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),    # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),       # 1558M
}
RELEASED = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"


# ---------------------------------------------------------------- cache, masks, positions


def layout(keep, new):
    """Positions and attention mask of the columns `new` (T,): the one place that knows padding.

    keep (B, S) bool: True where a column holds something real. A row's position counts its real
    columns only, so a left-padded question has the positions it would have alone:

        column     0  1  2  3  4
        row a      -  -  x  y  z     positions 0 0 0 1 2
        row b      p  q  r  s  t     positions 0 1 2 3 4

    Returns positions (B, T) and mask (B, 1, T, S), True where attention may look: at real columns,
    not in the future. A padding column sees itself, so that its softmax is defined; nobody sees it.
    """
    column, query = torch.arange(keep.size(1), device=keep.device), new[:, None]
    positions = (keep.cumsum(1) - 1).clamp(min=0)[:, new]                 # (B, T)
    mask = (keep[:, None, :] & (column <= query)) | (column == query)     # (B, T, S)
    return positions, mask[:, None]


class GrowingCache:
    """Keys and values that grow by concatenation. Differentiable: use it for training.

    Per layer, k and v are (B, H, S, C/H). `keep` (B, S) remembers which columns are real.
    """

    def __init__(self):
        self.kv, self.keep, self.length, self.padded = {}, None, 0, False

    def open(self, B, T, keep, device):
        """Announce T new columns; returns their positions (B, T) and mask, (B, 1, T, S) or None."""
        start, self.length = self.length, self.length + T
        self.padded = self.padded or keep is not None
        if not self.padded:
            positions = torch.arange(start, self.length, device=device).expand(B, T)
            mask = None          # attention is causal from column 0, or of one column that sees all
            if start > 0 and T > 1:
                mask = torch.ones(T, self.length, dtype=torch.bool, device=device).tril(start)
            return positions, mask
        old, new = self.keep, keep
        if old is None:
            old = torch.ones(B, start, dtype=torch.bool, device=device)
        if new is None:
            new = torch.ones(B, T, dtype=torch.bool, device=device)
        self.keep = torch.cat([old, new], 1)
        return layout(self.keep, torch.arange(start, self.length, device=device))

    def write(self, layer, k, v):
        """Add k, v (B, H, T, C/H) of the new columns; returns those of all columns so far."""
        if layer in self.kv:
            k = torch.cat([self.kv[layer][0], k], 2)
            v = torch.cat([self.kv[layer][1], v], 2)
        self.kv[layer] = (k, v)
        return k, v

    def fork(self, n=None):
        """A cache that goes on from here: continuations share a prefix. n: of each row n copies."""
        twin = GrowingCache()
        twin.kv, twin.keep = dict(self.kv), self.keep
        twin.length, twin.padded = self.length, self.padded
        if n is not None:
            for layer, kv in self.kv.items():
                twin.kv[layer] = tuple(x.repeat_interleave(n, 0) for x in kv)
            twin.keep = self.keep if self.keep is None else self.keep.repeat_interleave(n, 0)
        return twin


class StaticCache:
    """The same, preallocated for `size` columns and written in place: for decoding.

    Shapes never change and the write position is a tensor, so a compiled decoding step is compiled
    once. Columns not yet written are masked like padding.
    """

    def __init__(self, config, B, size, device, dtype):
        heads = getattr(config, "n_kv_head", config.n_head)       # llama.py: fewer than queries
        shape = (B, heads, size, config.n_embd // config.n_head)
        # a tensor per layer: a compiled step would copy one tensor of all layers for each write
        layers = range(config.n_layer)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.keep = torch.zeros(B, size, dtype=torch.bool, device=device)
        self.length = torch.zeros((), dtype=torch.long, device=device)
        self.new = None                          # the columns being written, (T,)

    def open(self, B, T, keep, device):
        self.new = self.length + torch.arange(T, device=device)
        if keep is None:
            keep = torch.ones(B, T, dtype=torch.bool, device=device)
        self.keep.index_copy_(1, self.new, keep)
        self.length += T
        return layout(self.keep, self.new)

    def write(self, layer, k, v):
        for ours, new in ((self.k[layer], k), (self.v[layer], v)):
            ours.index_copy_(2, self.new, new.to(ours.dtype))
        return self.k[layer], self.v[layer]

    def repeat(self, n, rows=slice(None)):
        """Copy of this cache with each of its rows, or of some (R,), n times in a row: n rollouts
        share one prefill."""
        twin = object.__new__(StaticCache)
        twin.k = [k[rows].repeat_interleave(n, 0) for k in self.k]
        twin.v = [v[rows].repeat_interleave(n, 0) for v in self.v]
        twin.keep = self.keep[rows].repeat_interleave(n, 0)
        twin.length, twin.new = self.length.clone(), None
        return twin


# ---------------------------------------------------------------- any model


class LanguageModel(nn.Module):
    """What does not depend on what is inside a block: decoding, weights, counts. A model has wte,
    blocks `h`, ln_f, config and switch; `forward` gives hidden states, `head` their logits."""

    def compiled(self):
        """Compile every pass in place, with torch.compile: training, thoughts and decoding.
        Returns the model. Starts slowly: each of the graphs below is compiled on its own."""
        # one graph per kind of pass: question, thought, language, token; with and without
        # gradients; with each length that the list of cached keys and values can have
        limit = "recompile_limit"
        if not hasattr(torch._dynamo.config, limit):
            limit = "cache_size_limit"           # its name before torch 2.6
        setattr(torch._dynamo.config, limit, 64)
        self.compile()
        return self

    @torch.no_grad()
    def decode(self, cache, h, max_new, eos, edit=None):
        """Continue every row of `cache` greedily until its eos, for at most max_new tokens.

        h (B, C): the state that predicts the first token. edit: a function from the next tokens
        (B,) to those that are read instead. A row also ends when its positions reach block_size.
        Returns a list of B lists of token ids, eos not included.
        """
        out, done = [], torch.zeros(h.size(0), dtype=torch.bool, device=h.device)
        used = cache.keep.sum(1)                                      # (B,) real positions so far
        for i in range(max_new):
            token = self.head(h).argmax(-1)                           # (B,)
            token = edit(token).to(token) if edit else token
            done = done | (token == eos)
            out.append(torch.where(done, eos, token))
            done = done | (used + i >= self.config.block_size)
            if i + 1 == max_new or done.all():
                break
            h = self(out[-1][:, None], cache=cache, keep=~done[:, None])[:, -1]
        rows = torch.stack(out, 1).tolist() if out else [[] for _ in range(h.size(0))]
        return [row[:row.index(eos)] if eos in row else row for row in rows]

    def load(self, state, where, assign=False):
        """Take over a state dict. Returns the model; raises ValueError naming the first weight that
        is missing, unexpected or of another shape. assign: its tensors become the weights."""
        own = self.state_dict()
        for key in [*own, *state]:
            if key not in state:
                raise ValueError(f"{where}: the weight {key} is missing.")
            if key not in own:
                raise ValueError(f"{where}: unexpected weight {key}.")
            if own[key].shape != state[key].shape:
                raise ValueError(f"{where}: {key} has shape {tuple(state[key].shape)} (as Linear), "
                                 f"expected {tuple(own[key].shape)}.")
        self.load_state_dict(state, assign=assign)
        return self

    def grow_vocab(self, vocab_size, copy_from=None):
        """Add embedding rows up to vocab_size: copies of row `copy_from`, or N(0, 0.02)."""
        self.wte = nn.Embedding.from_pretrained(grown(self.wte.weight.data, vocab_size, copy_from),
                                                freeze=False)
        self.config.vocab_size = vocab_size

    def grow_for(self, tok):
        """Add embeddings for <bot>, <eot> and <pause> to released weights, as copies of that of
        "<<". Returns the model; raises ValueError if `tok` is not the tokenizer of its weights."""
        if self.config.vocab_size != tok.bot:
            raise ValueError(f"{self.config.vocab_size:,} token embeddings, but its tokenizer has "
                             f"{tok.bot:,} tokens")
        mark = tok.encode("<<")
        self.grow_vocab(tok.n_vocab, copy_from=mark[0] if len(mark) == 1 else None)
        return self

    def add_switch(self):
        """A linear head on hidden states, > 0 where thinking should end (coconut.py --switch)."""
        self.config.switch = True
        self.switch = nn.Linear(self.config.n_embd, 1).to(self.wte.weight.device)

    def n_params(self):
        """Number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Forward and backward FLOPs per position of a sequence of T: 6 per weight, 12 L C T for
        attention (PaLM, appendix B; causal masking is not discounted). Without the head, which
        runs only on label positions and takes 6 C V for each of them."""
        weights = sum(p.numel() for n, p in self.named_parameters() if n.startswith("h."))
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * T


def grown(old, n, copy_from=None):
    """A matrix with n rows: those of `old`, then copies of row `copy_from`, or N(0, 0.02)."""
    new = torch.empty(n - old.size(0), old.size(1)).normal_(std=0.02).to(old)
    if copy_from is not None:
        new[:] = old[copy_from]
    return torch.cat([old, new])


# ---------------------------------------------------------------- the model


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def heads(self, x):
        """x (B, T, C) -> queries, keys and values of all heads, (B, H, T, C/H) each."""
        return (t.unflatten(2, (self.n_head, -1)).transpose(1, 2)
                for t in self.c_attn(x).split(x.size(2), dim=2))

    def forward(self, x, cache, mask, last=None):
        q, k, v = self.heads(x)                                              # (B, H, T, C/H)
        k, v = cache.write(self.layer, k, v)                                 # (B, H, S, C/H)
        if last:
            q = q[:, :, -last:]
            mask = None if mask is None else mask[..., -last:, :]
        y = F.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask,
            is_causal=mask is None and q.size(2) > 1,
            dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).flatten(2)                                     # (B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.ModuleDict(dict(
            c_fc=nn.Linear(config.n_embd, 4 * config.n_embd),
            c_proj=nn.Linear(4 * config.n_embd, config.n_embd)))
        self.dropout = config.dropout

    def forward(self, x, cache, mask, last=None):
        y = self.attn(self.ln_1(x), cache, mask, last)
        x = (x[:, -last:] if last else x) + y                                # (B, T or last, C)
        h = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh")          # (B, T or last, 4C)
        return x + F.dropout(self.mlp.c_proj(h), self.dropout, self.training)


class GPT2(LanguageModel):
    """GPT-2. `forward` gives hidden states, `head` turns them into logits."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:     # GPT-2: N(0, 0.02), projections into the residual stream smaller
                std = {"wte.weight": config.embd_std, "wpe.weight": config.pos_std}.get(name, 0.02)
                if name.endswith("c_proj.weight"):
                    std = 0.02 / math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        nn.init.constant_(self.ln_f.weight, config.state_std)
        self.switch = None
        if config.switch:
            self.add_switch()

    def forward(self, ids=None, *, embeds=None, cache=None, keep=None, last=None, all_states=False):
        """Read T new positions after those in `cache`.

        ids (B, T) token ids, or embeds (B, T, C) input vectors (position embeddings are added to
        either). cache: GrowingCache or StaticCache, updated; None reads from position 0 and keeps
        nothing. keep (B, T) bool marks real positions among the new ones; None: all are.

        last: give only the states of that many last positions, (B, last, C). For the others the
        last block then computes only keys and values: nothing else of them is ever looked at.

        Returns the state after ln_f, (B, T, C); with all_states a list of n_layer + 1 tensors
        (B, T, C): the embeddings, the output of each block but the last, the state after ln_f.
        """
        x = self.wte(ids) if embeds is None else embeds
        B, T, _ = x.shape
        cache = GrowingCache() if cache is None else cache
        positions, mask = cache.open(B, T, keep, x.device)
        if mask is None and last and 1 < last < T:   # "causal" would count from the wrong corner
            mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        x = x + self.wpe(positions.clamp(max=self.config.block_size - 1))    # padding may be beyond
        x = F.dropout(x, self.config.dropout, self.training)
        states = [x]
        for block in self.h:
            x = block(x, cache, mask, last if block is self.h[-1] else None)
            states.append(x)
        states[-1] = self.ln_f(x)
        return states if all_states else states[-1]

    def head(self, h):
        """Logits (..., V) of hidden states h (..., C), through the tied token embedding."""
        return F.linear(h, self.wte.weight)

    # ------------------------------------------------------------ weights

    @classmethod
    def from_huggingface(cls, state, where="state dict", dropout=0.0, n_head=None):
        """Model from a state dict in Hugging Face's GPT-2 layout: Conv1D weights are (in, out).

        The shape of the model is read off the weights; n_head, which they do not show, is given or
        else makes heads of 64 channels, as in every released GPT-2. Raises ValueError naming the
        first weight that is missing, unexpected, of another kind or shape, or not tied.
        """
        state = {k.removeprefix("transformer."): v for k, v in state.items()}
        masks = (".attn.bias", ".attn.masked_bias")             # causal ones, of old versions
        state = {k: v for k, v in state.items() if not k.endswith(masks)}
        for key, value in state.items():
            if not (isinstance(value, torch.Tensor) and value.is_floating_point()
                    and value.layout == torch.strided and not value.is_meta):
                raise ValueError(f"{where}: {key} is not a plain tensor of floating-point numbers.")
        for key in ("wte.weight", "wpe.weight"):
            if key not in state:
                raise ValueError(f"{where}: no weight {key}: this is not a GPT-2 "
                                 "pytorch_model.bin.")
            if state[key].dim() != 2:
                raise ValueError(f"{where}: {key} is not a matrix.")
        wte = state["wte.weight"]
        (vocab_size, n_embd), block_size = wte.shape, state["wpe.weight"].size(0)
        lm_head = state.pop("lm_head.weight", wte)
        if lm_head.shape != wte.shape or not torch.allclose(
                lm_head.float(), wte.float(), rtol=0, atol=0, equal_nan=True):
            raise ValueError(f"{where}: lm_head.weight is not equal to wte.weight; the two are one "
                             "matrix in GPT-2 (tie_word_embeddings), so they cannot be used.")
        n_layer = len({k.split(".")[1] for k in state if k.startswith("h.")})
        n_head = n_head or max(1, n_embd // 64)
        if n_embd % n_head:
            raise ValueError(f"{where}: {n_embd} channels are not a multiple of {n_head} heads; "
                             "n_head in a config.json next to the weights says how many there are.")
        model = cls(GPT2Config(block_size, vocab_size, n_layer, n_head, n_embd, dropout))
        for key, value in state.items():         # Conv1D to Linear
            if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                state[key] = value.t() if value.dim() == 2 else value
        return model.load(state, where)
