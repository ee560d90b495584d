"""Rows for training, evaluation and analysis: files, data sets and synthetic questions as prompts with responses."""
