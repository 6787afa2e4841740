"""A run in stages: what scripts with a curriculum have in common around their method and loop.

The loop itself is in each method; what is no mathematics there is one call to a Course. Functions
that a script brings along, next to think_and_answer and train:

    stages(flags, n_batches)              the plan, a list of (stage, updates)
    lengths(examples, stage, flags)       (n, 2): tokens of question and language, see text.batches
    sequences_of(examples, stage, s)      the Sequences of Examples at a stage; s: experiment.Setup
    ready(s, saved, where)                s with what the method adds to the model, whose weights
                                          the checkpoint `saved` has, from the file `where`, or None
    explain(s, thoughts)                  (n, k, C) -> for each of n the texts that they hold
"""

from common import battery, comparison, evaluation, experiment, runtime, schedule, tables
from common.runtime import UserError
from common.text import COCONUT_MARK, batches


class Course:
    """The course of a run through the stages of its plan, a list of (stage, updates). Where it is
    the dict `at` says, which checkpoints keep: the part of the plan, and the update in it.

    s: experiment.Setup; examples: {split: Examples}; bar: the progress bar of --table.
    """

    def __init__(self, s, examples, plan, lengths, sequences_of, think_and_answer, bar=None):
        start = dict(part=0, parts=len(plan), update=0, done=0, best=-1.0, rows=[])
        self.s, self.plan, self.lengths, self.training = s, plan, lengths, examples["train"]
        self.asking = sequences_of, think_and_answer
        self.n_batches = -(-len(self.training) // s.flags.batch_size)
        self.run = experiment.new_run(s, start, sum(n for _, n in plan), bar)
        self.at = self.run.at
        self.items, self.asked = (of["valid"][:s.flags.eval_items] for of in (s.data, examples))
        self.s_valid = evaluation.with_limit(s, self.asked)
        self.order, self.order_of = None, None   # the batches of an epoch, and which one that is

    def stages(self):
        """(stage, updates) of each part of the plan that is left. finish_stage goes on to the next
        one, or back."""
        while self.at["part"] < len(self.plan):
            yield self.plan[self.at["part"]]

    def updates(self):
        """The numbers, from 0, of the updates that are left of a stage; step goes on to the next
        one."""
        while not self.at_end():
            yield self.at["update"]

    def at_end(self):
        """Are all updates of the stage done?"""
        return self.at["update"] >= self.plan[self.at["part"]][1]

    def batch(self):
        """What the next update reads: numbers of training examples, and its random generator. Both
        are functions of seed, stage and epoch, so resuming needs no replay."""
        flags, (stage, _) = self.s.flags, self.plan[self.at["part"]]
        epoch, k = schedule.epoch_of(self.at, self.n_batches)
        if self.order_of != (stage, epoch):
            self.order_of = stage, epoch
            self.order = batches(self.lengths(self.training, stage, flags), flags.batch_size,
                                 runtime.generator(flags.seed, stage, epoch))
        return self.order[k], runtime.generator(flags.seed, stage, epoch, k)

    def step(self, loss, sequences):
        """An update is done: see run.Run.step."""
        self.at["update"] += 1
        self.run.step(loss, sequences, self.at_end(), stage=self.plan[self.at["part"]][0])

    def validate(self, optimizers, losses={}):
        """After every so many updates and at the end of a stage: the accuracy on validation items
        that are asked as at this stage. The best model of the last stage is kept, in best.pt.
        losses: {name: tensor}, logged too."""
        flags, (stage, _) = self.s.flags, self.plan[self.at["part"]]
        if self.at["update"] % (flags.eval_every or self.n_batches) and not self.at_end():
            return
        sequences_of, think_and_answer = self.asking
        v = evaluation.evaluate(self.s_valid, self.items, sequences_of(self.asked, stage, self.s),
                                think_and_answer)
        self.run.valid(v, {name: float(loss) for name, loss in losses.items()}, stage=stage)
        if self.is_last() and self.run.is_best(v):
            self.run.save("best.pt", optimizers)

    def is_last(self):
        return self.at["part"] == len(self.plan) - 1

    def pause(self, optimizers):
        """Save a checkpoint where it is time to; True if the run has been asked to stop."""
        return self.run.pause(optimizers, self.s.flags.save_every, self.at_end())

    def finish_stage(self, optimizers):
        """The end of a stage. Was it not learned, again; else a row of the table, that of the last
        stage from the best checkpoint."""
        s, (stage, _), last = self.s, self.plan[self.at["part"]], self.is_last()
        if s.flags.again and schedule.again(self.run, self.plan, optimizers):
            return
        if last:
            experiment.load_best(s)
        row = test_row(s, s.data["test"], stage, *self.asking)
        schedule.finish_stage(self.run, s, row, stage, last)
        self.run.save("last.pt", optimizers)

    def close(self):
        """The run is over. Returns the rows of the result table."""
        self.run.close()
        return self.at["rows"]


# ---------------------------------------------------------------- what a script does

def examples_of(s, split, items, data=None):
    """Examples of the items, with room for the thoughts of the last stage."""
    n_extra = 2 + s.flags.stage_max * s.flags.c
    where = f"{data or s.flags.data}, {split}.json"
    return experiment.examples_of(s, items, where, n_extra, COCONUT_MARK)


def run(flags, typed, bar, own, values, load, ready, train):
    """One training run, from its start or where its folder left it. Returns what train returns.

    own, values: the script's settings and their defaults, as for experiment.open_run. load:
    data_prep.load. train: (Setup, {split: Examples}, bar) -> the rows of the result table, or None
    if stopped."""
    flags, resumed = experiment.open_run(flags, typed, own, values)
    if resumed and resumed["at"]["part"] == resumed["at"].get("parts"):
        return resumed["at"]["rows"]
    s = experiment.start(flags, resumed, load, COCONUT_MARK)
    examples = {split: examples_of(s, split, items) for split, items in s.data.items()}
    s = experiment.place(ready(s, resumed, flags.out))
    experiment.describe(s, bar)
    return train(s, examples, bar)


def sides_at(stage, sequences_of):
    """What evaluation.report calls sides: a function of a Setup and Examples, here of one side."""
    return lambda s, examples: {s.flags.method: sequences_of(examples, stage, s)}


def test_row(s, items, stage, sequences_of, think_and_answer):
    """A row of the result table: what evaluation.test_row returns, stage, n_latent, and
    step_tokens, how many tokens of steps are still in words."""
    examples = examples_of(s, "test", items)
    s = evaluation.with_limit(s, examples)
    sequences = sequences_of(examples, stage, s)
    row = evaluation.test_row(s, items, sequences, think_and_answer)
    words = sum(len(q.language) - 1 - len(e.answer) for q, e in zip(sequences, examples))
    return row | dict(stage=stage, n_latent=sequences[0].n_latent, step_tokens=words / len(items))


def held_steps(s, lessons):
    """For each of some Sequences that have `steps`, the tokens of what each of their thoughts
    stands for: the texts that explain should give, '' of spare thoughts."""
    return [[s.tok.decode(ids[:-1]).strip() for ids in q.steps] for q in lessons]


def evaluate(s, stage, flags, changed, load, sequences_of, think_and_answer, explain=None):
    """--eval-only: the last line of the table, or what --explain (explain is then given),
    --thoughts or --ask asks for. flags: as typed; changed: the settings that are not those of the
    run."""
    sides = sides_at(stage, sequences_of)
    if explain is not None and (s.decoder is None or stage == 0):
        raise UserError(f"--explain: {flags.eval_only} has no decoder of thoughts: it was trained "
                        "with --step-weight 0, or is at stage 0; give another one.")
    if flags.ask is not None:
        return battery.ask(s, flags.ask, 2 + s.flags.stage_max * s.flags.c, COCONUT_MARK, sides,
                           think_and_answer, explain=explain)
    test = experiment.test_sets(s, load)
    if explain is not None:
        for name, items in test.items():
            examples = examples_of(s, "test", items, name)
            s_test, lessons = evaluation.with_limit(s, examples), sequences_of(examples, stage, s)
            found = evaluation.answer_all(s_test, items, lessons, think_and_answer)
            comparison.print_explained(held_steps(s, lessons), explain(s_test, found.thoughts),
                                       found.right.tolist(), name)
        return
    if "thoughts" in changed:
        return battery.report(s, flags.eval_only, test, examples_of, sides, think_and_answer)
    row = test_row(s, test[s.flags.data], stage, sequences_of, think_and_answer)
    schedule.print_stages([row], s.flags)


def train_table(script, flags, variants, stages, prep, run, trained_model, sequences_of,
                think_and_answer, curves=None):
    """--table: every variant for every seed, from the best checkpoints; see tables.train_and_write.
    script: its name; prep: data_prep; run, trained_model: the script's."""
    data = experiment.load_first(flags, prep.load)
    plan = stages(flags, -(-len(data["train"]) // flags.batch_size))

    def replaced(path):
        s, stage = trained_model(path, {})
        return battery.all_rows(s, data["test"], examples_of, sides_at(stage, sequences_of),
                                think_and_answer)

    return tables.train_and_write(script, flags, variants, 3, sum(n for _, n in plan), run,
                                  replaced, variants, prep.write_json, prep.floors(data["test"]),
                                  curves)
