"""`penstock launch slurm`: submits a run as one heterogeneous job, and the launcher that runs inside that job."""
