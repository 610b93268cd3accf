"""Scoring: the lmms-eval plug-in, the local tasks, the wrapper that runs them, statistics, summary and report."""


class EvaluationError(ValueError):
    """A scoring run was asked for something that cannot be right; the message names the culprit and the remedy."""
