"""Work on a trained decomposition: add tasks, compare ranks, re-estimate norm statistics, import checkpoints."""
