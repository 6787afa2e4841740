"""gpt2.py: states, masks, the two caches, decoding, released weights, initialisation; Muon."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter

from common.optim import Muon, new_optimizers, orthogonal
from common.runtime import UserError
from common.text import Sequence, collate
from common.weights import pretrained
from gpt2 import GPT2, GPT2Config, GrowingCache, PRESETS, StaticCache, layout
from tiny import SHAPE, tiny_model, weights

BLOCK = SHAPE["n_positions"]


def prompt(n, seed=0):
    rng = random.Random(n + 1000 * seed)
    return [rng.randrange(67) for _ in range(n)]


def left_padded(prompts, pad=0):
    """Token ids (B, T) of the prompts, padded on the left, and keep (B, T): which are real."""
    batch = collate([Sequence(ids, 0, [pad]) for ids in prompts], pad)
    return batch.prompt, batch.keep


def test_padding_may_go_beyond_the_last_position(model):
    """A row with a long prompt and short language, next to the opposite: read together, only
    padding lies beyond, and each row reads as by itself."""
    long, short = prompt(BLOCK - 6), prompt(4)
    rows = [Sequence(long, 0, prompt(6, 1)), Sequence(short, 0, prompt(BLOCK - 4, 2))]
    batch = collate(rows, 0)
    ids = torch.cat([batch.prompt, batch.language], 1)
    keep = torch.cat([batch.keep, torch.ones_like(batch.language, dtype=torch.bool)], 1)
    with torch.no_grad():
        together = model(ids, keep=keep, last=batch.language.size(1))
        for i, (asked, _, language) in enumerate(rows):
            alone = model(torch.tensor([asked + language]), last=len(language))
            assert torch.allclose(together[i, :len(language)], alone[0], atol=1e-5)


def prefill(model, prompts, max_new):
    """A StaticCache that has read the prompts, with room for max_new tokens, and the last states.
    """
    ids, keep = left_padded(prompts)
    cache = StaticCache(model.config, len(prompts), ids.size(1) + max_new, "cpu", torch.float32)
    with torch.no_grad():
        return cache, model(ids, cache=cache, keep=keep)[:, -1]


def decode(model, prompts, max_new, eos):
    return model.decode(*prefill(model, prompts, max_new), max_new, eos)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def caches(model, B, size=BLOCK):
    """One cache of each kind."""
    return GrowingCache(), StaticCache(model.config, B, size, "cpu", torch.float32)


def greedy(model, ids, max_new, eos):
    """Decoding as its definition has it: read everything anew for each token."""
    ids, out = list(ids), []
    while len(out) < max_new and len(ids) <= BLOCK:
        token = model.head(model(torch.tensor([ids])))[0, -1].argmax().item()
        if token == eos:
            break
        out.append(token)
        ids.append(token)
    return out


# ---------------------------------------------------------------- states

def test_all_states(model):
    """all_states: embeddings, the output of each block but the last, and the state after ln_f."""
    ids = torch.tensor([prompt(9)])
    outputs = []
    for block in model.h:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    states = model(ids, all_states=True)
    assert [s.shape for s in states] == [(1, 9, 32)] * 4
    assert torch.equal(states[0], model.wte.weight[ids] + model.wpe.weight[:9])
    assert torch.equal(states[1], outputs[0]) and torch.equal(states[2], outputs[1])
    assert torch.equal(states[3], model.ln_f(outputs[2])) and torch.equal(states[3], model(ids))


def test_the_future_is_hidden(model):
    """A later token changes no earlier state."""
    ids = torch.tensor([prompt(9)])
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % 67
    a, b = model(ids), model(other)
    assert torch.equal(a[:, :5], b[:, :5]) and not close(a[:, 5], b[:, 5])


def test_embeddings_in_place_of_ids(model):
    """Token embeddings given as `embeds` are the same input as the ids."""
    ids = torch.tensor([prompt(9)])
    assert torch.equal(model(ids), model(embeds=model.wte(ids)))


@pytest.mark.parametrize("lengths", [(9, 9), (9, 4, 1)], ids=["unpadded", "padded"])
@pytest.mark.parametrize("kind", [0, 1], ids=["growing", "static"])
@pytest.mark.parametrize("before", [0, 3], ids=["fresh", "continued"])
@pytest.mark.parametrize("n", [1, 3])
def test_last(model, lengths, kind, before, n):
    """last=n gives the full forward's last n columns and leaves the same keys and values behind."""
    ids, keep = left_padded([prompt(n) for n in lengths])
    keep = None if keep.all() else keep

    def part(a, b):
        return dict(ids=ids[:, a:b], keep=None if keep is None else keep[:, a:b])

    full, short = caches(model, len(lengths))[kind], caches(model, len(lengths))[kind]
    if before:
        for cache in (full, short):
            model(**part(0, before), cache=cache)
    h = model(**part(before, None), cache=full)
    last = model(**part(before, None), cache=short, last=n)
    assert last.shape == (len(lengths), n, 32) and close(last, h[:, -n:])
    x = torch.tensor([[5]] * len(lengths))
    assert close(model(x, cache=short), model(x, cache=full))
    for layer in range(3):
        kept = [c.kv[layer] if kind == 0 else (c.k[layer], c.v[layer]) for c in (short, full)]
        assert all(map(close, *kept))


