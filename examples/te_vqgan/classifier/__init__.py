"""The classifier that reads digit and colour in generated images."""
