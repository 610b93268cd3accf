"""Checkpoints of other programs, in and out; `llava-moe import` and `llava-moe export` are made of these."""

from llava_moe.model.formats.detect import LAYOUTS, detect
from llava_moe.model.formats.export_check import check_export
from llava_moe.model.formats.exporting import ExportPlan, export_weights, plan_export
from llava_moe.model.formats.importing import Imported, plan_import
from llava_moe.model.formats.parts import Options

__all__ = [
    "LAYOUTS",
    "ExportPlan",
    "Imported",
    "Options",
    "check_export",
    "detect",
    "export_weights",
    "plan_export",
    "plan_import",
]
