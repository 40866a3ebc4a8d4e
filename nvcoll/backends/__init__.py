"""Memory and reachability: a symmetric heap, and the address of a peer's part of it."""
