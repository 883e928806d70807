"""The sparse weight: its mask, its zeros, who keeps them; targets, state, statistics, strip."""
