"""The locks of the environments for GPUs: `python -m deploy.locks` writes constraints/*-cuda.txt."""
