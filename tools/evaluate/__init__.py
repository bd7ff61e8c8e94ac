"""Evaluation by the log-likelihood of options: any Hugging Face VLM directory, any file of questions."""

from compodistill.tools.evaluate.results import TaskResult, Verdict
from compodistill.tools.evaluate.scoring import evaluate, score
from compodistill.tools.evaluate.tasks import Task, TaskQuestion, load_task

__all__ = ["Task", "TaskQuestion", "TaskResult", "Verdict", "evaluate", "load_task", "score"]
