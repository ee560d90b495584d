"""Standard benchmarks.

AI2 Reasoning Challenge: grade-school science, an easy and a hard part (Clark et al. 2018, arXiv:1803.05457).
C-Eval: Chinese exams (Huang et al. 2023, arXiv:2305.08322); the test answers were never published.
MMLU-Redux 2.0: MMLU without the items that its authors found wrong (Gema et al. 2024, arXiv:2406.04127).
OpenBookQA: elementary science, four options (Mihaylov et al. 2018, arXiv:1809.02789).
GSM8K: grade-school arithmetic in words (Cobbe et al. 2021, arXiv:2110.14168).
"""

from c2c.evaluation.tasks import Task

TASKS = [
    Task("arc_challenge", "arc_challenge/test.jsonl", "allenai/ai2_arc", "ARC-Challenge"),
    Task("arc_easy", "arc_easy/test.jsonl", "allenai/ai2_arc", "ARC-Easy"),
    Task("ceval", "ceval/val.jsonl", "ceval/ceval-exam", "*", split="val"),
    Task("mmlu_redux", "mmlu_redux/test_ok.jsonl", "edinburgh-dawg/mmlu-redux-2.0", "*", keep={"error_type": "ok"}),
    Task("openbookqa", "openbookqa/test.jsonl", "allenai/openbookqa"),
    Task("gsm8k", "gsm8k/test.jsonl", "openai/gsm8k", kind="question"),
]
