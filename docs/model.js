/* GPT-2 that thinks, in plain JavaScript: the forward pass of gpt2.py, the latent loop of
   coconut.py, the soft token of soft_thinking.py. No library, no network, one thread.

   A language model that reasons in words feeds its last token back; Coconut feeds back the last
   hidden state, whole, as the next input:

       h = forward(model, embed(model, ids), cache)     // (T, C) -> (C,), the state after ln_f
       h = forward(model, h, cache)                     // the state is the next input: one thought
       logits = head(model, h)                          // (C,) -> (V,), where they are needed

   Shapes: T new positions, S positions seen so far, C channels, H heads, V vocabulary. There is no
   batch. A matrix is one Float32Array, row after row.
   Read on in this order: forward, think, readInstead, decode, nodeValues, softToken, softThink. */
"use strict";

// ---------------------------------------------------------------- weights

/* A model from what docs/export.py wrote: all its tensors, one after the other, in float16. */
function openModel(spec) {
  const bytes = atob(spec.weights), all = new Float32Array(bytes.length / 2), weights = {};
  for (let i = 0; i < all.length; i++) {
    all[i] = fromHalf(bytes.charCodeAt(2 * i) + 256 * bytes.charCodeAt(2 * i + 1));
  }
  let start = 0;
  for (const [name, size] of spec.tensors) weights[name] = all.subarray(start, start += size);
  const ids = new Map(spec.pieces.map((piece, id) => [piece, id]));
  const { n_layer: layers, n_head: H, n_embd: C, block_size: positions } = spec.config;
  return { ...spec, weights, ids, split: new RegExp(spec.pattern, "gu"), layers, H, C, positions };
}

/* float16: 1 bit of sign, 5 of exponent, 10 of fraction -> its value. (It is always finite.) */
function fromHalf(bits) {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
  return bits >> 15 ? -size : size;
}

/* Text -> token ids. Throws an Error for a piece that is not in the vocabulary. */
function encode(model, text) {
  return (text.match(model.split) ?? []).map(piece => {
    if (!model.ids.has(piece)) throw new Error(`the model does not know “${piece.trim()}”`);
    return model.ids.get(piece);
  });
}

/* Token ids -> text; the four special tokens have no piece of their own. */
function textOf(model, ids) {
  return ids.map(id => model.pieces[id] ?? model.special[id - model.pieces.length]).join("");
}

// ---------------------------------------------------------------- parts of a transformer

/* x (T, I) times W (O, I) transposed, plus b (O,) -> (T, O). Four outputs at a time, so that they
   share each number of x that is loaded: twice as fast as one by one. */
function linear(x, W, b) {
  const O = b.length, I = W.length / O, y = new Float32Array(x.length / I * O);
  for (let row = 0, at = 0; row < x.length; row += I) {
    let o = 0;
    for (; o + 4 <= O; o += 4) {
      let s0 = b[o], s1 = b[o + 1], s2 = b[o + 2], s3 = b[o + 3];
      for (let i = 0, w = o * I; i < I; i++, w++) {
        const v = x[row + i];
        s0 += v * W[w];
        s1 += v * W[w + I];
        s2 += v * W[w + 2 * I];
        s3 += v * W[w + 3 * I];
      }
      y[at++] = s0;
      y[at++] = s1;
      y[at++] = s2;
      y[at++] = s3;
    }
    for (; o < O; o++) {
      let sum = b[o];
      for (let i = 0; i < I; i++) sum += x[row + i] * W[o * I + i];
      y[at++] = sum;
    }
  }
  return y;
}

/* Each row of x (T, C) to mean 0 and variance 1, then scaled and moved by what was learned. */
function layerNorm(x, scale, shift) {
  const C = scale.length, y = new Float32Array(x.length);
  for (let row = 0; row < x.length; row += C) {
    let mean = 0, variance = 0;
    for (let i = 0; i < C; i++) mean += x[row + i] / C;
    for (let i = 0; i < C; i++) variance += (x[row + i] - mean) ** 2 / C;
    const deviation = Math.sqrt(variance + 1e-5);
    for (let i = 0; i < C; i++) y[row + i] = (x[row + i] - mean) / deviation * scale[i] + shift[i];
  }
  return y;
}

/* GPT-2's tanh approximation of GELU. */
function gelu(x) {
  return x.map(v => 0.5 * v * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v * v * v))));
}

/* exp(x) / sum exp(x), in the place of x. */
function softmax(x) {
  const most = x.reduce((a, b) => Math.max(a, b));
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i] = Math.exp(x[i] - most);
  for (let i = 0; i < x.length; i++) x[i] /= sum;
  return x;
}

