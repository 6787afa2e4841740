/* Scene 1, words or thoughts: a word problem, answered by chain of thought and by Coconut, pass by
   pass; the thoughts can be changed, and so can the question. */
"use strict";

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
    parts.step.addEventListener("click", () => {
      player.stop();
      this.reveal(this.pass >= this.last ? 1 : this.pass + 1);
    });
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

  /* Can the question be asked? The vocabulary has no other numbers. */
  possible() {
    return this.chain.numbers.every(n => Number.isInteger(n) && n >= 0 && n <= 39);
  },

  /* What is odd about the question. */
  hint() {
    const { people, numbers } = this.chain, counts = countsOf(numbers);
    if (!this.possible()) return "The vocabulary has the whole numbers from 0 to 39.";
    if (new Set(people).size < people.length) {
      return "Two people have one name; no training question had that.";
    }
    if (counts.some(count => count > 19)) {
      return `The counts are ${counts.join(", ")}. In training all were below 20, so expect a `
        + "wrong answer.";
    }
    return "";
  },

  /* Another stage, kinds or question: think again and draw all. */
  change(what, kind) {
    Object.assign(this, what);
    if (kind === "noise") this.seed += 1;
    player.stop();
    this.parts.hint.textContent = this.hint();
    this.parts.root.classList.toggle("stale", !this.possible());
    if (!this.possible()) return;
    this.compute();
    this.draw();
    this.reveal(Infinity);
  },

  /* What Coconut says about a question: everything that the scene shows of it. */
  ask(question, kinds, other, seed, stage = this.stage) {
    const { coconut } = this, layout = coconut.stages[stage];
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
  others(index, stage = this.stage) {
    const before = DATA.chains.at(index - 1).question;
    return ownThoughts(this.coconut, before, this.coconut.stages[stage].thoughts).thoughts;
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
    const { parts, own, cot, coconut } = this, most = 1 + cot.words.length;
    for (const element of parts.root.querySelectorAll("[data-pass]")) {
      element.classList.toggle("later", element.dataset.pass > this.pass);
    }
    const lane = (name, all, positions) => {
      const soFar = Math.min(this.pass, all);
      counts(parts[`${name}Counts`], [
        ["tokens", soFar, most - 1], ["passes", Math.min(this.pass, all + 1), most],
        ["positions", positions - all + soFar, cot.positions]]);
      parts[`${name}Answer`].classList.toggle("later", this.pass <= all);
    };
    const all = own.read + own.words.length;
    showAnswer(parts.cotAnswer, answerIn(cot.text), this.right);
    const again = this.kinds.includes("remove") && own.text.includes("<<");
    showAnswer(parts.coconutAnswer, answerIn(own.text), this.right,
               again && this.stage === coconut.stages.length - 1 && "it went back to words");
    lane("cot", cot.words.length, cot.positions);
    lane("coconut", all, own.positions);
    document.documentElement.dataset.firstThought ??= Math.round(performance.now());
  },

  play() {
    if (this.possible()) player.play(this.last, 130, pass => this.reveal(Math.max(1, pass)));
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
      detail(parts.detail, coconut, own.ids, selected, own.states[selected],
             own.thoughts[selected]);
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
        el("b", {}, `stage ${stage}`),
        el("span", { class: "parts" }, ...row, chip("answer", "word")),
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
    const { stage, seed } = this;               // as they are now: a run takes a while
    const n = this.coconut.stages[stage].thoughts, used = kinds.slice(0, n);
    const what = [...new Set(used)].length > 1 ? used.join(", ") : used[0] ?? "no thoughts";
    const label = `Coconut, stage ${stage}: ${what}`;
    let before = null;                          // each question's thoughts serve the next one
    return { label, ask: i => {
      const { question, answer } = DATA.chains[i];
      before ??= this.others(i, stage);
      const found = this.ask(question, used, () => before, seed + i, stage);
      before = found.thoughts;
      return { right: answerIn(found.text) === answer, tokens: found.read + found.words.length };
    } };
  },
};
