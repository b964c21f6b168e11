"""Programs that show the library at work; each runs with ``python3 -m examples.NAME``."""
