"""The data sets of training and evaluation, and the workers that read them."""
