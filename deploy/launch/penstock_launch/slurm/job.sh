#!/bin/bash
# Run @@{run} of Penstock: one heterogeneous Slurm job of three components, in this order: services, rollout, trainer.
#
# A template that `penstock launch slurm` fills in. To change what the configuration cannot say, copy it, edit the copy,
# and name that in slurm.template. Of its placeholders (two at-signs and a name in braces) each must stay: those of the
# components hold their #SBATCH lines, and the last line must remain the last, since it becomes the launcher, which
# Slurm signals before the time limit.

@@{services}
#SBATCH hetjob
@@{rollout}
#SBATCH hetjob
@@{trainer}

set -eo pipefail
# The launcher takes care of it once it is up; before that, it must not end the job.
trap '' USR1

# slurm.setup
@@{setup}

exec @@{launcher}
