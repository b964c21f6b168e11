"""The workers of a pool: who gets which task, and where they come from."""
