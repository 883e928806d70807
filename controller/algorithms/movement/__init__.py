"""Movement sparsity: learned importances; a rising threshold, or a level."""
