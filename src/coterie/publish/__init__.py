"""A result for others: its model card, and its way to the hub."""
