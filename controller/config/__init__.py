"""Declarations: what a user writes, validated at construction; no tensor in sight."""
