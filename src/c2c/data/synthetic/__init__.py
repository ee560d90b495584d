"""Made-up rows: questions with answers that only a text can tell, without end and without a licence."""
