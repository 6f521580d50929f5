"""The locks of the environments for GPUs: `python -m deploy.locks` writes them."""
