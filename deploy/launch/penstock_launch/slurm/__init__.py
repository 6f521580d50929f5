"""`penstock launch slurm`: one heterogeneous job, its submission from outside and its launcher within."""
