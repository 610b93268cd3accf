"""What recorded runs and routings show: `llava-moe analyze NAME ...`. An analysis is one file and one line here.

Analyses work on files and never on live models.
"""

from __future__ import annotations

from llava_moe.analysis.base import Analysis, AnalysisError
from llava_moe.analysis.run import RunAnalysis
from llava_moe.registry import Registry

ANALYSES: Registry[type[Analysis]] = Registry("analysis")
ANALYSES.register("run", RunAnalysis)

__all__ = ["ANALYSES", "Analysis", "AnalysisError"]
