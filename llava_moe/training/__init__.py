"""Training: stages, the objective that owns every scale, a thin Trainer, metrics."""
