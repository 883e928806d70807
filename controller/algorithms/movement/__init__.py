"""Movement sparsity: learned importances, a rising threshold, whole heads and channels."""
