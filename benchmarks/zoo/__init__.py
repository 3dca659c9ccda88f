"""The census of transformers' models. What a config names is never fetched: nothing here needs a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
