"""Robust accuracy under any set of attacks, with diagnostics for gradient masking."""

from awp_optim.evaluation.results import Evaluation, EvaluationWarning, Finding, Record, wilson
from awp_optim.evaluation.runner import evaluate

__all__ = ["Evaluation", "EvaluationWarning", "Finding", "Record", "evaluate", "wilson"]
