"""What a reader should know first, in words: what was saved, what was left out, what to do."""

from __future__ import annotations

from slap_stream.report.corpus_facts import CorpusFacts
from slap_stream.report.page import Section
from slap_stream.report.run_facts import RunFacts
from slap_stream.report.said import duration, number, percent, tokens
from slap_stream.selection.departures import DRAWN_OUT, LEARNT

# From these shares of the candidates on something is worth doing about them.
MANY_COPIES, MANY_SUSPECTS = 0.05, 0.01
# Of public corpora with nothing wrong as many targets are marked, as if they were of other prompts;
# docs/report.md has the table.
LOOKS_RIGHT = 0.04

# Of each reason, how a sentence that begins with a number ends.
_WHY = {
    "copy": "as near-copies of a sample trained on lately",
    "mismatch": "because the target looks like another prompt's",
    "outlier": "because the loss stands out as noise does",
    "unrelated": "because they are not of the target set's kind",
    LEARNT: "because little is left to learn from them",
    DRAWN_OUT: "by chance",
}


def run_verdict(facts: RunFacts) -> Section:
    """The first section of a run's page."""
    counts, every = facts.counts, max(1, facts.candidates)
    if not facts.candidates:
        return Section(
            id="verdict", title="In short", lines=["No batch has been delivered yet. Look later."]
        )
    first = (
        f"It trained on {number(facts.trained)} of {number(facts.candidates)} candidates and "
        f"pruned {number(facts.pruned)} ({percent(facts.pruned_share)}), which are "
        f"{percent(facts.pruned_token_share)} of the tokens."
    )
    lines = [first]
    if facts.withdrawn:
        lines[0] += f" {number(facts.withdrawn)} could not be used."
    if facts.pruned:
        why = [f"{number(counts[name])} {said}" for name, said in _WHY.items() if counts[name]]
        lines.append(f"Pruned: {'; '.join(why)}.")
        spent = facts.probe_seconds + facts.compose_seconds
        saved = f"That saved about {duration(facts.seconds_saved)} beside the"
        if facts.spends:
            saved = "That made room for other visits, and saved no time of the"
        lines.append(
            f"{saved} {duration(facts.seconds)} that it took; choosing cost {duration(spent)} of "
            "work, part of it beside the steps."
        )
    todo = []
    if facts.withdrawn:
        todo.append(
            f"Look at the {number(facts.withdrawn)} samples that were withdrawn: the list below "
            "says why."
        )
    if counts["copy"] / every >= MANY_COPIES:
        todo.append(
            f"Look at the copies below ({percent(counts['copy'] / every)} of the candidates). If "
            "they are copies to you, too, remove them from the data: every run is then as much "
            "shorter. --export pruned.csv lists them with what they copy."
        )
    suspects = counts["mismatch"] + counts["outlier"]
    if suspects / every >= MANY_SUSPECTS:
        todo.append(
            f"Read some of the {number(suspects)} marked mismatch or outlier. Mend those that are "
            "wrong; if most are right, prune less (a higher keep)."
        )
    by_chance = counts[DRAWN_OUT]
    if facts.config["keep"] != "auto" and by_chance > 0.5 * facts.pruned:
        todo.append(
            f"Nothing speaks against {number(by_chance)} of the pruned: keep="
            f"{facts.config['keep']} asks for that. To prune only what something speaks against, "
            'set keep="auto".'
        )
    if not facts.noted:
        todo.append(
            "Note a held-out loss now and then, loader.note(held_out_loss=...): only that shows "
            "whether anything was lost."
        )
    return Section(id="verdict", title="In short", lines=lines, todo=todo or ["Nothing."])


def corpus_verdict(facts: CorpusFacts) -> Section:
    """The first section of a corpus's page."""
    sources = len(facts.sources)
    lines = [
        f"{number(facts.num_samples)} samples"
        + (f" of {sources} sources" if sources > 1 else "")
        + f", {tokens(int(facts.lengths.sum()), facts.length_unit)}."
    ]
    todo = []
    if facts.copy_rate >= MANY_COPIES:
        lines.append(f"{percent(facts.copy_rate)} nearly repeat an earlier sample.")
        todo.append(
            "Look at the near-copies below: do they say the same, or only begin alike? Remove what "
            'repeats, or let slap prune it as it comes: SlapConfig(keep="auto").'
        )
    else:
        lines.append(f"Hardly a sample repeats an earlier one ({percent(facts.copy_rate)}).")
    share = facts.misplaced_share
    if share is None:
        lines.append("Whether targets belong to their prompts could not be found out.")
    elif share <= LOOKS_RIGHT:
        lines.append(
            "Nothing shows that targets belong to other prompts: corpora in which nothing is wrong "
            "look like this."
        )
    else:
        lines.append(
            f"Up to about {percent(share)} of the targets may belong to other prompts, by their "
            "words."
        )
        todo.append(
            "Read some of the samples marked 'may be misplaced'. Answers that fit many prompts are "
            "marked, too, so trust your eyes."
        )
    if not todo:
        todo.append(
            "Nothing to mend is seen. On such data there is little to prune; "
            'SlapConfig(keep="auto") finds out how little.'
        )
    return Section(id="verdict", title="In short", lines=lines, todo=todo)
