"""llava_moe: sparse (mixture-of-experts) vision-language models in the LLaVA style.

Importing the package makes its classes known to transformers' Auto classes; that is the only side effect. Where
transformers is not installed, only `llava_moe.moe` can be used.
"""

from importlib.util import find_spec

from llava_moe import _torchvision

__version__ = "0.1.0"

_torchvision.install()
if find_spec("transformers") is not None:
    from llava_moe import _register

    _register.register()
