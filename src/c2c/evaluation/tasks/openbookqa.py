"""OpenBookQA: elementary science, four options (Mihaylov et al. 2018, arXiv:1809.02789)."""

from c2c.evaluation.tasks import Task

TASKS = [Task("openbookqa", "openbookqa/test.jsonl", "allenai/openbookqa")]
