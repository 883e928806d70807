"""What is pruned: criteria and their evidence, pools, allocation over weights, thresholds."""
