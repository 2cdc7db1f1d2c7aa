"""From a checkpoint and an image to masks: loading, predictors, mask generation, prompters, results, drawing."""
