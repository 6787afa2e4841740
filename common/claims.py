"""What numbers say about the claims of Stochastic Soft Thinking (arXiv 2508.03440): means with
standard errors, verdicts, and the finding in words.

A claim holds from two standard errors on. Steps of one thought are not independent, so that errors
are those of questions: see clustered. Nothing here knows of a model: rows are what sampling.compare
returns, all else are arrays. A claim is a list of three: what is claimed, numbers, verdict.
"""

import math
import textwrap

import numpy as np

from common.sampling import mean_and_error

# ---------------------------------------------------------------- means, errors, verdicts


def clustered(x, question):
    """Mean of x (N,), and its standard error where only different questions (N,) are independent:
    the sums of each question's deviations take the place of single ones. nan for fewer than two
    questions."""
    x, question = np.asarray(x, float), np.asarray(question)
    known = np.unique(question)
    G = len(known)
    if G < 2:
        return float(x.mean()) if len(x) else math.nan, math.nan
    sums = np.array([(x - x.mean())[question == name].sum() for name in known])
    return float(x.mean()), float(np.sqrt(G / (G - 1) * (sums ** 2).sum()) / len(x))


def verdict(mean, error, also=True):
    """In words, of a claim that the mean is above 0. also: what else the claim says."""
    if mean > 2 * error:
        return "holds" if also else "in part"
    return "does not hold" if mean < -2 * error else "unclear"


def show(claims):
    """Print each claim in lines of at most 100 characters."""
    if claims:
        print("\nClaims of arXiv 2508.03440, and what the numbers above say of them (± one "
              "standard error,\nof questions; a verdict takes two):")
    for claim, numbers, said in claims:
        lines = textwrap.wrap(f"{claim}: {numbers}.", 84)
        for start, line in zip([f"{said}:", *[""] * len(lines)], lines):
            print(f"{start:15} {line}")


def plus_minus(pair, form=".3f"):
    """A mean and its error, as text."""
    return f"{pair[0]:{form}} ± {pair[1]:{form.replace('+', '')}}"


# ---------------------------------------------------------------- claims


def of_js(unsure, half, lag):
    """Is a soft token nearer to its first candidate than to the second, and nearly that? unsure
    (N, 8): question, step, entropy, weight of the first candidate, JS to the first and to the
    second after the next token, and after some. half: a weight that is not most of it."""
    cases = [("", "next token", unsure, 4), ("", f"largest of {lag} places", unsure, 6),
             (f", also with less than {half:g} of the weight", "next token",
              unsure[unsure[:, 3] < half], 4)]
    found = []
    for which, place, x, at in cases:
        if len(x):
            first, second = (clustered(x[:, i], x[:, 0]) for i in (at, at + 1))
            near, far = np.median(x[:, at:at + 2], 0)
            found.append([
                f"a soft token is read as its first candidate{which} ({place})",
                f"JS {plus_minus(first)} to the first, {plus_minus(second)} to the second; medians "
                f"{near:.3f} and {far:.3f}; {len(x)} steps of {len(np.unique(x[:, 0]))} questions",
                verdict(*clustered(x[:, at + 1] - x[:, at], x[:, 0]), near < far / 10)])
    return found


def of_lens(both, share, question):
    """Are both paths of a mixture visible in some layer, and only the first in the end? both (N,
    layers + 1) bool: both are visible; share (N, layers + 1): the first one's share."""
    if not len(both):
        return []
    seen, left = both[:, 1:-1].any(1), share[:, -1] > 0.9
    numbers = [plus_minus(clustered(100 * x, question), ".0f") for x in (seen, left, seen & left)]
    return [["both paths are visible for some layers, then only the first",
             f"both in {numbers[0]} % of the forks, in the end nine tenths are the first's in "
             f"{numbers[1]} %, one after the other in {numbers[2]} %; {len(both)} forks of "
             f"{len(np.unique(question))} questions (holds: in most)",
             verdict(*clustered((seen & left) - 0.5, question))]]


def way(rouge, mode):
    """How much of the way from greedy to sampling a mode goes, by 1 - ROUGE-L. rouge: {mode:
    (questions, draws)}, ROUGE-L with the greedy trace."""
    return (1 - rouge[mode].mean()) / (1 - rouge["sample"].mean())


def of_rouge(rouge):
    """Does vanilla follow greedy, does Gumbel noise escape? rouge: see way."""
    if rouge["sample"].mean() == 1:
        return []
    mean = {mode: x.mean(1) for mode, x in rouge.items()}
    each = {mode: plus_minus(mean_and_error(x)) for mode, x in mean.items()}
    rest = f"sampling {each['sample']}; {len(mean['greedy'])} questions"
    return [
        ["without noise soft thinking is nearly greedy thinking",
         f"ROUGE-L with greedy {each['vanilla']}, {100 * way(rouge, 'vanilla'):.0f} % of the way "
         f"to sampling, {rest}",
         verdict(*mean_and_error(mean["vanilla"] - mean["sample"]), way(rouge, "vanilla") < 0.25)],
        ["Gumbel noise brings the other paths back",
         f"ROUGE-L with greedy {each['gumbel']}, {100 * way(rouge, 'gumbel'):.0f} % of the way to "
         f"sampling, {rest}",
         verdict(*mean_and_error(mean["vanilla"] - mean["gumbel"]), way(rouge, "gumbel") > 0.75)]]


