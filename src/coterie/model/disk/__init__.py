"""Files and tensors of a checkpoint, as they are on disk; nothing here knows what a MoE layer is."""
