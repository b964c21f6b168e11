"""The workers of a pool: who gets which task, and from where they come."""
