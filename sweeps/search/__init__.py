"""Optuna over the ablation axes: `space` has the axes, `study` asks and tells, `report` says what was found."""
