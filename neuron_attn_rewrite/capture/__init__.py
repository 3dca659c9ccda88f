"""From a model to one ATen graph."""
