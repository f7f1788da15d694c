"""What a MoE checkpoint is: its files, its layers, the seam between router and experts, the crossing of names."""
