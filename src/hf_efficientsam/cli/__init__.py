"""The command `efficientsam`."""
