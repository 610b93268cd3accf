"""Says what a GPU machine lacks for its benchmarks; fails where nothing would run. Needs the standard library alone."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("torch", "transformers", "accelerate", "omegaconf", "safetensors", "timm", "torchvision", "rich", "pytest")
OPTIONAL = {
    "liger_kernel": "the fused loss by liger",
    "flash_attn": "FlashAttention 2",
    "flash_attn_interface": "FlashAttention 3",
}


def main() -> int:
    """0, or 2 where a package is missing that all need."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    for name, what in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            print(f"not installed: {name}; skipped: {what}")
    if not absent:
        import torch

        if torch.cuda.is_available():
            print(torch.cuda.get_device_name(), torch.__version__)
            return 0
        absent = ["a CUDA device that torch sees (llava-moe doctor)"]
    print(f"error: missing: {', '.join(absent)}; bash scripts/install.sh installs the packages", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
