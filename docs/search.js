/* Scene 2, a frontier that moves: the graph of a ProsQA question, and the probability of each node
   after each thought of Coconut, as probe.py measures it. */
"use strict";

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
  const gap = 4.8 * em, places = [];
  let top = 0, line = 0;
  for (const within of [true, false]) {
    const sets = xs.map((_, i) => [...level.keys()].filter(v =>
      level.get(v) === i && depth.has(v) === within));
    const tallest = Math.max(...sets.map(set => set.length));
    const height = tallest * gap;
    sets.forEach((set, i) => {
      const mean = v => {                      // of its parents: fewer lines cross
        const parents = item.edges.filter(edge => edge[1] === v).map(edge => places[edge[0]]);
        const ys = parents.filter(place => place).map(place => place.y);
        return ys.reduce((a, b) => a + b, 0) / Math.max(1, ys.length);
      };
      const order = new Map(set.map(v => [v, mean(v)]));
      set.sort((a, b) => order.get(a) - order.get(b));
      set.forEach((v, row) => {
        places[v] = { x: xs[i], y: top + (row + 0.5) * height / set.length - 0.5 * em };
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
    forAll(parts.all, kind =>
      this.change({ kinds: this.kinds.map(() => kind), k: this.k || this.n }, kind));
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
    this.change({ k: this.n });
    this.play();
  },

  change(what, kind) {
    Object.assign(this, what);
    if (kind === "noise") this.seed += 1;
    player.stop();
    this.compute();
    this.drawThoughts();
    this.graph();
    this.show(this.k);
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
                            selected: i, k: Math.max(this.k, i + 1) }, kind),
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
    const { parts, item } = this;
    if (!item || parts.root.hidden) return;
    const width = Math.max(280, parts.graph.clientWidth);
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
      const asked = { [item.root]: "root", [item.target]: "target", [item.neg_target]: "other" };
      const kind = asked[v] ?? (depth.has(v) ? "" : "away");
      const circle = svg("circle", { r: 7 }), value = svg("text", { class: "value", dy: "0.35em" });
      const node = svg("g", { class: `node ${kind}`, transform: `translate(${x},${top + y})` },
        ["target", "other"].includes(kind) && svg("circle", { class: "ring", r: 1.6 * em }),
        circle, value, svg("text", { class: "name", y: 2.5 * em }, name));
      return { node, circle, value };
    });
    this.band = svg("rect", { class: "band", y: 0, height: top + layout.line, rx: 12,
                              width: Math.min(0.9 * width / layout.columns, 9 * em) });
    parts.graph.replaceChildren(svg("svg", {
      viewBox: `0 0 ${width} ${top + layout.height}`, width, height: top + layout.height,
      role: "img", "aria-label": "the graph, and the probability of each node" },
      this.band,
      ...xs.map((x, i) => svg("text", { class: "column", x, y: 1.2 * em },
        i ? `${i} step${i > 1 ? "s" : ""}` : "root")),
      layout.line < layout.height - em && svg("path", { class: "line",
        d: `M0,${top + layout.line}H${width}` }),
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
      circle.setAttribute("r", (0.45 + 1.35 * Math.sqrt(p)) * em);
      node.style.setProperty("--p", p.toFixed(3));
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
               `${this.cot.words.length} words; trained for ${modelOf("prosqa-cot").updates} updates, `
               + `Coconut for ${coconut.updates}`);
  },

  /* How the values lie on the frontier, in words. */
  frontier(values, step, k) {
    const nodes = [...this.layout.depth].filter(([, depth]) => depth === step).map(([v]) => v);
    if (!step) return "Nothing has been thought yet; each name is a guess.";
    const mass = nodes.reduce((sum, v) => sum + values[v], 0);
    const share = nodes.map(v => values[v] / mass).filter(p => p > 0);
    const effective = Math.exp(-share.reduce((sum, p) => sum + p * Math.log(p), 0));
    const root = this.item.idx_to_symbol[this.item.root];
    const where = `${step} step${step > 1 ? "s" : ""} from ${root}`;
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
    const same = kinds.every(kind => kind === kinds[0]), { seed } = this;
    let before = null;
    return { label: `Coconut: ${same ? kinds[0] : kinds.join(", ")}`, ask: i => {
      const { question, answer } = DATA.prosqa[i];
      before ??= this.others(i);
      const { thoughts, prompt } = ownThoughts(this.coconut, question, this.n), swapped = before;
      const states = changed(this.coconut, thoughts, kinds, () => swapped, seed + i);
      const read = this.read(states, this.n), found = answerAfter(this.coconut, prompt, read);
      before = thoughts;
      return { right: answerIn(found.text) === answer, tokens: found.read + found.words.length };
    } };
  },
};
