/* What docs/model.js computes, as JSON, for tests/test_page.py, which compares it with PyTorch.

   node page_numbers.js FOLDER NAME N: the first N questions, asked of the model NAME. */
"use strict";

const [folder, name, n] = process.argv.slice(2);
require(`${folder}/data.js`);
const m = require(`${folder}/model.js`);
const model = m.openModel(DATA.models[name]), coconut = name.endsWith("coconut");
const items = DATA[name.split("-")[0]].slice(0, Number(n));
const k = coconut ? model.mean.length : 0;
const text = words => m.textOf(model, words.map(word => word.id));

/* Read the question and think: ids, thoughts, the logits of the first word, and what follows. */
function own(item) {
  const ids = m.encode(model, item.question + "\n"), cache = m.newCache(model);
  const { thoughts, x } = m.think(model, cache, coconut ? [...ids, model.bot] : ids, k);
  const h = coconut ? m.readOn(model, cache, x, [model.eot]) : m.forward(model, x, cache);
  const logits = Array.from(m.head(model, h)), prompt = { ...cache, length: ids.length + 1 };
  return { ids, thoughts, prompt, logits, keep: text(m.decode(model, cache, h)) };
}

/* With other states in place of the thoughts. */
function instead(prompt, states) {
  const { h, cache } = m.readInstead(model, prompt, states, [model.eot]);
  return text(m.decode(model, cache, h));
}

/* Soft thinking from the end of the question: the text. noise: Gumbel noise (steps, ranks). */
function soft(item, mode, noise) {
  const cache = m.newCache(model), ids = m.encode(model, item.question + "\n");
  const h = m.forward(model, m.embed(model, ids), cache);
  const draw = (step, rank) => noise[step][rank];
  const { steps, answer } = m.softThink(model, cache, h, mode, 0.5, draw);
  return text([...steps, ...answer]);
}

/* Noise that a test can make too: no random number. */
const noise = Array.from({ length: 41 }, (_, step) => Array.from({ length: 15 }, (_, rank) =>
  2 * Math.sin(1 + 7 * step + 3 * rank)));

const found = items.map(own);
const rows = items.map((item, i) => {
  const { ids, thoughts, prompt, logits, keep } = found[i];
  if (!coconut) {
    const modes = i < 10 && ["greedy", "soft", "gumbel"];
    return { ids, logits, keep, soft: modes && modes.map(mode => soft(item, mode, noise)) };
  }
  const row = { ids, logits, keep, looks: Array.from(thoughts.at(-1).looks) };
  row.thoughts = thoughts.map(({ h }) => Array.from(h));
  row.remove = instead(prompt, []);
  if (i < 40) row.swap = instead(prompt, found.at(i - 1).thoughts.map(({ h }) => h));
  if (item.edges) {
    row.values = {};
    for (const after of Object.keys(DATA.probe)) {
      const states = thoughts.slice(0, after).map(({ h }) => h);
      const every = [model.eot, ...m.encode(model, "Every")];
      const { h, cache } = m.readInstead(model, prompt, states, every);
      const names = item.idx_to_symbol.map(symbol => DATA.names[symbol]);
      row.values[after] = m.nodeValues(model, cache, h, names);
    }
  }
  return row;
});
process.stdout.write(JSON.stringify(rows));
