"""Jobs: fine-tune, and what is measured."""
