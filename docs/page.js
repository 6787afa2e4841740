/* The page that thinks: what its three scenes share, and its start. The scenes are in words.js,
   search.js and soft.js; what they draw is computed by model.js. data.js, written by export.py, has
   the models, the questions and the words: no result of theirs is typed in.

   Read on in this order: asking a model; drawing; parts of a scene; start. */
"use strict";

// ---------------------------------------------------------------- asking a model

const KINDS = ["keep", "remove", "zero", "noise", "swap", "mean"];
const TITLES = {
  keep: "the model's own thought",
  remove: "no thought: the position goes, too",
  zero: "zeros",
  noise: "a random direction, as long as the thought",
  swap: "the thought of the question before this one",
  mean: "the mean thought of this position over all test questions",
};
const MODELS = {};

/* A model of DATA, unpacked when it is first needed. */
function modelOf(name) {
  MODELS[name] ??= openModel(DATA.models[name]);
  return MODELS[name];
}

/* What a model of chain of thought writes: words [{id, p}], text, and the positions it used. */
function inWords(model, question) {
  const cache = newCache(model), ids = encode(model, question + "\n");
  const words = decode(model, cache, forward(model, embed(model, ids), cache));
  return { ids, words, text: said(model, words), positions: cache.length };
}

/* What Coconut thinks about a question: its own thoughts, and a cache that has read the prompt. */
function ownThoughts(model, question, n) {
  const cache = newCache(model), ids = encode(model, question + "\n");
  const { thoughts, x } = think(model, cache, [...ids, model.bot], n);
  if (n === 0) forward(model, x, cache);
  // shortened to the prompt: what was read after it is written over
  return { ids, thoughts, prompt: { ...cache, length: ids.length + 1 } };
}

/* The states that are read in place of thoughts: [{h, kind}], h null where one is removed. other:
   () => the thoughts of another question; seed: of the noise. */
function changed(model, thoughts, kinds, other, seed) {
  return thoughts.map(({ h }, i) => {
    const kind = kinds[i];
    if (kind === "remove") return { kind, h: null };
    if (kind === "zero") return { kind, h: new Float32Array(model.C) };
    if (kind === "noise") return { kind, h: noiseLike(h, 1000 * seed + i) };
    if (kind === "swap") return { kind, h: other()[i].h };
    if (kind === "mean") return { kind, h: Float32Array.from(model.mean[i]) };
    return { kind, h };
  });
}

/* Numbers between 0 and 1 that depend only on the seed (the generator mulberry32). */
function random(seed) {
  return () => {
    seed = (seed + 0x6D2B79F5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t ^= t + Math.imul(t ^ (t >>> 7), 61 | t);
    return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
}

/* A random direction with the length of h (C,): normal numbers by Box and Muller. */
function noiseLike(h, seed) {
  const draw = random(seed);
  const normal = h.map(() => Math.sqrt(-2 * Math.log(draw())) * Math.cos(2 * Math.PI * draw()));
  const scale = norm(h) / norm(normal);
  return normal.map(v => v * scale);
}

function norm(h) {
  return Math.sqrt(h.reduce((sum, v) => sum + v * v, 0));
}

/* What Coconut writes after these states: words, text, how many states it read, positions. */
function answerAfter(model, prompt, states) {
  const { h, cache } = readInstead(model, prompt, states, [model.eot]);
  const words = decode(model, cache, h);
  return { words, text: said(model, words), read: states.length, positions: cache.length };
}

function said(model, words) {
  return textOf(model, words.map(word => word.id));
}

/* What follows the last "###", up to the end of the line: the answer as common/scoring.py reads
   it. */
function answerIn(text) {
  const parts = text.split(/#{3,}/);
  return parts.length > 1 ? parts.at(-1).split("\n")[0].trim() : "";
}

/* The tokens nearest to a state: [{piece, p}]. */
function nearest(model, h, n = 5) {
  const p = softmax(head(model, h));
  const best = Array.from(p.keys()).sort((a, b) => p[b] - p[a]).slice(0, n);
  return best.map(id => ({ piece: textOf(model, [id]), p: p[id] }));
}

// ---------------------------------------------------------------- drawing: small things

/* An HTML element. attributes: on.. are listeners, others are set; children: elements or texts. */
function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null && child !== false));
  return element;
}

