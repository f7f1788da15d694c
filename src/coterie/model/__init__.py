"""What a MoE checkpoint is. Three floors: `disk` (files and tensors), `arch` (what they compute), `stream` (run it)."""
