"""What is measured and how: work, time, counts, ceilings, records, tables, pictures."""
