"""Speed and memory of the layers, the training step and the loader, as ratios inside one run."""
