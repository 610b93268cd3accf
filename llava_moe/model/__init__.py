"""The model: stock transformers classes with MoE layers, and the programs that put checkpoints together."""
