"""A model of any size run with one of its units in memory at a time."""
