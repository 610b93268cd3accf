"""Sample data, bundled assets and the quickstart data builder; llava_moe never imports this package."""

import llava_moe  # noqa: F401  (its torchvision hook must stand before anything here imports transformers or timm)
