"""Rows for training, evaluation and analysis: from files, from hub data sets, or made up."""
