"""Training and prediction: recipe, trainer, runs. Needs the extra `train`."""
