"""Training after pre-training: supervised fine-tuning on chosen tokens, and reinforcement learning by GRPO.

Both are losses of the ordinary training step; GRPO's batches come from the engine, which samples with the same arrays.
"""
