"""C-Eval: Chinese exams (Huang et al. 2023, arXiv:2305.08322); the test answers were never published."""

from c2c.evaluation.tasks import Task

TASKS = [Task("ceval", "ceval/val.jsonl", "ceval/ceval-exam", "*", split="val")]
