"""Images from a trained model: loaded, sampled, edited, and shown in a grid."""
