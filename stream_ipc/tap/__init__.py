"""Watching a conversation from outside: what ``python3 -m stream_ipc`` does.

Nothing of the library needs it, and it never builds a message: it shows what the bytes say.
"""
