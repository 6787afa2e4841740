/* Scene 3, a soft token: what a model of chain of thought is fed with while it thinks: the
   likeliest token, the mixture of all, or the mixture after Gumbel noise. */
"use strict";

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
    this.picker.go(this.uncertain());
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
  think(index, mode, seed, tau = this.tau) {
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
    const found = softThink(model, cache, h, mode, tau, gumbel);
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
    const kind = (step.entropy >= 0.1 ? " uncertain" : "") + (piece === "\n" ? " line-end" : "");
    return el("button", { class: `chip soft${kind}`, "data-step": i + 1,
                          onclick: () => this.select(i + 1) },
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
    const tau = this.tau.toFixed(2);
    this.parts.tally.replaceChildren(
      el("p", {}, `${right} of 32 right; ${rows.length} different texts (τ = ${tau})`),
      bars(rows.slice(0, 6).map(([text, times]) => {
        const names = [...text.split("###")[0].matchAll(/(\w+) is an? (\w+)/g)];
        const path = [names[0]?.[1], ...names.map(match => match[2])].join(" → ");
        const good = answerIn(text) === answer;
        return { label: `${good ? "✓" : "✗"} ${path}`, p: times / 32, mark: good ? "good" : "bad" };
      })));
  },

  job(mode) {
    const { seed, tau } = this;                 // as they are now: a run takes a while
    const label = MODES[mode][0] + (mode === "gumbel" ? `, τ = ${tau.toFixed(2)}` : "");
    return { label, ask: i => {
      const found = this.think(i, mode, seed, tau);
      return { right: answerIn(found.text) === DATA.prosqa[i].answer, tokens: found.tokens };
    } };
  },
};
