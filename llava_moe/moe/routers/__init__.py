"""Routers by name. A new one is a file here and a line below; the contract tests run over the registry."""

from llava_moe.moe.routers.base import Router
from llava_moe.moe.routers.top_k import TopKRouter
from llava_moe.registry import Registry

ROUTERS: Registry[type[Router]] = Registry("router")
ROUTERS.register("top_k", TopKRouter)

__all__ = ["ROUTERS", "Router", "TopKRouter"]
