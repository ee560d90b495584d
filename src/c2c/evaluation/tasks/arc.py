"""AI2 Reasoning Challenge: grade-school science, an easy and a hard part (Clark et al. 2018, arXiv:1803.05457)."""

from c2c.evaluation.tasks import Task

TASKS = [
    Task("arc_challenge", "arc_challenge/test.jsonl", "allenai/ai2_arc", "ARC-Challenge"),
    Task("arc_easy", "arc_easy/test.jsonl", "allenai/ai2_arc", "ARC-Easy"),
]