def of_randomness(found, question):
    """Does Gumbel noise, at the paper's tau, keep more randomness than Dirichlet noise that leaves
    as much softness? found: {name of noise: (randomness (N,), softness (N,))}. The error is a
    jackknife's, which leaves out each question (N,) in turn."""
    gumbel = found["gumbel tau 0.5"]
    dirichlet = [pair for name, pair in found.items() if name.startswith("dirichlet")]

    def randomness(kept):                       # of Gumbel noise, and of the other, interpolated
        curve = sorted((soft[kept].mean(), random[kept].mean()) for random, soft in dirichlet)
        same = np.interp(gumbel[1][kept].mean(), *zip(*curve))
        return gumbel[0][kept].mean(), same

    question = np.asarray(question)
    known = np.unique(question)
    ours, other = randomness(question == question)
    error = math.nan
    if len(known) > 1:
        left = np.array([np.subtract(*randomness(question != name)) for name in known])
        error = float(np.sqrt((len(known) - 1) * left.var()))
    return [["only Gumbel noise is both random and soft",
             f"randomness {ours:.3f}, Dirichlet noise that leaves as much softness {other:.3f}, "
             f"difference {ours - other:+.3f} ± {error:.3f}; {len(question)} steps of "
             f"{len(known)} questions", verdict(ours - other, error, other < ours / 2)]]


def of_branching(first, second, question):
    """Whose way does a soft token go? first, second (N,) bool: that of each candidate."""
    shares = [plus_minus(clustered(100 * x, question), ".0f") for x in (first, second)]
    ahead = np.subtract(first, second, dtype=float)
    return [["at a fork the soft token goes the first candidate's way",
             f"{shares[0]} % the first's, {shares[1]} % the second's; {len(first)} forks of "
             f"{len(np.unique(question))} questions",
             verdict(*clustered(ahead, question), first.mean() > 0.75)]]


def of_modes(rows):
    """Does Gumbel noise gain, in one rollout and in the best of some?"""
    n, last = len(rows["greedy"]["right"]), max(rows["greedy"]["pass_at"])
    gains = [paired(rows, "gumbel", other) for other in ("greedy", "sample")]
    least = min(gains, key=lambda gain: gain[0] - 2 * gain[1])
    found = [["with Gumbel noise soft thinking is better than thinking in words",
              f"{plus_minus(gains[0], '+.1f')} points against greedy, "
              f"{plus_minus(gains[1], '+.1f')} against sampling; {n} questions", verdict(*least)]]
    if last > 1:
        best = {mode: 100 * row["right"].max(1) for mode, row in rows.items()}
        wider = [mean_and_error(best["gumbel"] - best[other]) for other in ("vanilla", "sample")]
        found.append([f"with noise more is right in one of {last} rollouts (Pass@{last})",
                      f"Gumbel {plus_minus(wider[0], '+.1f')} points against vanilla, "
                      f"{plus_minus(wider[1], '+.1f')} against sampling; {n} questions",
                      verdict(*wider[0])])
    return found


def paired(rows, mode, other):
    """Mean difference of two modes' accuracies over the questions, in points, and its standard
    error."""
    by_question = rows[mode]["right"].mean(1) - rows[other]["right"].mean(1)
    return mean_and_error(100 * by_question)


# ---------------------------------------------------------------- the finding


def finding(rows, rouge):
    """A paragraph from all modes' numbers: does vanilla follow greedy, does noise escape, at what
    cost or gain? rouge: see way."""
    if rouge["sample"].mean() == 1:
        return ("Finding: sampling never left the greedy trace; raise --temperature, or take a "
                "less certain model.")

    def goes(mode):
        share = way(rouge, mode)
        word = "stays between"
        if share < 0.25:
            word = "follows greedy"
        elif share > 0.75:
            word = "escapes"
        return f"{mode} goes {100 * share:.0f} % of that way, so it {word},"

    def against(mode, other):
        mean, error = paired(rows, mode, other)
        word = "neither clearly gains nor loses"
        if mean > 2 * error:
            word = "gains"
        elif mean < -2 * error:
            word = "loses"
        return f"{word} against {other} ({mean:+.1f} ± {error:.1f} points)"

    last = max(rows["greedy"]["pass_at"])
    passed = ", ".join(f"{mode} {rows[mode]['pass_at'][last]:.1f} %" for mode in rows)
    return (f"Finding: 1 - ROUGE-L from greedy traces to sampled ones is "
            f"{1 - rouge['sample'].mean():.3f}; "
            f"{goes('vanilla')} and {against('vanilla', 'greedy')}; {goes('gumbel')} and "
            f"{against('gumbel', 'greedy')}, and {against('gumbel', 'sample')}; "
            f"{goes('dirichlet')} and {against('dirichlet', 'greedy')}; {goes('moi')} and "
            f"{against('moi', 'greedy')}. Right in at least one of {last} rollouts: {passed}. (± "
            f"one standard error over {len(rows['greedy']['right'])} questions; to gain or lose "
            "takes two.)")