function add(x, y) {
  return x.map((v, i) => v + y[i]);
}

/* Arrays (T1, C), (T2, C), .. -> (T1 + T2 + .., C). */
function concat(parts) {
  return Float32Array.from(parts.flatMap(part => Array.from(part)));
}

// ---------------------------------------------------------------- the model

/* Keys and values (positions, C) of what was read, for each layer. looks (S,): how much the last
   position looked at each other one, mean over layers and heads. */
function newCache(model) {
  const room = () => new Float32Array(model.positions * model.C);
  const k = Array.from({ length: model.layers }, room);
  return { k, v: k.map(room), length: 0, looks: null };
}

/* A cache that goes on from what this one has read: two continuations share one prefix. */
function fork(cache) {
  return { ...cache, k: cache.k.map(k => k.slice()), v: cache.v.map(v => v.slice()) };
}

/* Token ids -> their embeddings (T, C). */
function embed(model, ids) {
  const { C } = model, wte = model.weights["wte.weight"];
  return concat(ids.map(id => wte.subarray(id * C, (id + 1) * C)));
}

/* Read T vectors x (T, C) after those in the cache -> the state of the last one after ln_f, (C,).
   For the others the last block computes keys and values only: nothing else is looked at. */
function forward(model, x, cache) {
  const { C } = model, start = cache.length, S = start + x.length / C;
  if (S > model.positions) throw new Error(`the model has only ${model.positions} positions`);
  cache.length = S;
  cache.looks = new Float32Array(S);
  x = add(x, model.weights["wpe.weight"].subarray(start * C, S * C));
  for (let layer = 0; layer < model.layers; layer++) {
    const w = name => model.weights[`h.${layer}.${name}`];
    const normed = layerNorm(x, w("ln_1.weight"), w("ln_1.bias"));                   // (T, C)
    // the rows of c_attn make queries, keys and values: C each
    const [q, k, v] = [0, 1, 2].map(part => {
      const from = part === 0 && layer === model.layers - 1 ? normed.subarray(-C) : normed;
      return linear(from, w("attn.c_attn.weight").subarray(part * C * C, (part + 1) * C * C),
                    w("attn.c_attn.bias").subarray(part * C, (part + 1) * C));
    });
    cache.k[layer].set(k, start * C);
    cache.v[layer].set(v, start * C);
    const seen = attention(model, q, cache, layer);                              // (T or 1, C)
    x = add(x.subarray(-q.length), linear(seen, w("attn.c_proj.weight"), w("attn.c_proj.bias")));
    const inner = gelu(linear(layerNorm(x, w("ln_2.weight"), w("ln_2.bias")),
                              w("mlp.c_fc.weight"), w("mlp.c_fc.bias")));           // (.., 4C)
    x = add(x, linear(inner, w("mlp.c_proj.weight"), w("mlp.c_proj.bias")));
  }
  return layerNorm(x.subarray(-C), model.weights["ln_f.weight"], model.weights["ln_f.bias"]);
}

/* What each query q (n, C), of the last n positions, takes from the values up to its own. */
function attention(model, q, cache, layer) {
  const { C, H } = model, D = C / H, k = cache.k[layer], v = cache.v[layer], n = q.length / C;
  const y = new Float32Array(q.length);
  for (let row = 0; row < n; row++) {
    const S = cache.length - n + row + 1;                     // positions that this one may see
    for (let head = 0; head < C; head += D) {
      const weight = new Float32Array(S);
      for (let s = 0; s < S; s++) {
        let dot = 0;
        for (let i = head; i < head + D; i++) dot += q[row * C + i] * k[s * C + i];
        weight[s] = dot / Math.sqrt(D);
      }
      softmax(weight);
      for (let s = 0; s < S; s++) {
        for (let i = head; i < head + D; i++) y[row * C + i] += weight[s] * v[s * C + i];
        if (row === n - 1) cache.looks[s] += weight[s] / (H * model.layers);
      }
    }
  }
  return y;
}

/* Logits (V,) of a state (C,), through the tied token embedding. */
function head(model, h) {
  const wte = model.weights["wte.weight"];
  return linear(h, wte, new Float32Array(wte.length / model.C));
}

// ---------------------------------------------------------------- Coconut

/* Read the prompt (ids), then feed the last state back as the next input, n times. Returns the
   thoughts, each h (C,) and the looks of the position whose state it is, and x, what is still to
   be read: the last thought, or the whole prompt if there are none. */
function think(model, cache, prompt, n) {
  let x = embed(model, prompt);
  const thoughts = [];
  for (let i = 0; i < n; i++) {
    x = forward(model, x, cache);
    thoughts.push({ h: x, looks: cache.looks });
  }
  return { thoughts, x };
}

