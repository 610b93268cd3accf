"""Whether the data that a recipe names is on this machine; looked at before anything is loaded or computed."""

from __future__ import annotations

import glob
from pathlib import Path

from llava_moe.config import RecipeError, RunConfig
from llava_moe.data.mixture import SourceSpec, load_mixture

WHERE = "docs/data.md says where data comes from"
WHERE_OF = {  # by a folder in the path: what makes or describes it
    "LLaVA-Pretrain": "bash scripts/prepare_data.sh llava_pretrain fetches it, see docs/data.md",
    "LLaVA-Instruct": "bash scripts/prepare_data.sh llava_mix665k fetches it, see docs/data.md",
    "MoE-LLaVA": "docs/data.md, section 'MoE-LLaVA', says where it comes from",
    "CuMo": "docs/data.md, section 'CuMo', says where it comes from",
    "LLaVA-NeXT": "docs/data.md, section 'LLaVA-NeXT', says where it comes from",
    "LLaVA-OneVision": "docs/data.md, section 'LLaVA-OneVision', says where it comes from",
    "LibMoE": "docs/data.md, section 'LibMoE', says where it comes from",
    "quickstart": "bash scripts/quickstart.sh makes it",
}


def missing_places(config: RunConfig, folders: bool = True) -> list[str]:
    """One line for each data file, mixture or index that is not there: its key, its path, the mend.

    Args:
        folders: also for each image folder.
    """
    data = config.data
    if data.index is not None:
        there = (Path(data.index) / "index.json").is_file()
        return [] if there else [f"data.index: {data.index}: no index is there; llava-moe check-data writes one"]
    if data.mixture is not None:
        if not Path(data.mixture).is_file():
            return [f"data.mixture: {data.mixture}: no such file; {where(data.mixture)}"]
        listed, key = load_mixture(data.mixture).sources, f"{data.mixture}: sources"
    else:
        listed, key = tuple(SourceSpec(s.path, s.image_folder) for s in data.sources), "data.sources"
    return [line for number, source in enumerate(listed) for line in _of_source(source, f"{key}[{number}]", folders)]


def _of_source(source: SourceSpec, key: str, folders: bool) -> list[str]:
    lines = []
    if not Path(source.path).exists() and not glob.glob(source.path, recursive=True):
        lines.append(f"{key}.path: {source.path}: no such data file; {where(source.path)}")
    folder = source.image_folder
    if folders and folder is not None and not Path(folder).is_dir():
        lines.append(f"{key}.image_folder: {folder}: no such folder; {where(folder)}")
    return lines


def where(path: str) -> str:
    """What makes a file or folder of that path, or says where it comes from."""
    parts = Path(path).parts
    return next((said for name, said in WHERE_OF.items() if name in parts), WHERE)


def check_places(config: RunConfig) -> None:
    """Raises RecipeError that names, line by line, the data files that are missing; `preflight.py` sees to folders."""
    missing = missing_places(config, folders=False)
    if missing:
        raise RecipeError("\n".join(missing))


def dry_lines(config: RunConfig) -> list[str]:
    """For a dry run, which needs no data."""
    return [f"# not on this machine: {line}" for line in missing_places(config)]
