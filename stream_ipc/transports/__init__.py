"""How bytes move: streams, this process's stdio, child processes, and the interface for transports of one's own."""
