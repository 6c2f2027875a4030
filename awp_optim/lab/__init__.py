"""The paper's experiments: data, augmentation, models, schedules, recipes and the trainer."""

from __future__ import annotations

from awp_optim.lab.loading import load_model

__all__ = ["load_model"]
