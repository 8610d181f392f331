"""Images from a trained model: loading it, sampling, editing, and pictures of many images."""
