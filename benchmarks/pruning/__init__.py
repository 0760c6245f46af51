"""Memory, identity and resumption of the pruner."""
