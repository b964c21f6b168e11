"""The machinery behind ``IpcPeer`` and ``Session``: the loop, conversations, replies."""
