"""The command line of `penstock check`, apart from what it looks at: that imports the services."""

import argparse


def add_check_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", settings_help: str) -> None:
    """The command `check`."""
    parser = commands.add_parser(
        "check",
        help="try a configuration before a run: paths, rewards on ten rows, prompts as the model sees them, room",
        description="Try what a run would use, quickest first: model, interpreter and data; the reward functions on "
        "ten rows; all prompts, two of them shown; memory, disk and ports. Takes up to three minutes, most of it for "
        "large data, and leaves nothing behind. With --generate it also starts the inference engine, and generates and "
        "scores one group of completions. Exit code 2: there is a problem.",
        epilog=settings_help,
        usage="penstock check --config FILE [--generate] [--key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--generate", action="store_true", help="generate and score one group too; the engine ends afterwards"
    )
