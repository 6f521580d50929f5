#!/bin/bash
# Run @@{run} of Penstock: one heterogeneous Slurm job of three components, in this order: services, rollout, trainer.
#
# A template that `penstock launch slurm` fills in. To change what no key of the configuration changes, copy this file,
# edit the copy and name it in slurm.template. Keep each placeholder (two at-signs and a name in braces): those of the
# components become their #SBATCH lines. Keep the last line last: it becomes the launcher, which Slurm signals before
# the time limit.

@@{services}
#SBATCH hetjob
@@{rollout}
#SBATCH hetjob
@@{trainer}

set -eo pipefail
# Until the launcher handles this signal, it must not end the job.
trap '' USR1

# slurm.setup
@@{setup}

exec @@{launcher}
