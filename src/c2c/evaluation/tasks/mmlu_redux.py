"""MMLU-Redux 2.0: MMLU without the items that its authors found wrong (Gema et al. 2024, arXiv:2406.04127)."""

from c2c.evaluation.tasks import Task

TASKS = [
    Task("mmlu_redux", "mmlu_redux/test_ok.jsonl", "edinburgh-dawg/mmlu-redux-2.0", "*", keep={"error_type": "ok"})
]
