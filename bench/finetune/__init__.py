"""The job ``finetune``: options, models, tasks, files, and the training loop."""