function percent(p, digits = 0) {
  return `${(100 * p).toFixed(digits)} %`;
}

/* A token as the reader sees it: blanks at its ends do not matter, a line break does. */
function shown(piece) {
  return piece === "\n" ? "⏎" : piece.trim() || "␣";
}

/* A state (C,) as a small picture: 16 x 8 cells, blue below 0, orange above. */
function picture(h) {
  const canvas = el("canvas", { width: 16, height: 8, class: "picture", "aria-hidden": "true" });
  const context = canvas.getContext("2d"), image = context.createImageData(16, 8);
  h.forEach((v, i) => {
    const color = v < 0 ? [0, 114, 178] : [213, 94, 0];
    image.data.set([...color, 255 * Math.min(1, Math.abs(v) / 1.6)], 4 * i);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

/* Bars of [{label, p, weight?, mark?}], the longest in full. */
function bars(rows) {
  return el("div", { class: "bars" }, ...rows.map(({ label, p, weight, mark }) =>
    el("div", { class: "bar" + (mark ? ` ${mark}` : "") },
      el("code", {}, label),
      el("span", { class: "track" },
        el("i", { class: "p", style: `width:${100 * p}%` }),
        weight !== undefined && el("i", { class: "weight", style: `width:${100 * weight}%` })),
      el("b", {}, percent(weight ?? p)))));
}

/* The question with a shade on each token, as dark as the model looked at it. */
function shaded(model, ids, looks) {
  const most = Math.max(...looks.slice(0, ids.length));
  return el("p", { class: "shaded" }, ...ids.map((id, i) => {
    const piece = textOf(model, [id]);
    return el("span", { style: `--share:${(looks[i] / most).toFixed(3)}`,
                        title: `${shown(piece)}: ${percent(looks[i], 1)}` },
              piece === "\n" ? " ⏎" : piece);
  }));
}

/* An answer next to the right one. */
function showAnswer(element, answer, right, note = "") {
  const good = answer === right;
  element.className = `answer ${good ? "right" : "wrong"}`;
  element.replaceChildren(
    el("span", {}, "answer "), el("strong", {}, answer || "none"),
    el("span", { class: "verdict" }, good ? " ✓ right" : ` ✗ it is ${right}`),
    note ? el("small", {}, note) : "");
}

function counts(element, rows) {
  element.replaceChildren(...rows.flatMap(([name, value, of]) => [
    el("dt", {}, name),
    el("dd", {}, el("b", {}, String(value)),
       el("i", { style: `width:${Math.min(100, 100 * value / of)}%` }))]));
}

// ---------------------------------------------------------------- what the scenes share

/* The parts of a scene, by their data- attributes. */
function partsOf(id) {
  const root = document.getElementById(`scene-${id}`), parts = { root };
  for (const element of root.querySelectorAll("*")) {
    for (const name of Object.keys(element.dataset)) parts[name] ??= element;
  }
  return parts;
}

/* Buttons and a number that choose one of n questions; change(i) is told which. */
function picker(element, n, change) {
  const number = el("input", { type: "number", min: 1, max: n, value: 1,
                               "aria-label": "number of the test question",
                               onchange: () => go(number.value === "" ? 0 : number.value - 1) });
  function go(i) {
    const index = Number.isInteger(i) ? ((i % n) + n) % n : 0;
    number.value = index + 1;
    change(index);
  }
  element.replaceChildren(
    el("button", { onclick: () => go(number.value - 2), "aria-label": "question before" }, "‹"),
    el("label", {}, "test question ", number, ` of ${n}`),
    el("button", { onclick: () => go(+number.value), "aria-label": "next question" }, "›"),
    el("button", { onclick: () => go(Math.floor(Math.random() * n)) }, "any"));
  return { next: () => go(+number.value), before: () => go(number.value - 2), go };
}

/* Buttons that do one thing to all thoughts. */
function forAll(element, choose) {
  element.replaceChildren(...KINDS.map(kind =>
    el("button", { "data-kind": kind, title: TITLES[kind], onclick: () => choose(kind) }, kind)));
}

/* A thought as a card: its picture, what it decodes to, what is read in its place. */
function card(model, i, state, thought, selected, choose, select) {
  const h = state.h ?? thought.h, top = nearest(model, h, 1)[0];
  const options = KINDS.map(kind => el("option", { selected: kind === state.kind }, kind));
  return el("div", { class: `thought ${state.kind}${selected ? " selected" : ""}`,
                     "data-thought": i + 1, onmouseenter: select, onfocusin: select },
    el("button", { class: "face", onclick: select, "aria-label": `look into thought ${i + 1}` },
       state.h ? picture(h) : el("span", { class: "gone" }, "removed"),
       el("span", {}, `thought ${i + 1}`),
       el("code", {}, state.h ? shown(top.piece) : "–"),
       el("small", {}, state.h ? percent(top.p) : "")),
    el("select", { "aria-label": `what is read as thought ${i + 1}`, title: TITLES[state.kind],
                   onchange: event => choose(event.target.value) }, ...options));
}

/* What there is to know of one thought: nearest tokens, norm, what it looked at. */
function detail(element, model, ids, i, state, thought) {
  const looks = thought.looks, own = Array.from(looks.slice(0, ids.length));
  const at = own.indexOf(Math.max(...own)), h = state.h;
  element.replaceChildren(
    el("h3", {}, `Thought ${i + 1}`, el("small", {}, ` ${TITLES[state.kind]}`)),
    el("div", { class: "columns" },
      el("div", {},
        el("h4", {}, h ? "nearest tokens" : "nothing is read here"),
        h && bars(nearest(model, h).map(({ piece, p }) => ({ label: shown(piece), p }))),
        el("p", { class: "note" }, h ? `norm ${norm(h).toFixed(1)}` : "")),
      el("div", {},
        el("h4", {}, "where the model looked when it made its own"),
        shaded(model, ids, looks),
        el("p", { class: "note" }, `most at “${shown(textOf(model, [ids[at]]))}”, `
           + `${percent(own[at], 1)}; mean of all layers and heads`))));
}

/* The interval of Wilson, 95 %, for `right` of n. */
function wilson(right, n) {
  const z = 1.96, p = right / n, middle = p + z * z / (2 * n);
  const half = z * Math.sqrt(p * (1 - p) / n + z * z / (4 * n * n));
  return [Math.max(0, middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)];
}

/* Buttons that ask a model all questions of the page, some at a time so that the page stays alive,
   and a table of what came out. jobs: () => [{label, ask: i => {right, tokens}}]. */
function runs(element, title, items, buttons) {
  const table = el("tbody"), bar = el("progress", { max: items.length, value: 0, hidden: true });
  const status = el("span", { role: "status", class: "note" });
  let busy = false;
  async function run(jobs) {
    if (busy) return;
    busy = true;
    bar.hidden = false;
    for (const { label, ask } of jobs) {
      let right = 0, tokens = 0;
      for (let i = 0, pause = performance.now(); i < items.length; i++) {
        const found = ask(i);
        right += found.right;
        tokens += found.tokens;
        if (performance.now() - pause > 40) {
          bar.value = i + 1;
          status.textContent = `${label}: ${right} of ${i + 1}`;
          await new Promise(requestAnimationFrame);
          await new Promise(resolve => setTimeout(resolve));
          pause = performance.now();
        }
      }
      const n = items.length, [low, high] = wilson(right, n);
      table.append(el("tr", {}, el("td", {}, label), el("td", {}, `${right} of ${n}`),
        el("td", { class: "meter" }, el("i", { style: `width:${5 * right / n}rem` }),
           el("b", {}, percent(right / n, 1))),
        el("td", {}, `${(100 * low).toFixed(1)} – ${(100 * high).toFixed(1)}`),
        el("td", {}, (tokens / n).toFixed(1))));
    }
    bar.hidden = true;
    status.textContent = "done";
    busy = false;
  }
  element.replaceChildren(
    el("h3", {}, title),
    el("p", { class: "buttons" }, ...Object.entries(buttons).map(([name, jobs]) =>
      el("button", { "data-run": name, onclick: () => run(jobs()) }, name)), bar, status),
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {},
      ...["what is read", "right", "accuracy", "95 % interval", "tokens"].map(name =>
        el("th", {}, name)))), table)));
}