# ---------------------------------------------------------------- cache, padding

def test_layout():
    """The picture of `layout`: positions count real columns, attention sees real columns that are
    not in the future; a padding column sees itself, so that no row of the mask is empty."""
    keep = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]]).bool()
    positions, mask = layout(keep, torch.arange(5))
    assert positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 1, 1, 2]]
    assert mask.shape == (3, 1, 5, 5)
    sees = [["".join(str(j) for j in range(5) if see[j]) for see in row[0]]
            for row in mask.tolist()]
    assert sees == [["0", "1", "2", "23", "234"], ["0", "01", "012", "0123", "01234"],
                    ["0", "1", "12", "123", "124"]]
    some, mask_of_some = layout(keep, torch.tensor([2, 3]))
    assert torch.equal(some, positions[:, 2:4]) and torch.equal(mask_of_some, mask[:, :, 2:4])


@pytest.mark.parametrize("splits", [(1,), (8,), (3, 5), (1, 2, 3, 4, 5, 6, 7, 8)])
@pytest.mark.parametrize("lengths", [(9, 9), (9, 4, 1)], ids=["unpadded", "padded"])
def test_cached_equals_uncached(model, lengths, splits):
    """Read in parts through either cache, a sequence has the states of one whole reading."""
    ids, keep = left_padded([prompt(n) for n in lengths])
    whole = model(ids, keep=keep)
    for cache in caches(model, len(lengths), 20):
        parts = [model(ids[:, a:b], cache=cache, keep=None if keep.all() else keep[:, a:b])
                 for a, b in zip((0, *splits), (*splits, 9))]
        assert close(torch.cat(parts, 1)[keep], whole[keep])
        assert int(cache.length) == 9


def test_padding_that_begins_late(model):
    """Columns read without `keep` count as real when later ones are padded, in both caches."""
    ids = torch.tensor([prompt(6), prompt(6, 1)])
    keep = torch.tensor([[True, True], [False, True]])
    for cache in caches(model, 2):
        model(ids[:, :4], cache=cache)
        h = model(ids[:, 4:], cache=cache, keep=keep)
        assert close(h[0, -1], model(ids[:1])[0, -1])
        assert close(h[1, -1], model(ids[1:, [0, 1, 2, 3, 5]])[0, -1])


def test_growing_equals_static(model):
    """Prompt, padding in the middle, single steps: the two caches agree after every call."""
    ids, keep = left_padded([prompt(7), prompt(2)])
    steps = [(ids, keep), (torch.tensor([[1], [2]]), torch.tensor([[True], [False]])),
             (torch.tensor([[3], [4]]), None), (torch.tensor([[5, 6], [7, 8]]), None)]
    growing, static = caches(model, 2, 12)
    for x, k in steps:
        seen = k if k is not None else torch.ones_like(x, dtype=torch.bool)
        assert close(model(x, cache=growing, keep=k)[seen], model(x, cache=static, keep=k)[seen])


def test_gradient_through_the_cache(model):
    """Gradients of a loss after two cached readings are those of one whole reading."""
    ids = torch.tensor([prompt(9)])

    def gradients(h):
        model.zero_grad()
        model.head(h).logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    cache = GrowingCache()
    model(ids[:, :5], cache=cache)
    for a, b in zip(gradients(model(ids[:, 5:], cache=cache)), gradients(model(ids)[:, 5:])):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_padded_batch_equals_one_by_one(model):
    """Every real state of a left-padded batch is that of the row alone."""
    rows = [prompt(n) for n in (1, 40, 7, BLOCK)]
    ids, keep = left_padded(rows)
    h = model(ids, keep=keep)
    assert torch.isfinite(h).all()
    for row, state in zip(rows, h):
        assert close(state[-len(row):], model(torch.tensor([row]))[0])


