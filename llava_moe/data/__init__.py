"""Records in, batches out. Knows token counts, never model code."""
