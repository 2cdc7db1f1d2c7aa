"""What every training script needs around its loop: configuration, loaders, optimisation, checkpoints, log."""