/* Read what think left over, then language (ids) -> the state that predicts what comes next. */
function readOn(model, cache, x, language) {
  return forward(model, concat([x, embed(model, language)]), cache);
}

/* Go on from a cache that has read the prompt with these states, a list of (C,), in place of the
   model's own thoughts, then language (ids) -> what readOn returns, and the new cache. */
function readInstead(model, prompt, states, language) {
  const cache = fork(prompt);
  return { h: readOn(model, cache, concat(states), language), cache };
}

/* Go on greedily from a state (C,) to the end of the text: [{id, p}], without the end. */
function decode(model, cache, h, most = 64) {
  const said = [];
  while (said.length < most) {
    const p = softmax(head(model, h)), id = p.indexOf(Math.max(...p));
    if (id === model.eos) break;
    said.push({ id, p: p[id] });
    if (cache.length >= model.positions) break;
    h = forward(model, embed(model, [id]), cache);
  }
  return said;
}

/* The value of each node: the probability of its name, the product over the name's tokens, after
   what the cache holds; h (C,) predicts the first token. names: a list of id lists. */
function nodeValues(model, cache, h, names) {
  const first = softmax(head(model, h));
  return names.map(name => {
    let value = first[name[0]];
    const own = name.length > 1 ? fork(cache) : null;
    for (let i = 1; i < name.length; i++) {
      value *= softmax(head(model, forward(model, embed(model, [name[i - 1]]), own)))[name[i]];
    }
    return value;
  });
}

// ---------------------------------------------------------------- Soft Thinking

/* Logits (V,) -> what is fed back: [{id, p, weight}] in descending order of p, weights summing to
   1, and the entropy in nats. temperature 0.6, top-k 30, top-p 0.95, min-p 0.001 are the papers'.
   greedy: all weight on the first. soft: the weights are p. gumbel: softmax((ln p + g) / tau), with
   g of noise, a function of the rank; towards tau 0 it is one token, drawn from p. */
function softToken(logits, mode, tau, noise) {
  const all = softmax(logits.map(x => x / 0.6));
  const entropy = all.reduce((sum, p) => sum - (p ? p * Math.log(p) : 0), 0);
  let found = Array.from(all, (p, id) => ({ id, p })).sort((a, b) => b.p - a.p).slice(0, 30);
  let sum = 0;
  const total = found.reduce((s, one) => s + one.p, 0);
  found = found.filter(one => (sum += one.p) - one.p < 0.95 * total);
  found = found.filter(one => one.p >= 0.001 * found[0].p).slice(0, mode === "gumbel" ? 15 : 10);
  const kept = found.reduce((s, one) => s + one.p, 0);
  let weights = found.map(one => one.p / kept);
  if (mode === "greedy") weights = weights.map((_, i) => Number(i === 0));
  if (mode === "gumbel") weights = softmax(weights.map((p, i) => (Math.log(p) + noise(i)) / tau));
  return { entropy, fed: found.map((one, i) => ({ ...one, p: one.p / kept, weight: weights[i] })) };
}

/* Soft thinking from the state h (C,) on: steps [{fed, entropy, id}], id the token of the largest
   weight, until these spell the mark "###" at the beginning of a line, or for 40 steps, after which
   the mark is put in; then the answer, greedily: [{id, p}]. The mark belongs to the answer. */
function softThink(model, cache, h, mode, tau, noise) {
  const steps = [], rows = model.weights["wte.weight"], { C } = model;
  for (let line = ""; ;) {
    const step = softToken(head(model, h), mode, tau, rank => noise(steps.length, rank));
    const heaviest = step.fed.reduce((a, b) => (b.weight > a.weight ? b : a));
    line += textOf(model, [heaviest.id]);
    const full = steps.length === 40;
    if (full || line.startsWith("###") || heaviest.id === model.eos) {
      const mark = full || heaviest.id === model.eos ? model.mark : [heaviest.id];
      h = forward(model, embed(model, mark), cache);
      return { steps, answer: [...mark.map(id => ({ id })), ...decode(model, cache, h, 24)] };
    }
    steps.push({ ...step, id: heaviest.id });
    if (line.endsWith("\n")) line = "";
    const x = new Float32Array(C);                           // the mixture: sum_i w_i e_i
    for (const { id, weight } of step.fed) {
      for (let i = 0; i < C; i++) x[i] += weight * rows[id * C + i];
    }
    h = forward(model, x, cache);
  }
}

if (typeof module !== "undefined") {       // for tests/test_page.py, under Node
  module.exports = { openModel, encode, textOf, newCache, embed, forward, head, think, readOn,
                     readInstead, decode, nodeValues, softThink };
}
