"""Control plane: what is pruned, when, by which criterion; state, statistics, strip."""
