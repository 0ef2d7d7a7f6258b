"""Controls that stand in every table: random, longest, shortest, full."""
