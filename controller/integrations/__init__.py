"""Controllers inside others' training loops: callbacks over the public API."""
