"""Puts MoE, dense control, blind and majority side by side: results.json and results.md of a whole recipe run."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_moe.evaluation import EvaluationError, records, stats

HEADLINE = "shapes_open"
ALL_YES_NO = "all_yesno"
YES_NO = frozenset({"yes", "no"})
BLANK_IMAGE = "dense model on blank pictures"
COMMONEST_TRAINING_ANSWER = "commonest training answer of the question"

# target, then whether MoE, dense control, dense control on blank pictures and training prior are right
_Answered = tuple[str, bool, bool, bool, bool]
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Scored:
    """One score: value in 0..1 and its 95 % interval."""

    value: float
    interval: stats.Interval


@dataclass(frozen=True)
class FamilyAnswers:
    """The questions of one family and who answered them correctly, all in the same order."""

    targets: tuple[str, ...]
    moe: tuple[bool, ...]
    dense: tuple[bool, ...]
    blank: tuple[bool, ...]
    prior: tuple[bool, ...]

    @property
    def metric(self) -> str:
        """Balanced accuracy where every answer is yes or no, else accuracy."""
        return "balanced_accuracy" if set(self.targets) <= YES_NO else "accuracy"

    @property
    def majority(self) -> tuple[bool, ...]:
        """Whether the commonest answer of this family's own questions is right."""
        commonest = Counter(self.targets).most_common(1)[0][0]
        return tuple(target == commonest for target in self.targets)

    def score(self, correct: Sequence[bool]) -> Scored:
        """The family's metric with its interval."""
        if self.metric == "balanced_accuracy":
            value = stats.balanced_accuracy(correct, self.targets)
            return Scored(value, stats.balanced_accuracy_interval(correct, self.targets))
        return Scored(stats.accuracy(correct), stats.wilson_interval(sum(correct), len(correct)))


