/* The page that thinks: three scenes, drawn from what model.js computes. data.js, written by
   export.py, has the models, the questions and the words; no number of theirs is typed here.

   Read on in this order: asking a model; what the scenes share; scene 1, 2, 3; start. */
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
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter(child => child !== null));
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
        weight === undefined ? null
          : el("i", { class: "weight", style: `width:${100 * weight}%` })),
      el("b", {}, percent(weight ?? p)))));
}

/* The question with a shade on each token, as dark as the model looked at it. */
function shaded(model, ids, looks) {
  const most = looks ? Math.max(...looks.slice(0, ids.length)) : 1;
  return el("p", { class: "shaded" }, ...ids.map((id, i) => {
    const share = looks ? looks[i] / most : 0, piece = textOf(model, [id]);
    return el("span", { style: `--share:${share.toFixed(3)}`,
                        title: looks ? `${shown(piece)}: ${percent(looks[i], 1)}` : "" },
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
    note && el("small", {}, ` ${note}`));
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
  const root = document.getElementById(id), parts = { root };
  for (const element of root.querySelectorAll("*")) {
    for (const name of Object.keys(element.dataset)) parts[name] ??= element;
  }
  return parts;
}

/* Buttons and a number that choose one of n questions; change(i) is told which. */
function picker(element, n, change) {
  const number = el("input", { type: "number", min: 1, max: n, value: 1,
                               "aria-label": "test question", onchange: () => go(number.value - 1) });
  function go(i) {
    const index = Number.isInteger(i) ? (i + n) % n : 0;
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
       el("code", {}, state.h ? `${shown(top.piece)} ${percent(top.p)}` : "–")),
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
        h ? bars(nearest(model, h).map(({ piece, p }) => ({ label: shown(piece), p }))) : null,
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
  return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)];
}

/* Buttons that ask a model all questions of the page, some at a time so that the page stays alive,
   and a table of what came out. jobs: () => [{label, ask: i => {right, tokens}}]. */
function runs(element, title, items, buttons) {
  const table = el("tbody"), bar = el("progress", { max: items.length, value: 0 });
  const status = el("span", { role: "status", class: "note" });
  let busy = false;
  async function run(jobs) {
    if (busy) return;
    busy = true;
    for (const { label, ask } of jobs) {
      let right = 0, tokens = 0;
      for (let i = 0, pause = performance.now(); i < items.length; i++) {
        const found = ask(i);
        right += found.right;
        tokens += found.tokens;
        if (performance.now() - pause > 40) {
          bar.value = i + 1;
          status.textContent = ` ${label}: ${right} of ${i + 1}`;
          await new Promise(requestAnimationFrame);
          await new Promise(resolve => setTimeout(resolve));
          pause = performance.now();
        }
      }
      const n = items.length, [low, high] = wilson(right, n);
      table.append(el("tr", {}, el("td", {}, label), el("td", {}, `${right} of ${n}`),
        el("td", { class: "meter" }, el("i", { style: `width:${100 * right / n}%` }),
           el("b", {}, percent(right / n, 1))),
        el("td", {}, `${(100 * low).toFixed(1)} – ${(100 * high).toFixed(1)}`),
        el("td", {}, (tokens / n).toFixed(1))));
    }
    bar.value = 0;
    status.textContent = " done";
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

/* Calls tick(1), tick(2), .. tick(n) with a pause before each; a new play or stop ends an old
   one. Without pauses where the visitor wants less motion. */
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

// ---------------------------------------------------------------- scene 1: words or thoughts

/* A question of chains in its parts, and back; see common/puzzles.py, chain_item. */
function partsOfChain(question) {
  const [, first, count, thing] = question.match(/^(\w+) has (\d+) (\w+)\./);
  const links = [...question.matchAll(/(\w+) has what separates twice \w+ from (\d+)\./g)];
  return { people: [first, ...links.map(link => link[1])], thing,
           numbers: [Number(count), ...links.map(link => Number(link[2]))] };
}

function chainOf({ people, thing, numbers }) {
  const facts = people.slice(1).map((name, i) =>
    `${name} has what separates twice ${people[i]} from ${numbers[i + 1]}.`);
  return [`${people[0]} has ${numbers[0]} ${thing}.`, ...facts,
          `How many ${thing} does ${people.at(-1)} have?`].join(" ");
}

/* All counts of a chain: the given one, then |2 v - n| for each n. */
function countsOf(numbers) {
  const found = [numbers[0]];
  for (const n of numbers.slice(1)) found.push(Math.abs(2 * found.at(-1) - n));
  return found;
}

const words = {
  index: 0, chain: null, stage: 0, kinds: [], seed: 0, selected: 0, pass: Infinity,

  start() {
    this.parts = partsOf("words");
    this.coconut = modelOf("chains-coconut");
    this.stage = this.coconut.stages.length - 1;
    this.kinds = this.coconut.mean.map(() => "keep");
    const { parts } = this;
    this.picker = picker(parts.picker, DATA.chains.length, i => this.pick(i));
    parts.stage.max = this.stage;
    parts.stage.value = this.stage;
    parts.stage.addEventListener("input", () => this.change({ stage: +parts.stage.value }));
    parts.play.addEventListener("click", () => this.play());
    parts.step.addEventListener("click", () => this.reveal(this.pass >= this.last ? 1 : this.pass + 1));
    forAll(parts.all, kind => this.change({ kinds: this.kinds.map(() => kind) }, kind));
    const n = DATA.chains.length;
    runs(parts.runs, `All ${n} questions, answered here`, DATA.chains, {
      [`Run all ${n}`]: () => [this.inWordsJob(), this.job(this.kinds)],
      "Run every control": () => KINDS.map(kind => this.job(this.kinds.map(() => kind))),
    });
    this.pick(0);
  },

  pick(index) {
    this.chain = partsOfChain(DATA.chains[index].question);
    this.index = index;
    this.editor();
    this.change({});
    this.play();
  },

  /* The question as a sentence whose names and numbers can be changed. */
  editor() {
    const { chain, parts } = this;
    const choice = (options, value, change, label) => el("select",
      { "aria-label": label, onchange: event => { change(event.target.value); this.edited(); } },
      ...options.map(option => el("option", { selected: option === value }, option)));
    const person = i => choice(DATA.people, chain.people[i],
                               name => { chain.people[i] = name; }, `person ${i + 1}`);
    const number = i => el("input", {
      type: "number", min: 0, max: 39, value: chain.numbers[i], "aria-label": `number ${i + 1}`,
      oninput: event => { chain.numbers[i] = event.target.valueAsNumber; this.edited(); } });
    const mention = i => el("span", { "data-mention": i }, chain.people[i]);
    const thing = choice(DATA.things, chain.thing, name => { chain.thing = name; }, "things");
    const facts = chain.people.slice(1).flatMap((_, i) => [
      person(i + 1), " has what separates twice ", mention(i), " from ", number(i + 1), ". "]);
    parts.question.replaceChildren(person(0), " has ", number(0), " ", thing, ". ", ...facts,
      "How many ", el("span", { "data-mention": "thing" }, chain.thing), " does ",
      mention(chain.people.length - 1), " have?");
  },

  /* Something in the sentence was changed: what repeats it follows, and so does the answer. */
  edited() {
    const { chain, parts } = this;
    for (const element of parts.question.querySelectorAll("[data-mention]")) {
      const name = element.dataset.mention;
      element.textContent = name === "thing" ? chain.thing : chain.people[name];
    }
    this.change({});
  },

  /* What is odd about the question; null if it cannot be asked. */
  hint() {
    const { people, numbers } = this.chain;
    if (numbers.some(n => !Number.isInteger(n) || n < 0 || n > 39)) {
      return [null, "The vocabulary has the whole numbers from 0 to 39."];
    }
    if (new Set(people).size < people.length) {
      return ["ask", "Two people have one name; no training question had that."];
    }
    if (countsOf(numbers).some(count => count > 19)) {
      return ["ask", `The counts are ${countsOf(numbers).join(", ")}. In training all were below 20,`
                     + " so expect a wrong answer."];
    }
    return ["ask", ""];
  },

  /* Another stage, kinds or question: think again and draw all. */
  change(what, kind) {
    Object.assign(this, what);
    if (kind === "noise") this.seed += 1;
    player.stop();
    const [can, hint] = this.hint();
    this.parts.hint.textContent = hint;
    if (!can) return;
    this.compute();
    this.draw();
    this.reveal(Infinity);
  },

  /* What Coconut says about a question: everything that the scene shows of it. */
  ask(question, kinds, other, seed) {
    const { coconut } = this, layout = coconut.stages[this.stage];
    if (!layout.marks) {                        // a plain stage 0: like chain of thought
      const found = inWords(coconut, question);
      return { ...found, thoughts: [], states: [], read: 0 };
    }
    const { ids, thoughts, prompt } = ownThoughts(coconut, question, layout.thoughts);
    const states = changed(coconut, thoughts, kinds, other, seed);
    const read = states.filter(state => state.h).map(state => state.h);
    return { ids, thoughts, states, ...answerAfter(coconut, prompt, read) };
  },

  /* The thoughts of the question before this one. */
  others(index) {
    const before = DATA.chains.at(index - 1).question;
    return ownThoughts(this.coconut, before, this.coconut.stages[this.stage].thoughts).thoughts;
  },

  compute() {
    const question = chainOf(this.chain);
    this.right = String(countsOf(this.chain.numbers).at(-1));
    this.cot = inWords(modelOf("chains-cot"), question);
    this.own = this.ask(question, this.kinds, () => this.others(this.index), this.seed);
    this.selected = Math.max(0, Math.min(this.selected, this.own.states.length - 1));
    this.last = 1 + Math.max(this.cot.words.length, this.own.read + this.own.words.length);
  },

  draw() {
    const { parts, coconut, own, cot } = this, question = `question, ${own.ids.length} tokens`;
    parts.stageOut.value = `${this.stage}`;
    parts.stage.value = this.stage;
    const token = (word, i, model) => {
      const piece = textOf(model, [word.id]);
      const chip = el("span", { class: "chip", "data-pass": i,
                                title: `pass ${i}: ${percent(word.p, 1)}` }, shown(piece));
      return piece === "\n" ? [chip, el("br")] : [chip];
    };
    parts.cot.replaceChildren(
      el("span", { class: "chip given" }, question), el("br"),
      ...cot.words.flatMap((word, i) => token(word, i + 1, modelOf("chains-cot"))));
    let pass = 0;
    const cards = own.states.map((state, i) => {
      const choose = kind => this.change(
        { kinds: this.kinds.map((old, j) => (j === i ? kind : old)), selected: i }, kind);
      const one = card(coconut, i, state, own.thoughts[i], i === this.selected, choose,
                       () => this.select(i));
      one.dataset.pass = state.h ? ++pass : pass;
      return one;
    });
    const marks = coconut.stages[this.stage].marks;
    parts.coconut.replaceChildren(
      el("span", { class: "chip given" }, question),
      marks ? el("span", { class: "chip mark" }, "<bot>") : "", el("br"),
      el("div", { class: "thoughts" }, ...cards),
      marks ? el("span", { class: "chip mark", "data-pass": pass }, "<eot>") : "",
      ...own.words.flatMap((word, i) => token(word, own.read + i + 1, coconut)));
    this.look();
    this.drawCurriculum();
  },

  /* Show what the first passes gave. */
  reveal(pass) {
    this.pass = Math.min(pass, this.last);
    const { parts, own, cot } = this, most = 1 + cot.words.length;
    for (const element of parts.root.querySelectorAll("[data-pass]")) {
      element.classList.toggle("later", element.dataset.pass > this.pass);
    }
    const tokens = (n, all) => Math.min(n, all);
    const lane = (name, all, positions) => {
      const done = this.pass > all;
      counts(parts[`${name}Counts`], [
        ["tokens", tokens(this.pass, all), most - 1], ["passes", Math.min(this.pass, all + 1), most],
        ["positions", positions - all + tokens(this.pass, all), cot.positions]]);
      parts[`${name}Answer`].classList.toggle("later", !done);
    };
    const all = own.read + own.words.length;
    showAnswer(parts.cotAnswer, answerIn(cot.text), this.right);
    showAnswer(parts.coconutAnswer, answerIn(own.text), this.right);
    lane("cot", cot.words.length, cot.positions);
    lane("coconut", all, own.positions);
    document.documentElement.dataset.firstThought ??= Math.round(performance.now());
  },

  play() {
    if (this.hint()[0]) player.play(this.last, 130, pass => this.reveal(Math.max(1, pass)));
  },

  select(i) {
    if (i === this.selected) return;
    this.selected = i;
    for (const element of this.parts.root.querySelectorAll(".thought")) {
      element.classList.toggle("selected", element.dataset.thought === String(i + 1));
    }
    this.look();
  },

  look() {
    const { parts, own, selected, coconut } = this;
    parts.detail.hidden = !own.states.length;
    if (own.states.length) {
      detail(parts.detail, coconut, own.ids, selected, own.states[selected], own.thoughts[selected]);
    }
  },

  /* Figure 2 of the paper: a row for each stage. */
  drawCurriculum() {
    const { parts, coconut } = this, { c } = coconut.flags, steps = coconut.flags.stage_max;
    parts.curriculum.replaceChildren(...coconut.stages.map((layout, stage) => {
      const chip = (text, kind) => el("span", { class: `chip ${kind}` }, text);
      const row = [chip("question", "given")];
      if (layout.marks) {
        row.push(chip("<bot>", "mark"), ...Array.from({ length: layout.thoughts }, () =>
          chip("●", "dot")), chip("<eot>", "mark"));
      }
      for (let i = stage; i < steps; i++) row.push(chip(`step ${i + 1}`, "word"));
      return el("button", { class: "row", "aria-pressed": String(stage === this.stage),
                            onclick: () => this.change({ stage }) },
        el("b", {}, `stage ${stage}`), el("span", { class: "parts" }, ...row, chip("answer", "word")),
        el("small", {}, `${percent(layout.accuracy, 1)}, ${layout.tokens.toFixed(0)} tokens`));
    }));
    parts.curriculumNote.textContent = `Each stage trades one more written step for ${c} `
      + `thought${c > 1 ? "s" : ""}, and the loss counts only the words that remain. This is the `
      + "final model, read at each stage: training mixed all stages, so it still speaks at each. "
      + `Accuracies: PyTorch with the weights of this page, all ${coconut.stages[0].n} test `
      + "questions.";
  },

  inWordsJob() {
    return { label: "chain of thought, in words", ask: i => {
      const { question, answer } = DATA.chains[i];
      const found = inWords(modelOf("chains-cot"), question);
      return { right: answerIn(found.text) === answer, tokens: found.words.length };
    } };
  },

  job(kinds) {
    const n = this.coconut.stages[this.stage].thoughts, used = kinds.slice(0, n);
    const same = used.every(kind => kind === used[0]);
    const label = `Coconut, stage ${this.stage}: `
      + (n === 0 ? "no thoughts" : same ? used[0] : used.join(", "));
    let before = null;                          // each question's thoughts serve the next one
    return { label, ask: i => {
      const { question, answer } = DATA.chains[i];
      before ??= this.others(i);
      const found = this.ask(question, kinds, () => before, this.seed + i);
      before = found.thoughts;
      return { right: answerIn(found.text) === answer, tokens: found.read + found.words.length };
    } };
  },
};

// ---------------------------------------------------------------- scene 2: a frontier that moves

/* Steps from `start` to each node that can be reached: Map node -> steps. */
function distances(edges, start) {
  const found = new Map([[start, 0]]);
  for (const node of found.keys()) {
    for (const [a, b] of edges) {
      if (a === node && !found.has(b)) found.set(b, found.get(node) + 1);
    }
  }
  return found;
}

/* Where the nodes of a graph are: columns by the steps from the root; below a line, those that it
   does not lead to, by the steps from the other root. Returns {depth, places: [{x, y}], columns,
   line, height}, in pixels; em: the height of a line of text. */
function placed(item, width, em) {
  const depth = distances(item.edges, item.root), n = item.idx_to_symbol.length;
  const hasParent = new Set(item.edges.map(edge => edge[1])), level = new Map(depth);
  for (let v = 0; v < n; v++) {
    if (hasParent.has(v) || v === item.root) continue;
    for (const [node, steps] of distances(item.edges, v)) {
      if (!depth.has(node)) level.set(node, steps);
    }
  }
  const columns = 1 + Math.max(...level.values()), margin = Math.min(70, width * 0.11);
  const xs = Array.from({ length: columns }, (_, i) =>
    margin + i * (width - 2 * margin) / Math.max(1, columns - 1));
  const gap = 4.3 * em, places = [];
  let top = 0, line = 0;
  for (const within of [true, false]) {
    const sets = xs.map((_, i) => [...level.keys()].filter(v =>
      level.get(v) === i && depth.has(v) === within));
    const tallest = Math.max(...sets.map(set => set.length));
    const height = tallest * gap, parentsOf = v => item.edges.filter(e => e[1] === v).map(e => e[0]);
    sets.forEach((set, i) => {
      const mean = v => {
        const ys = parentsOf(v).filter(p => places[p]).map(p => places[p].y);
        return ys.length ? ys.reduce((a, b) => a + b, 0) / ys.length : 0;
      };
      const order = new Map(set.map(v => [v, mean(v)]));
      set.sort((a, b) => order.get(a) - order.get(b));
      set.forEach((v, row) => {
        places[v] = { x: xs[i], y: top + (row + 0.5) * height / set.length };
      });
    });
    top += height;
    if (within) line = top;
  }
  return { depth, places, xs, columns, line, height: top + 0.5 * em };
}

const search = {
  index: 0, k: 0, kinds: [], seed: 0, selected: 0,

  start() {
    this.parts = partsOf("search");
    this.coconut = modelOf("prosqa-coconut");
    this.n = this.coconut.stages.at(-1).thoughts;
    this.kinds = Array(this.n).fill("keep");
    const { parts } = this, n = DATA.prosqa.length;
    this.picker = picker(parts.picker, n, i => this.pick(i));
    parts.k.max = this.n;
    parts.k.addEventListener("input", () => { player.stop(); this.show(+parts.k.value); });
    parts.play.addEventListener("click", () => this.play());
    forAll(parts.all, kind => this.change({ kinds: this.kinds.map(() => kind) }, kind));
    runs(parts.runs, `All ${n} questions, answered here`, DATA.prosqa, {
      [`Run all ${n}`]: () => [this.inWordsJob(), this.job(this.kinds)],
      "Run every control": () => KINDS.map(kind => this.job(this.kinds.map(() => kind))),
    });
    new ResizeObserver(() => this.graph()).observe(parts.graph);
    this.pick(0);
  },

  pick(index) {
    this.index = index;
    this.item = DATA.prosqa[index];
    const asked = this.item.question.split(". ").at(-1), { parts } = this;
    parts.asked.replaceChildren(
      el("strong", {}, asked), el("small", {}, ` given ${this.item.edges.length} facts`));
    this.change({}, null);
    this.play();
  },

  change(what, kind) {
    Object.assign(this, what);
    if (kind === "noise") this.seed += 1;
    player.stop();
    this.compute();
    this.drawThoughts();
    this.graph();
    this.show(kind === undefined ? this.k : this.n);
  },

  others(index) {
    return ownThoughts(this.coconut, DATA.prosqa.at(index - 1).question, this.n).thoughts;
  },

  /* The states that are read of the first k thoughts. */
  read(states, k) {
    return states.slice(0, k).filter(state => state.h).map(state => state.h);
  },

  /* The values of all nodes after k thoughts, as probe.py measures them. */
  values(prompt, states, item, k) {
    const { coconut } = this, names = item.idx_to_symbol.map(name => DATA.names[name]);
    const every = [coconut.eot, ...encode(coconut, "Every")];
    const { h, cache } = readInstead(coconut, prompt, this.read(states, k), every);
    return nodeValues(coconut, cache, h, names);
  },

  compute() {
    const { coconut, item } = this, { question } = item;
    const { ids, thoughts, prompt } = ownThoughts(coconut, question, this.n);
    const other = () => this.others(this.index);
    const states = changed(coconut, thoughts, this.kinds, other, this.seed);
    Object.assign(this, { ids, thoughts, states, prompt });
    this.cot = inWords(modelOf("prosqa-cot"), question);
    this.at = Array.from({ length: this.n + 1 }, (_, k) => ({
      values: this.values(prompt, states, item, k),
      ...answerAfter(coconut, prompt, this.read(states, k)),
    }));
  },

  drawThoughts() {
    const { parts } = this;
    parts.thoughts.replaceChildren(...this.states.map((state, i) => card(
      this.coconut, i, state, this.thoughts[i], i === this.selected,
      kind => this.change({ kinds: this.kinds.map((old, j) => (j === i ? kind : old)),
                            selected: i, k: this.k }, kind),
      () => this.select(i))));
    this.select(this.selected);
  },

  select(i) {
    this.selected = i;
    for (const element of this.parts.thoughts.querySelectorAll(".thought")) {
      element.classList.toggle("selected", element.dataset.thought === String(i + 1));
    }
    detail(this.parts.detail, this.coconut, this.ids, i, this.states[i], this.thoughts[i]);
  },

  /* The graph, without values; `nodes` keeps what show changes. */
  graph() {
    const { parts, item } = this, width = Math.max(280, parts.graph.clientWidth);
    if (!item || parts.root.hidden) return;
    const em = parseFloat(getComputedStyle(parts.graph).fontSize);
    const layout = placed(item, width, em), { depth, places, xs } = layout, top = 2 * em;
    const reaches = distances(item.edges.map(([a, b]) => [b, a]), item.target);
    this.layout = layout;
    const lines = item.edges.map(([a, b]) => {
      const from = places[a], to = places[b], dx = to.x - from.x, dy = to.y - from.y;
      const far = Math.hypot(dx, dy), bend = Math.abs(dx) < 1 ? 0.35 * far : dx < 0 ? 50 : 0;
      const x = (from.x + to.x) / 2 + bend, y = top + (from.y + to.y) / 2;
      const on = depth.has(a) && reaches.has(b), turn = Math.atan2(dy, dx) * 180 / Math.PI;
      return svg("g", { class: on ? "edge on" : "edge" },
        svg("path", { d: `M${from.x},${top + from.y}Q${x},${y} ${to.x},${top + to.y}` }),
        svg("path", { class: "tip", d: "M-5,-5L5,0L-5,5Z",
          transform: `translate(${x - bend / 2},${y})rotate(${turn})` }));
    });
    this.nodes = item.idx_to_symbol.map((name, v) => {
      const { x, y } = places[v];
      const kind = v === item.root ? "root" : v === item.target ? "target"
        : v === item.neg_target ? "other" : depth.has(v) ? "" : "away";
      const circle = svg("circle", { r: 7 }), value = svg("text", { class: "value", dy: "0.35em" });
      const node = svg("g", { class: `node ${kind}`, transform: `translate(${x},${top + y})` },
        kind === "target" || kind === "other" ? svg("circle", { class: "ring", r: 1.35 * em }) : null,
        circle, value, svg("text", { class: "name", y: 2.15 * em }, name));
      return { node, circle, value };
    });
    this.band = svg("rect", { class: "band", y: 0, height: top + layout.line, rx: 12,
                              width: Math.min(0.9 * width / layout.columns, 9 * em) });
    parts.graph.replaceChildren(svg("svg", {
      viewBox: `0 0 ${width} ${top + layout.height}`, width, height: top + layout.height,
      role: "img", "aria-label": "the graph, and the probability of each node" },
      this.band,
      ...xs.map((x, i) => svg("text", { class: "column", x, y: 1.2 * em },
        i === 0 ? "root" : width < 500 ? `${i}` : `${i} step${i > 1 ? "s" : ""}`)),
      layout.line < layout.height - em ? svg("path", { class: "line",
        d: `M0,${top + layout.line}H${width}` }) : null,
      ...lines, ...this.nodes.map(one => one.node)));
    this.show(this.k);
  },

  /* What there is after k thoughts. */
  show(k) {
    this.k = k;
    const { parts, item, coconut, layout } = this, { values, text } = this.at[k];
    if (!layout) return;
    const em = parseFloat(getComputedStyle(parts.graph).fontSize), { c } = coconut.flags;
    this.nodes.forEach(({ node, circle, value }, v) => {
      const p = values[v];
      circle.setAttribute("r", (0.4 + 1.15 * Math.sqrt(p)) * em);
      circle.style.fillOpacity = Math.min(1, 0.08 + 0.92 * p);
      value.textContent = p >= 0.095 ? `${Math.round(100 * p)}` : "";
      node.classList.toggle("strong", p > 0.55);
      node.dataset.value = p.toFixed(4);
    });
    const step = Math.ceil(k / c);
    const column = layout.xs[Math.min(step, layout.columns - 1)];
    this.band.setAttribute("x", column - this.band.getAttribute("width") / 2);
    this.band.style.opacity = step ? 1 : 0;
    parts.k.value = k;
    parts.kOut.value = `${k} of ${this.n}` + (k % c === 0 ? `, stage ${k / c}` : "");
    parts.frontier.textContent = this.frontier(values, step, k);
    parts.thoughts.querySelectorAll(".thought").forEach((element, i) =>
      element.classList.toggle("unread", i >= k));
    parts.said.textContent = text;
    showAnswer(parts.coconutAnswer, answerIn(text), item.answer,
               `${this.read(this.states, k).length} thoughts + ${this.at[k].words.length} words`);
    parts.cot.textContent = this.cot.text;
    showAnswer(parts.cotAnswer, answerIn(this.cot.text), item.answer,
               `${this.cot.words.length} words`);
  },

  /* How the values lie on the frontier, in words. */
  frontier(values, step, k) {
    const nodes = [...this.layout.depth].filter(([, depth]) => depth === step).map(([v]) => v);
    if (!step) return "Nothing has been thought yet; each name is a guess.";
    const mass = nodes.reduce((sum, v) => sum + values[v], 0);
    const share = nodes.map(v => values[v] / mass).filter(p => p > 0);
    const effective = Math.exp(-share.reduce((sum, p) => sum + p * Math.log(p), 0));
    const where = `${step} step${step > 1 ? "s" : ""} from ${this.item.idx_to_symbol[this.item.root]}`;
    const exact = DATA.probe[k]?.[this.index];
    const kept = this.kinds.slice(0, k).every(kind => kind === "keep");
    let check = k % this.coconut.flags.c ? " Between two stages: it never had to speak here." : "";
    if (exact && kept) {
      const most = Math.max(...exact.map((value, v) => Math.abs(value - values[v])));
      check = ` probe.py gives the same, up to ${most < 0.0005 ? "0.0005" : most.toFixed(3)}.`;
    }
    return `The frontier, ${where}: ${percent(mass)} of the probability, like `
      + `${effective.toFixed(1)} equal nodes of ${nodes.length}.${check}`;
  },

  play() {
    player.play(this.n, 1000, k => this.show(k));
  },

  inWordsJob() {
    return { label: "chain of thought, in words", ask: i => {
      const { question, answer } = DATA.prosqa[i];
      const found = inWords(modelOf("prosqa-cot"), question);
      return { right: answerIn(found.text) === answer, tokens: found.words.length };
    } };
  },

  job(kinds) {
    const same = kinds.every(kind => kind === kinds[0]);
    let before = null;
    return { label: `Coconut: ${same ? kinds[0] : kinds.join(", ")}`, ask: i => {
      const { question, answer } = DATA.prosqa[i];
      before ??= this.others(i);
      const { thoughts, prompt } = ownThoughts(this.coconut, question, this.n), swapped = before;
      const states = changed(this.coconut, thoughts, kinds, () => swapped, this.seed + i);
      const read = this.read(states, this.n), found = answerAfter(this.coconut, prompt, read);
      before = thoughts;
      return { right: answerIn(found.text) === answer, tokens: found.read + found.words.length };
    } };
  },
};

// ---------------------------------------------------------------- scene 3: a soft token

const MODES = {
  greedy: ["Greedy", "the likeliest token is fed back"],
  soft: ["Soft token", "the mixture is fed back"],
  gumbel: ["Gumbel noise", "a shaken mixture is fed back"],
};

const soft = {
  index: 0, t: 1, seed: 1,

  start() {
    this.parts = partsOf("soft");
    this.model = modelOf("prosqa-cot");
    const { parts } = this, n = DATA.prosqa.length;
    this.tau = 0.5;
    parts.tau.value = Math.log2(this.tau);
    this.picker = picker(parts.picker, n, i => this.pick(i));
    parts.t.addEventListener("input", () => this.select(+parts.t.value));
    parts.tau.addEventListener("input", () => {
      this.tau = 2 ** parts.tau.value;
      this.draw();
    });
    parts.noise.addEventListener("click", () => {
      this.seed += 1;
      this.draw();
    });
    parts.draws.addEventListener("click", () => this.drawMany());
    runs(parts.runs, `All ${n} questions, answered here`, DATA.prosqa, {
      [`Run all ${n}`]: () => Object.keys(MODES).map(mode => this.job(mode)),
    });
    this.pick(this.uncertain());
    this.picker.go(this.index);
  },

  /* The first question whose greedy thinking has a fork that is nearly even. */
  uncertain() {
    const even = i => this.think(i, "greedy", 0).steps.some(step => step.entropy > 0.55);
    for (let i = 0; i < Math.min(20, DATA.prosqa.length); i++) if (even(i)) return i;
    return 0;
  },

  pick(index) {
    this.index = index;
    const { question, edges } = DATA.prosqa[index];
    this.parts.asked.replaceChildren(el("strong", {}, question.split(". ").at(-1)),
                                     el("small", {}, ` given ${edges.length} facts`));
    this.parts.tally.replaceChildren();
    this.t = 0;
    this.draw();
  },

  /* Think about question `index`. The noise depends on question, seed, step and rank only. */
  think(index, mode, seed) {
    const { model } = this, cache = newCache(model);
    const ids = encode(model, DATA.prosqa[index].question + "\n");
    const draw = random(10007 * index + seed), noise = [];
    const gumbel = (step, rank) => {
      while (noise.length <= step) {
        noise.push(Array.from({ length: 15 }, () => -Math.log(-Math.log(draw()))));
      }
      return noise[step][rank];
    };
    const h = forward(model, embed(model, ids), cache);
    const found = softThink(model, cache, h, mode, this.tau, gumbel);
    const words = [...found.steps, ...found.answer];
    return { ...found, text: said(model, words), tokens: words.length };
  },

  draw() {
    const { parts, model } = this, { answer } = DATA.prosqa[this.index];
    this.found = Object.keys(MODES).map(mode => [mode, this.think(this.index, mode, this.seed)]);
    const greedy = this.found[0][1].steps;
    if (!this.t) {
      const most = greedy.reduce((a, b) => (b.entropy > a.entropy ? b : a));
      this.t = greedy.indexOf(most) + 1;
    }
    parts.t.max = Math.max(...this.found.map(([, found]) => found.steps.length));
    parts.tauOut.value = this.tau.toFixed(2);
    parts.lanes.replaceChildren(...this.found.map(([mode, found]) => {
      const [name, what] = MODES[mode], verdict = el("p", {});
      showAnswer(verdict, answerIn(found.text), answer);
      const chips = found.steps.flatMap((step, i) => {
        const piece = textOf(model, [step.id]), chip = this.chip(step, i, piece);
        return piece === "\n" ? [chip, el("br")] : [chip];
      });
      return el("article", { class: "card lane", "data-mode": mode },
        el("h2", {}, name, el("small", {}, ` ${what}`)),
        el("div", { class: "stream" }, ...chips,
           ...found.answer.map(({ id }) => el("span", { class: "chip given" },
                                              shown(textOf(model, [id]))))),
        verdict, el("div", { class: "fed", "data-fed": mode }));
    }));
    this.select(Math.min(this.t, +parts.t.max));
  },

  /* A token of a trace, over the bar of the weights that were fed back. */
  chip(step, i, piece) {
    const parts = step.fed.filter(({ weight }) => weight >= 0.01).map(({ weight }, rank) =>
      el("i", { class: `rank${Math.min(rank, 2)}`, style: `flex-grow:${weight}` }));
    return el("button", { class: "chip soft" + (step.entropy >= 0.1 ? " uncertain" : ""),
                          "data-step": i + 1, onclick: () => this.select(i + 1) },
      shown(piece), el("span", { class: "mix" }, ...parts));
  },

  /* The distribution at step t of each trace, and what was fed back of it. */
  select(t) {
    this.t = t;
    const { parts, model } = this;
    parts.t.value = t;
    parts.tOut.value = `${t}`;
    for (const element of parts.lanes.querySelectorAll("[data-step]")) {
      element.classList.toggle("selected", element.dataset.step === String(t));
    }
    for (const [mode, { steps }] of this.found) {
      const element = parts.lanes.querySelector(`[data-fed=${mode}]`), step = steps[t - 1];
      if (!step) {
        element.replaceChildren(el("p", { class: "note" }, "it has stopped thinking here"));
        continue;
      }
      const rows = step.fed.slice(0, 4).map(({ id, p, weight }) =>
        ({ label: shown(textOf(model, [id])), p, weight }));
      const context = textOf(model, steps.slice(0, t - 1).map(({ id }) => id)).split("\n").at(-1);
      element.replaceChildren(
        el("h4", {}, `step ${t}`, context ? `, after “${context.trim()}”` : ""), bars(rows),
        el("p", { class: "note" }, `outline: probability; filled: weight fed back; entropy `
           + `${step.entropy.toFixed(2)}`));
    }
  },

  drawMany() {
    const { answer } = DATA.prosqa[this.index], found = new Map();
    for (let draw = 0; draw < 32; draw++) {
      const { text } = this.think(this.index, "gumbel", 5000 + draw);
      found.set(text, (found.get(text) ?? 0) + 1);
    }
    const rows = [...found].sort((a, b) => b[1] - a[1]);
    const right = rows.reduce((n, [text, times]) => n + times * (answerIn(text) === answer), 0);
    this.parts.tally.replaceChildren(
      el("p", {}, `${right} of 32 right; ${rows.length} different texts (τ = `
         + `${this.tau.toFixed(2)})`),
      ...rows.slice(0, 6).map(([text, times]) => {
        const names = [...text.split("###")[0].matchAll(/(\w+) is an? (\w+)/g)];
        const path = [names[0]?.[1], ...names.map(match => match[2])].join(" → ");
        const good = answerIn(text) === answer;
        return bars([{ label: `${good ? "✓" : "✗"} ${path}`, p: times / 32,
                       mark: good ? "good" : "bad" }]);
      }));
  },

  job(mode) {
    const tau = mode === "gumbel" ? `, τ = ${this.tau.toFixed(2)}` : "";
    return { label: MODES[mode][0] + tau, ask: i => {
      const found = this.think(i, mode, this.seed);
      return { right: answerIn(found.text) === DATA.prosqa[i].answer, tokens: found.tokens };
    } };
  },
};

// ---------------------------------------------------------------- start

const SCENES = { words, search, soft };
let scene = null;

/* Show a scene, which starts when it is first seen. */
function show(name) {
  player.stop();
  for (const id of Object.keys(SCENES)) {
    document.getElementById(id).hidden = id !== name;
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
    document.getElementById(`tab-${name}`).addEventListener("click", () => { location.hash = name; });
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
    else if (event.key === " " && event.target.tagName !== "BUTTON" && scene.play) {
      event.preventDefault();
      scene.play();
    }
  });
  const models = Object.entries(DATA.models).map(([name, { command, rounding }]) =>
    `${name}: ${command}; float16 changes its logits by at most ${rounding.logits.toFixed(3)} `
    + `(the largest is ${rounding.largest.toFixed(0)}) and ${rounding.answers} of `
    + `${rounding.n} answers.`);
  document.querySelector("[data-models]").append(
    el("details", {}, el("summary", {}, "The models"), ...models.map(text => el("p", {}, text))));
  show(names.find(name => `#${name}` === location.hash) ?? names[0]);
}

start();
