"""Training and prediction: data, recipe, trainer, runs. Needs the extra `train`."""
