"""Losses of a decomposition: the task's own, and the transfer of the teacher's knowledge."""
