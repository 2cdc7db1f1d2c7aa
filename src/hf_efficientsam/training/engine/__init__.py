"""What every training script needs around its loop."""