def summarize(
    moe_run: Path,
    dense_run: Path,
    blank_run: Path,
    priors: Path,
    out: Path,
    seconds: Mapping[str, float],
    upcycle: Mapping[str, float],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Writes OUT/results.json and OUT/results.md from three finished runs of `evaluate`.

    Args:
        moe_run: folder of the MoE's run.
        dense_run: folder of the dense control's run.
        blank_run: folder of the dense control's run with blank pictures.
        priors: JSON that maps each question string to its commonest training answer.
        out: folder to write to.
        seconds: wall-clock seconds of each stage.
        upcycle: {"max_abs_logit_error": difference of the upcycled model from its dense parent}.
        versions: package name to version.

    Raises:
        EvaluationError: a run is unfinished, the runs answered different questions, or a question has no prior.
    """
    samples = {
        name: records.read_samples(run) for name, run in (("moe", moe_run), ("dense", dense_run), ("blank", blank_run))
    }
    families = collect(samples["moe"], samples["dense"], samples["blank"], records.read_json(priors), str(priors))
    results = {
        "tasks": {name: _row(family) for name, family in families.items()},
        "seconds": dict(seconds),
        "upcycle": dict(upcycle),
        "versions": dict(versions),
    }
    out.mkdir(parents=True, exist_ok=True)
    records.write_json(out / "results.json", results)
    (out / "results.md").write_text(markdown(results), encoding="utf-8")
    return results


def collect(
    moe: Sequence[dict[str, Any]],
    dense: Sequence[dict[str, Any]],
    blank: Sequence[dict[str, Any]],
    priors: Mapping[str, str],
    priors_name: str = "priors",
) -> dict[str, FamilyAnswers]:
    """Groups the same questions of three runs by family: the headline first, all yes/no families together last.

    Raises:
        EvaluationError: the runs answered different questions, or a question has no prior.
    """
    others = [{_key(sample): sample for sample in run} for run in (dense, blank)]
    for name, other in zip(("dense", "blank-picture"), others, strict=True):
        if set(other) != {_key(sample) for sample in moe}:
            raise EvaluationError(
                f"the MoE run answered {len(moe)} questions and the {name} run {len(other)}, and they are not the "
                "same ones; score all with the same data and limit"
            )
    members: dict[str, list[_Answered]] = {}
    for sample in moe:
        if sample["correct"] is None:
            continue  # a task of lmms-eval whose single answers are not judged
        target, question = str(sample["target"]), sample["question"]
        if question not in priors:
            raise EvaluationError(f"{priors_name} has no answer for the question {question!r} of {sample['id']!r}")
        in_dense, in_blank = (bool(other[_key(sample)]["correct"]) for other in others)
        prior = _same_answer(priors[question], target)
        members.setdefault(sample["family"], []).append((target, bool(sample["correct"]), in_dense, in_blank, prior))
    if not members:
        raise EvaluationError("no judged answers in the runs; were local tasks scored?")
    families = {name: _family(members[name]) for name in sorted(members, key=lambda name: name != HEADLINE)}
    yes_no = [name for name, family in families.items() if family.metric == "balanced_accuracy"]
    if yes_no:
        families[ALL_YES_NO] = _family([answered for name in yes_no for answered in members[name]])
    return families


def verdict(row: Mapping[str, Any]) -> str:
    """How the MoE stands to its dense control: only a paired interval without zero counts as a difference."""
    low, high = row["difference_ci"]
    if low > 0:
        return "better"
    return "worse" if high < 0 else "no difference shown"


def markdown(results: Mapping[str, Any]) -> str:
    """results.md: the score table, seconds per stage, exactness of the upcycle, versions."""
    rows = [
        "| questions | n | metric | MoE | dense control | MoE - dense, paired | blind | majority | MoE is |",
        "| --- | ---: | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in results["tasks"].items():
        label = f"**{name}**" if name == HEADLINE else name
        metric = row["metric"].replace("_", " ")
        scores = " | ".join(_percent(row[model], row[f"{model}_ci"]) for model in ("moe", "dense"))
        difference = _percent(row["moe"] - row["dense"], row["difference_ci"], sign="+")
        baselines = " | ".join(_percent(row[model], row[f"{model}_ci"]) for model in ("blind", "majority"))
        rows.append(f"| {label} | {row['n']} | {metric} | {scores} | {difference} | {baselines} | {verdict(row)} |")
    seconds = [f"| {stage} | {value:.0f} |" for stage, value in results["seconds"].items()]
    lines = [
        "# Results",
        "",
        f"The headline is {HEADLINE}: open questions that cannot be answered well without looking.",
        "",
        *rows,
        "",
        "Values are percentages with their 95 % intervals (accuracy: Wilson; balanced accuracy and paired differences:",
        "bootstrap). *Blind* is the better of the dense control on blank pictures and of the commonest training answer",
        "of each question string; *majority* is the commonest answer among the family's own questions. The MoE is",
        "called better or worse only where the paired interval excludes 0.",
        "",
        *[f"- Upcycling, {name.replace('_', ' ')}: {value:.3g}" for name, value in results["upcycle"].items()],
        "",
        "| stage | seconds |",
        "| --- | ---: |",
        *seconds,
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _family(members: Sequence[_Answered]) -> FamilyAnswers:
    targets, moe, dense, blank, prior = zip(*members, strict=True)
    return FamilyAnswers(targets, moe, dense, blank, prior)


def _row(family: FamilyAnswers) -> dict[str, Any]:
    moe, dense, majority = (family.score(correct) for correct in (family.moe, family.dense, family.majority))
    blank, prior = family.score(family.blank), family.score(family.prior)
    blind, source = (blank, BLANK_IMAGE) if blank.value >= prior.value else (prior, COMMONEST_TRAINING_ANSWER)
    strata = family.targets if family.metric == "balanced_accuracy" else None
    return {
        "n": len(family.targets),
        "metric": family.metric,
        "moe": moe.value,
        "dense": dense.value,
        "blind": blind.value,
        "majority": majority.value,
        "moe_ci": list(moe.interval),
        "dense_ci": list(dense.interval),
        "difference_ci": list(stats.paired_difference_interval(family.moe, family.dense, strata)),
        "blind_ci": list(blind.interval),
        "blind_source": source,
        "majority_ci": list(majority.interval),
    }


def _key(sample: Mapping[str, Any]) -> tuple[str, str, str]:
    return sample["task"], str(sample["id"]), str(sample["target"])


def _same_answer(answer: str, target: str) -> bool:
    """Equal in the sense of GQA's score: without case and punctuation."""
    return answer.strip().lower().translate(_PUNCTUATION) == target.strip().lower().translate(_PUNCTUATION)


def _percent(value: float, interval: Sequence[float], sign: str = "") -> str:
    low, high = interval
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"
