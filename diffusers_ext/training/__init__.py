"""What the training scripts share: streams of random numbers, objectives, checkpoints, the loop, export."""
