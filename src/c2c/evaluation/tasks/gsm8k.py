"""GSM8K: grade-school arithmetic in words (Cobbe et al. 2021, arXiv:2110.14168)."""

from c2c.evaluation.tasks import Task

TASKS = [Task("gsm8k", "gsm8k/test.jsonl", "openai/gsm8k", kind="question")]
