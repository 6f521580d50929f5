"""A service as a step of the Slurm job: starts its srun, asks it to end, reads its exit code.

Invariant: a service ends when its srun ends, even if srun is killed. srun holds the standard input of the service's
`penstock_launch.slurm.node` open, and the end of that input is the request to stop. (Slurm's own signals are too blunt:
srun kills the step on SIGTERM, and a signal to a step reaches all of its processes.)
"""

import re
import secrets
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from penstock.runtime.process import tied_command
from penstock_launch.slurm.attempt import Attempt, Whereabouts
from penstock_launch.supervise.life import describe_exit, kill_session, read_tail, size_of

SIGNAL_EXIT_CODE = 128  # plus the signal's number: the exit code of a killed task, as in a shell
SIGNAL_EXIT_CODES = range(129, 160)
# Slurm's own lines about the end of a step, after the last lines of the service itself.
ABOUT_THE_END = re.compile(r"(srun|slurmstepd): (error: .*(: tasks? |STEP )|launch/slurm: |Terminating |Job step )")


class Step:
    """One service; each of its lives is a step of the job."""

    def __init__(
        self,
        name: str,
        launcher: tuple[str, ...],
        service: tuple[str, ...],
        environment: Mapping[str, str],
        *,
        folder: Path,
        log_path: Path,
        hint: str,
    ) -> None:
        """`launcher`: the command line before the service's own words: srun and so on. `folder`: the run's folder."""
        self.name = name
        self.log_path = log_path
        self.hint = hint
        self._launcher = launcher
        self._service = service
        self._environment = environment
        self._folder = folder

    def spawn(self, on_end: Callable[[], None]) -> "StepLife":
        """Start a life. srun is a child of this process, so its end raises SIGCHLD."""
        attempt = Attempt(self._folder, f"{self.name}-{secrets.token_hex(4)}")
        offset = size_of(self.log_path)
        with self.log_path.open("ab") as output:
            process = subprocess.Popen(
                tied_command([*self._launcher, "--attempt", attempt.name, "--", *self._service]),
                env=dict(self._environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return StepLife(process, attempt, self.log_path, offset)


class StepLife:
    """One life of a service: a step."""

    identity = None
    progress = ""

    def __init__(self, srun: "subprocess.Popen[bytes]", attempt: Attempt, log_path: Path, log_offset: int) -> None:
        """`log_offset`: the size of its log in bytes before this life."""
        self._srun = srun
        self._attempt = attempt
        self._log_path = log_path
        self._log_offset = log_offset
        self._exit_code: int | None = None
        self._known: Whereabouts | None = None

    @property
    def pid(self) -> int | None:
        """The process id on its node; None until it is known."""
        return self._whereabouts.pid if self._whereabouts else None

    @property
    def host(self) -> str:
        """The node's own name for itself; empty until it is known."""
        return self._whereabouts.host if self._whereabouts else ""

    def poll(self) -> int | None:
        if self._exit_code is None and self._srun.poll() is not None:
            self._exit_code = self._read_exit_code(self._srun.returncode)
            self._close()
        return self._exit_code

    def ending(self, exit_code: int) -> str:
        return describe_exit(exit_code)

    def send(self, signal_number: int) -> None:
        if signal_number == signal.SIGTERM:
            self._ask_to_end()
        else:
            self._srun.send_signal(signal_number)

    def kill(self) -> None:
        kill_session(self._srun)
        self._close()

    def log_tail(self) -> list[str]:
        lines = read_tail(self._log_path, self._log_offset)
        return [line for line in lines if ABOUT_THE_END.match(line) is None]

    @property
    def _whereabouts(self) -> Whereabouts | None:
        """None until its node has written them."""
        if self._known is None:
            self._known = self._attempt.whereabouts()
        return self._known

    def _read_exit_code(self, code: int) -> int:
        """The exit code of the rank that caused the end, if the service has ranks on several nodes: srun returns only
        the highest code.
        """
        blamed = self._attempt.blamed_exit_code()
        code = code if blamed is None or code == 0 else blamed
        return SIGNAL_EXIT_CODE - code if code in SIGNAL_EXIT_CODES else code

    def _ask_to_end(self) -> None:
        assert self._srun.stdin is not None
        self._srun.stdin.close()

    def _close(self) -> None:
        self._ask_to_end()
        self._attempt.forget()