@pytest.mark.parametrize("kind", [0, 1], ids=["growing", "static"])
def test_padding_content_is_invisible(model, kind):
    """Whatever ids are in padding columns, real positions keep the same bits."""
    rows = [prompt(n) for n in (12, 3, 7)]
    results = []
    for pad in (0, 66):
        ids, keep = left_padded(rows, pad)
        cache = caches(model, 3)[kind]
        h = model(ids, cache=cache, keep=keep)
        middle = torch.full((3, 1), pad)      # padding after the prompt, too
        model(middle, cache=cache, keep=torch.zeros(3, 1, dtype=torch.bool))
        results.append((h[keep], model(torch.tensor([[1], [2], [3]]), cache=cache)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_repeat_equals_repeated_prefill(model):
    """n rollouts from one repeated prefill are those of n prefills; the original stays."""
    ids, keep = left_padded([prompt(6), prompt(2)])
    cache, long = (StaticCache(model.config, B, 10, "cpu", torch.float32) for B in (2, 6))
    model(ids, cache=cache, keep=keep)
    model(ids.repeat_interleave(3, 0), cache=long, keep=keep.repeat_interleave(3, 0))
    twin = cache.repeat(3)
    for step in range(2):
        x = torch.arange(6)[:, None] + 10 * step
        assert close(model(x, cache=twin), model(x, cache=long))
    assert int(cache.length) == 6 and not cache.keep[:, 6:].any()
    assert not any(k[:, :, 6:].any() for k in cache.k)
    x = torch.tensor([[1], [2]])
    assert close(model(x, cache=cache)[0, 0], model(torch.tensor([prompt(6) + [1]]))[0, -1])


# ---------------------------------------------------------------- decoding

PROMPTS = [prompt(n) for n in (3, 60, 1, 17)]
NEVER = 62      # a token that greedy decoding of this section's prompts does not meet: no eos


@pytest.mark.parametrize("row", range(len(PROMPTS)))
@pytest.mark.parametrize("nth", [0, 1, 4])
def test_decode_equals_one_by_one(model, row, nth):
    """Rows of very different lengths, each ending at its own eos, one of them at once."""
    eos = greedy(model, PROMPTS[row], 12, None)[nth]
    expected = [greedy(model, p, 12, eos) for p in PROMPTS]
    assert len(expected[row]) <= nth
    assert decode(model, PROMPTS, 12, eos) == expected


def test_decode_stops_when_all_rows_are_done(model):
    """No step is computed after the last row's eos, nor after max_new tokens."""
    calls = []
    tokens = greedy(model, PROMPTS[1], 12, None)
    eos = next(t for i, t in enumerate(tokens) if i >= 2 and t not in tokens[:i])
    model.register_forward_hook(lambda *_: calls.append(1))
    assert decode(model, [PROMPTS[1]] * 2, 50, eos) == [tokens[:tokens.index(eos)]] * 2
    assert len(calls) == 1 + tokens.index(eos)      # the prefill, and a step for each token but eos
    calls.clear()
    assert [len(row) for row in decode(model, PROMPTS, 5, NEVER)] == [5] * 4 and len(calls) == 5
    assert decode(model, PROMPTS, 0, NEVER) == [[]] * 4


def test_decode_never_passes_block_size(model):
    """A row ends with the token that the last position predicts; a full prompt gets only that."""
    rows = [prompt(n) for n in (BLOCK, BLOCK - 1, BLOCK - 7, 80)]
    out = decode(model, rows, 12, NEVER)
    assert [len(row) for row in out] == [1, 2, 8, 12]
    assert out == [greedy(model, row, 12, None) for row in rows]


# ---------------------------------------------------------------- released weights

def as_released(state):
    """The recipe as older releases have it: with the tied head and the causal-mask buffers."""
    n = SHAPE["n_positions"]
    extra = {f"transformer.h.{i}.attn.bias": torch.ones(n, n).tril()[None, None] for i in range(3)}
    extra |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    return state | extra | {"lm_head.weight": state["transformer.wte.weight"]}


@pytest.mark.parametrize("change", [
    as_released, lambda s: s, lambda s: {k.removeprefix("transformer."): v for k, v in s.items()},
    lambda s: {k.removeprefix("transformer."): v for k, v in as_released(s).items()}],
    ids=["with-buffers", "prefix", "no-prefix", "no-prefix-with-buffers"])
def test_from_pretrained_file(model, tmp_path, change):
    """A local pytorch_model.bin in any of its spellings, with n_head from config.json beside it."""
    torch.save(change(weights()), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(dict(n_head=4, n_layer=3)))
    loaded = pretrained(str(tmp_path / "pytorch_model.bin"), dropout=0.25)
    assert loaded.config == GPT2Config(96, 67, 3, 4, 32, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))


def test_n_head_given_or_guessed(tmp_path):
    """Without config.json, n_head is what was passed, or else heads have 64 channels."""
    torch.save(weights(n_embd=128, n_layer=1), tmp_path / "w.bin")
    assert pretrained(str(tmp_path / "w.bin")).config.n_head == 2
    assert pretrained(str(tmp_path / "w.bin"), n_head=8).config.n_head == 8


@pytest.mark.parametrize("change, name", [
    (lambda s: s.pop("transformer.h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias"),
    (lambda s: s.pop("transformer.wte.weight"), "wte.weight"),
    (lambda s: s.pop("transformer.wpe.weight"), "wpe.weight"),
    (lambda s: s.update({"transformer.h.0.extra.weight": torch.zeros(3)}), "h.0.extra.weight"),
    (lambda s: s.update({"transformer.ln_f.weight": torch.zeros(31)}), "ln_f.weight"),
    (lambda s: s.update({"transformer.h.2.attn.c_attn.weight": torch.zeros(96, 32)}),
     "h.2.attn.c_attn.weight"),
    (lambda s: s.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(3)}),
     "h.0.mlp.c_fc.weight"),
], ids=["missing", "no-wte", "no-wpe", "unexpected", "shape", "transposed", "dimensions"])
def test_wrong_weight_is_named(tmp_path, change, name):
    """A missing, unexpected or misshapen weight is a UserError that names file and weight."""
    state = weights()
    change(state)
    torch.save(state, tmp_path / "w.bin")
    with pytest.raises(UserError) as error:
        pretrained(str(tmp_path / "w.bin"), n_head=4)
    assert name in str(error.value) and "w.bin" in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_downloaded(monkeypatch, tmp_path, name):
    """A preset's name asks torch.hub for the released file, once, and sets its n_head."""
    asked, n_head = [], PRESETS[name]["n_head"]

    def download(url, path):
        asked.append(url)
        torch.save(as_released(weights(n_embd=2 * n_head)), path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert pretrained(name).config.n_head == n_head
    site = "https://huggingface.co/openai-community"
    assert asked == [f"{site}/{name}/resolve/main/pytorch_model.bin"]


def test_grow_vocab(model):
    """New rows are copies of one row, old logits stay, and the head is still tied."""
    ids = torch.tensor([prompt(9)])
    before = model.head(model(ids))
    model.grow_vocab(70, copy_from=11)
    logits = model.head(model(ids))
    assert model.config.vocab_size == 70 and logits.shape == (1, 9, 70)
    assert torch.equal(model.wte.weight[67:], model.wte.weight[[11, 11, 11]])
    assert close(logits[..., :67], before) and close(logits[..., 67:], before[..., [11, 11, 11]])
    logits[..., 69].sum().backward()
    assert model.wte.weight.grad[69].any() and model.wte.weight.grad[ids[0, 0]].any()


def test_grow_vocab_without_a_model_row(model):
    """With nothing to copy, new rows are small and differ."""
    model.grow_vocab(267)
    new = model.wte.weight[67:]
    assert new.std().item() == pytest.approx(0.02, rel=0.1) and not torch.equal(new[0], new[1])


# ---------------------------------------------------------------- initialisation, training

def test_size_of_gpt2():
    """The gpt2 preset has the 124,439,808 parameters of the release."""
    with torch.device("meta"):
        assert GPT2(GPT2Config(**PRESETS["gpt2"])).n_params() == 124_439_808


@pytest.mark.parametrize("embd_std", [0.02, 0.1])
def test_initialisation(embd_std):
    """N(0, 0.02), projections into the residual stream by 1 / sqrt(2 n_layer) less, embeddings as
    configured, no biases."""
    model = GPT2(GPT2Config(block_size=64, vocab_size=200, n_layer=8, n_head=4, n_embd=64,
                            embd_std=embd_std, pos_std=2 * embd_std))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / 4 if "c_proj" in name else 0.02
            std = {"wte.weight": embd_std, "wpe.weight": 2 * embd_std}.get(name, std)
            assert p.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(p.mean().item()) < 0.1 * std, name
        else:
            assert torch.equal(p, torch.full_like(p, "weight" in name)), name


def test_n_head_must_divide_the_width():
    """Heads that do not fit are a ValueError, not a crash in the first forward."""
    with pytest.raises(ValueError, match="n_head"):
        GPT2(GPT2Config(n_embd=10, n_head=4, n_layer=1))


def test_only_matrices_of_blocks_decay(model):
    """Biases, norms and embeddings do not; every parameter is in one group, once."""
    flags = SimpleNamespace(optimizer="adamw", lr=1.0, weight_decay=0.1, beta2=0.95)
    optimizer, = new_optimizers(flags, model)
    decay, rest = optimizer.param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    assert sorted(names) == sorted(id(p) for group in (decay, rest) for p in group["params"])
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert {names[id(p)] for p in decay["params"]} == {
        f"h.{i}.{part}.weight" for i in range(3) for part in parts}


def test_muon_has_the_matrices_of_a_projection(model):
    """As AdamW drives them, the thoughts of some seeds become the same for all questions."""
    flags = SimpleNamespace(optimizer="muon", lr=1.0, weight_decay=0.1, momentum=0.9, beta2=0.95)
    projection = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.LayerNorm(32))
    muon, adamw = new_optimizers(flags, model, projection)
    assert muon.param_groups[0]["params"][-1] is projection[0].weight
    assert all(p.dim() == 2 for p in muon.param_groups[0]["params"])
    own = [projection[0].bias, projection[1].weight, projection[1].bias]
    assert all(a is b for a, b in zip(adamw.param_groups[0]["params"][-3:], own))


