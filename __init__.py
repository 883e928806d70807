"""Fine-tune PyTorch models under sparse masks, with Triton kernels that make the sparsity pay."""
