"""Training: one loop, one split of held-out rows, optimisers, schedules, and distillation of a whole result."""
