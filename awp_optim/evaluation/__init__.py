"""Robust accuracy under any set of attacks, with diagnostics for gradient masking."""

from awp_optim.evaluation.runner import (
    Evaluation,
    EvaluationWarning,
    Finding,
    Record,
    evaluate,
    wilson,
)

__all__ = ["Evaluation", "EvaluationWarning", "Finding", "Record", "evaluate", "wilson"]
