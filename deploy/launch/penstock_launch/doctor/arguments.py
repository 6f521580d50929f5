"""The command line of `penstock doctor`, apart from what it looks at: that imports the services."""

import argparse


def add_doctor_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", settings_help: str) -> None:
    """The command `doctor`."""
    commands.add_parser(
        "doctor",
        help="look at this host: GPUs, environments, room, limits, ports, queue; and show what to do",
        description="Look at this host as the one of a launch, and print a table of what was seen, with what to do. "
        "Takes up to 20 seconds and changes nothing. Without --config: the defaults. Exit code 2: there is a problem.",
        epilog=settings_help,
        usage="penstock doctor [--config FILE] [--key value ...]",
        allow_abbrev=False,
    )
