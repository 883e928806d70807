"""Other libraries, driven through the same work as ours; each in its own file, none required."""
