"""Where the numbers of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio, ... (train.report_to).

transformers' own integrations do the writing; here is what they leave to the user: whether the package is there, where
the files go, and what happens without a network.
"""

from __future__ import annotations

import netrc
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from llava_moe.config import RecipeError
from llava_moe.registry import near_misses

FOLDER = "tensorboard"
PROJECT = "llava_moe"
# Module and distribution of an integration, where they are not called as it is.
_MODULES = {"azure_ml": "azureml", "flyte": "flytekit"}
_DISTRIBUTIONS = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}


def report_to(asked: Any) -> list[str]:
    """The integrations that a recipe asks for with `train.report_to`.

    Args:
        asked: a name, a list of names, "all", "none", or None, which means TensorBoard where it is installed.

    Raises:
        RecipeError: there is no such integration, or its package is missing.
    """
    if asked is None:
        return ["tensorboard"] if _is_installed("tensorboard") else []
    names = [asked] if isinstance(asked, str) else asked
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"train.report_to={asked!r} must be a name or a list of names, e.g. [tensorboard, wandb]")
    if names in (["none"], []):
        return []
    known = sorted(INTEGRATION_TO_CALLBACK)
    if names == ["all"]:
        return [name for name in known if _is_installed(name)]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise RecipeError(
                f"train.report_to: {name!r} is none of {', '.join(known)}, all, none; {near_misses(name, known)}"
            )
        if not _is_installed(name):
            raise RecipeError(
                f"train.report_to names {name}, whose package is not installed: "
                f"pip install {_DISTRIBUTIONS.get(name, name)}, or leave it out"
            )
    return list(dict.fromkeys(names))


def _is_installed(name: str) -> bool:
    # tensorboardX has a writer of its own and stands in for tensorboard
    modules = ["tensorboard", "tensorboardX"] if name == "tensorboard" else [_MODULES.get(name, name)]
    return any(find_spec(module) is not None for module in modules)


class TensorBoard(TensorBoardCallback):  # type: ignore[misc]  # transformers types it as Any
    """Event files in `<output_dir>/tensorboard`, or TENSORBOARD_LOGGING_DIR where that is set.

    A resumed run tells TensorBoard to forget the steps that will run again, so no curve has two values at one step.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.tb_writer is None:
            self.logging_dir = self.logging_dir or str(Path(args.output_dir) / FOLDER)
            again = state.global_step + 1 if Path(self.logging_dir).is_dir() else None
            self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=again)
        super().on_train_begin(args, state, control, **kwargs)


def install(trainer: Any) -> None:
    """Puts our TensorBoard writer in the place of the stock one, and tells the others where the run belongs."""
    if trainer.pop_callback(TensorBoardCallback) is not None:
        trainer.add_callback(TensorBoard())
    if "wandb" in trainer.args.report_to:
        for key, value in wandb_defaults(trainer.args.output_dir).items():
            os.environ.setdefault(key, value)


def wandb_defaults(output_dir: str) -> dict[str, str]:
    """What Weights & Biases is told unless the environment says otherwise.

    Its files lie in the folder of the run. Without a key it would stop and ask for one, so it writes to disk only;
    `wandb sync <output_dir>/wandb/offline-run-*` uploads that later.
    """
    defaults = {"WANDB_PROJECT": PROJECT, "WANDB_DIR": output_dir}
    if "WANDB_API_KEY" not in os.environ and not _has_login(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")):
        defaults["WANDB_MODE"] = "offline"
    return defaults


def _has_login(url: str) -> bool:
    """Whether `wandb login` has been here: it keeps the key where other programs keep theirs."""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(str(path)).authenticators(urlsplit(url).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False
