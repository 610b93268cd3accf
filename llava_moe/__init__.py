"""llava_moe: sparse (mixture-of-experts) vision-language models in the LLaVA style.

Importing the package makes its classes known to transformers' Auto classes; that is the only side effect. Where
transformers, or what our classes need beside it, is not installed, only `llava_moe.moe` and `llava-moe doctor` work.
"""

from importlib.util import find_spec

from llava_moe import _torchvision

__version__ = "0.1.0"

_torchvision.install()
if all(find_spec(name) is not None for name in ("torch", "transformers", "timm", "torchvision", "PIL")):
    from llava_moe import _register

    _register.register()