def test_dropout_in_training_only():
    """Dropout makes two training passes differ; evaluation, and training at rate 0, are exact."""
    ids, plain = torch.tensor([prompt(9)]), tiny_model()
    dropping = GPT2.from_huggingface(weights(), n_head=4, dropout=0.3)
    assert not torch.equal(dropping.train()(ids), dropping(ids))
    assert torch.equal(dropping.eval()(ids), plain(ids))
    assert torch.equal(plain.train()(ids), plain.eval()(ids))


def test_flops_per_token():
    """The estimate is what torch counts for forward and backward, attention in full, within 3 %."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model, T = GPT2(GPT2Config(block_size=128, vocab_size=9, n_layer=2, n_head=4, n_embd=64)), 128
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(embeds=torch.randn(2, T, 64, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == pytest.approx(2 * T * model.flops_per_token(T), rel=0.03)


def test_compiled_step_is_compiled_once(model):
    """Decoding many tokens for several batches of one shape through torch.compile compiles one
    graph."""
    compiled, batches = CompileCounter(), (PROMPTS, PROMPTS[::-1])
    plain = decode(model, PROMPTS, 12, NEVER)
    started = [prefill(model, prompts, 12) for prompts in batches]
    model.compile(backend=compiled)
    assert [model.decode(*start, 12, NEVER) for start in started] == [plain, plain[::-1]]
    assert compiled.frame_count == 1


def test_compiled_step_copies_no_more_than_a_layers_keys(model):
    """In the graph that a compiler gets, where writes are copies, no tensor is made that is larger
    than that."""
    made, plain = [], decode(model, PROMPTS, 12, NEVER)

    def look(graph, inputs):
        for node in graph.graph.nodes:
            if node.op == "call_function" and hasattr(node.meta["val"], "numel"):
                made.append(node.meta["val"].numel())
        return make_boxed_func(graph.forward)

    start = prefill(model, PROMPTS, 12)
    model.compile(backend=aot_autograd(fw_compiler=look))
    assert model.decode(*start, 12, NEVER) == plain
    size = max(map(len, PROMPTS)) + 12
    assert len(made) > 50 and max(made) == len(PROMPTS) * size * 32


# ---------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 32)])
def test_orthogonal_keeps_singular_vectors_and_evens_out_singular_values(shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    values = u.T @ orthogonal(m) @ vh.T
    assert (values.diagonal() > 0.6).all() and (values.diagonal() < 1.3).all()
    assert (values - values.diagonal().diag()).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(128, 128), (24, 8), (8, 32)])
@pytest.mark.parametrize("smallest", [1, 1e-4, 0])
def test_orthogonal_is_newton_schulz_in_double_precision(shape, smallest):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    m = u * torch.linspace(1, smallest, min(shape)) @ vh
    m[:, min(shape) // 2:] *= smallest                          # half of it, at last, is missing
    x = m / m.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    assert (orthogonal(m.float()) - x).norm() < 1e-3 * x.norm()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon; 2.9 has")
def test_muon_is_torchs_muon_without_its_rounding():
    start = torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    mine = Muon([ours], lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1,
                                 adjust_lr_fn="match_rms_adamw")
    for i in range(5):
        grad = torch.randn(16, 48, generator=torch.Generator().manual_seed(2 + i))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        reference.step()
    change = (ours - start).norm()
    assert change > 0.1 and (ours - theirs).norm() < 0.03 * change
