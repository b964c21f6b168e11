"""Frames on a byte stream, and messages in frames. No I/O."""
