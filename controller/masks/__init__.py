"""One weight's mask: form, counts, state, statistics; the zeros in its parameter; targets; strip."""
