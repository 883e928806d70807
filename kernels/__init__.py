"""Data plane: one operation a file; Triton kernel, plain-torch reference, registration."""