/* Calls tick(0), tick(1), .. tick(n) with a pause (ms) between them; a new play, or stop, ends an
   old one. Where the visitor wants less motion it calls tick(n) only. */
const player = {
  timer: 0,
  stop() {
    clearInterval(this.timer);
  },
  play(n, pause, tick) {
    this.stop();
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return tick(n);
    let i = 0;
    tick(i);
    this.timer = setInterval(() => {
      i += 1;
      tick(i);
      if (i >= n) this.stop();
    }, pause);
  },
};

// ---------------------------------------------------------------- start

const SCENES = { words, search, soft };
let scene = null;

/* Show a scene, which starts when it is first seen. */
function show(name) {
  player.stop();
  for (const id of Object.keys(SCENES)) {
    document.getElementById(`scene-${id}`).hidden = id !== name;
    const tab = document.getElementById(`tab-${id}`);
    tab.setAttribute("aria-selected", String(id === name));
    tab.tabIndex = id === name ? 0 : -1;
  }
  scene = SCENES[name];
  if (!scene.parts) scene.start();
}

function toggle(button, now) {
  const on = now ?? button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(on));
  return on;
}

function setTheme(dark) {
  toggle(document.getElementById("theme"), dark);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

function setLarge(on) {
  toggle(document.getElementById("large"), on);
  document.documentElement.classList.toggle("large", on);
  search.graph();
}

function start() {
  const names = Object.keys(SCENES), root = document.documentElement;
  for (const name of names) {
    const tab = document.getElementById(`tab-${name}`);
    tab.addEventListener("click", () => { location.hash = name; });
  }
  document.getElementById("theme").addEventListener("click", () =>
    setTheme(root.dataset.theme !== "dark"));
  document.getElementById("large").addEventListener("click", () =>
    setLarge(!root.classList.contains("large")));
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
  addEventListener("hashchange", () => show(names.find(name => `#${name}` === location.hash)
                                            ?? names[0]));
  addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inTabs = event.target.getAttribute?.("role") === "tab";
    if (inTabs && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
      const at = names.indexOf(location.hash.slice(1) || names[0]);
      const next = names[(at + (event.key === "ArrowRight" ? 1 : 2)) % 3];
      location.hash = next;
      document.getElementById(`tab-${next}`).focus();
      return;
    }
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const keys = {
      1: () => { location.hash = names[0]; }, 2: () => { location.hash = names[1]; },
      3: () => { location.hash = names[2]; },
      ArrowRight: () => scene.picker.next(), ArrowLeft: () => scene.picker.before(),
      l: () => setLarge(!root.classList.contains("large")),
      d: () => setTheme(root.dataset.theme !== "dark"),
    };
    if (keys[event.key]) keys[event.key]();
    else if (event.key === " " && !/^(BUTTON|SUMMARY)$/.test(event.target.tagName) && scene.play) {
      event.preventDefault();
      scene.play();
    }
  });
  const models = Object.entries(DATA.models).map(([name, { command, updates, rounding }]) =>
    `${name}: ${command}, ${updates} updates. Its weights are here as float16, which changes its `
    + `logits by at most ${rounding.logits.toFixed(3)} (the largest is `
    + `${rounding.largest.toFixed(0)}) and ${rounding.answers} of ${rounding.n} answers.`);
  document.querySelector("[data-models]").append(
    el("details", {}, el("summary", {}, "The models"), ...models.map(text => el("p", {}, text))));
  show(names.find(name => `#${name}` === location.hash) ?? names[0]);
}

start();
