"""Pre-training and fine-tuning: losses, learning-rate schedule, optimizer, the pure training step, and its loop.

`step` and `losses` are pure functions to be jitted; `trainer.train` runs them in a directory with checkpoints, metrics,
validation and guards. `config.TrainConfig` is everything that defines a run.
"""
