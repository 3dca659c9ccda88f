"""Text generation by rewritten graphs: transformers' own `generate`, with a cache of fixed shape."""
