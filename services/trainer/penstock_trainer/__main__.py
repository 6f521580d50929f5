"""`python -m penstock_trainer --config F [--key value ...]`: the trainer service. Exit codes: `penstock.errors`."""

from penstock.config import Config
from penstock.model_path import check_model_path
from penstock.service import Service, main
from penstock_trainer.datasets import load_rows


async def start(config: Config) -> None:
    """Run the trainer until its run has ended or it is stopped."""
    service = Service(config.trainer.host, config.trainer.port, "trainer.port")
    check_model_path(config.actor.path, "actor.path")
    train = load_rows(config.data.train)
    held_out = load_rows(config.data.eval, "data.eval") if config.data.eval else []
    # Importing torch takes seconds: what can be told without it has been told before.
    from penstock_trainer.wiring import run_trainer

    await run_trainer(config, service, train, held_out)


if __name__ == "__main__":
    main("trainer", start)
