"""The command line of `penstock check`, apart from what it looks at: that imports the services."""

import argparse


def add_check_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", settings_help: str) -> None:
    """The command `check`."""
    commands.add_parser(
        "check",
        help="try a configuration before a run: paths, rewards on ten rows, prompts as the model sees them, room",
        description="Try what a run would use, quickest first: model, interpreter and data; the reward functions on "
        "ten rows; all prompts, two of them shown; memory, disk and ports. Takes up to three minutes, most of it for "
        "large data, and leaves nothing behind. Exit code 2: there is a problem.",
        epilog=settings_help,
        usage="penstock check --config FILE [--key value ...]",
        allow_abbrev=False,
    )
