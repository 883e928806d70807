"""What maintainers run: comparisons with peers, the figures of a device, the pages' tables."""
