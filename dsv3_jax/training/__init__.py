"""Pre-training: losses, schedule, optimizer, one pure step, and the loop around it."""
