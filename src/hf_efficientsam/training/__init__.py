"""Parts of training: data, prompts, losses, metrics. The scripts in `training/` put them together."""
