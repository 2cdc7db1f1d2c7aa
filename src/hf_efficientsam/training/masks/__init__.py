"""Promptable masks: batches, prompts, losses, metrics and evaluation."""
