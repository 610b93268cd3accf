"""What suites and tasks read, data set by data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.benchmarks.card import DEFAULT_CONFIG
from data_prep.manifest import ManifestError
from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.mirror import Recorded, sources_of
from llava_moe.evaluation.suites import BENCHMARKS, SUITES, expand
from llava_moe.registry import near_misses


@dataclass(frozen=True)
class Need:
    """The splits of one data set that are read.

    Attributes:
        repo: `organisation/name`.
        splits: by configuration; None for the one that is loaded when none is named.
        tasks: who reads them.
    """

    repo: str
    splits: dict[str | None, frozenset[str]]
    tasks: tuple[str, ...] = ()

    def pairs(self) -> list[tuple[str | None, str]]:
        """Every configuration and split."""
        return [(config, split) for config, splits in self.splits.items() for split in sorted(splits)]

    def names(self) -> list[str]:
        """The same as `configuration/split`."""
        return [f"{config or DEFAULT_CONFIG}/{split}" for config, split in self.pairs()]

    def met_by(self, record: Recorded) -> bool:
        """Whether a record holds all these splits."""
        return all(split in record.rows.get(config or DEFAULT_CONFIG, {}) for config, split in self.pairs())

    def with_recorded(self, record: Recorded | None) -> Need:
        """This need and what a record holds already, which must not be lost."""
        splits = dict(self.splits)
        for config, rows in ({} if record is None else record.rows).items():
            key = None if config == DEFAULT_CONFIG and config not in splits else config
            splits[key] = splits.get(key, frozenset()) | frozenset(rows)
        return Need(self.repo, splits, self.tasks)


def needs(names: Sequence[str]) -> list[Need]:
    """What suites and tasks read, in the order of their first mention.

    Raises:
        ManifestError: a name is unknown, or nothing that is named reads from the Hub.
    """
    splits: dict[str, dict[str | None, frozenset[str]]] = {}
    tasks: dict[str, dict[str, None]] = {}
    try:
        for task in expand(names):
            for source in sources_of(task):
                configs = splits.setdefault(source.repo, {})
                configs[source.config] = configs.get(source.config, frozenset()) | {source.split}
                tasks.setdefault(source.repo, {})[task] = None
    except EvaluationError as error:
        known = [*SUITES.names(), *BENCHMARKS.names()]
        unknown = next((name for name in names if name not in known), "")
        hint = f"; {near_misses(unknown, known)}" if unknown else ""
        raise ManifestError(f"{error}{hint}") from error
    if not splits:
        raise ManifestError(f"{', '.join(names)}: nothing of it is read from the Hub, there is nothing to prepare")
    return [Need(repo, splits[repo], tuple(tasks[repo])) for repo in splits]
