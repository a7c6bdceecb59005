"""Training: one loop for every task, its optimizer, checkpoints and log."""
