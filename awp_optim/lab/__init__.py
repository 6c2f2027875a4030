"""The paper's experiments: data, augmentation, models, schedules, recipes and the trainer."""
