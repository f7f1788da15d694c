"""What a MoE model is: its layers, experts and routers, derived from its config and its tensors; no family is named."""
