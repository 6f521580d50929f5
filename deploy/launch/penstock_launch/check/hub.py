"""A model by its name on Hugging Face's hub: in the cache of this host, or on the hub itself, asked once.

The libraries ask again and again for a minute and a half; a mistyped path is a possible name, and is answered here.
"""

from penstock_launch.doctor.report import Line, not_looked_at, ok, problem

HUB_SECONDS = 5.0
NOT_FOUND = (401, 403, 404)  # the hub does not tell what is not there from what one may not see


def cached_config(name: str) -> str | None:
    """The file config.json of the model `name` in the cache of this host. Needs the extra `trainer`."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return found if isinstance(found, str) else None


def hub_line(name: str, key: str, what: str) -> Line:
    """Whether the model `name`, which `key` has, can be fetched. Needs the extra `trainer`."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    neither = f"{key} is {name!r}: neither a folder, nor in the cache of the hub"
    if cached_config(name):
        return ok(what, f"{key} {name} is a name on Hugging Face's hub, and in the cache of this host")
    if constants.HF_HUB_OFFLINE:
        seen = f"{neither}, which HF_HUB_OFFLINE forbids to ask"
        return problem(what, seen, f"Set {key} to a Hugging Face model folder, or unset HF_HUB_OFFLINE.")
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status not in NOT_FOUND:
            return not_looked_at(what, f"{neither}, which answers {status}: it is asked again at the start")
        seen = f"{neither}, nor a model that the hub ({constants.ENDPOINT}) shows to you: it answers {status}"
        advice = f"Set {key} to a folder or a model's name; for one that is private or gated, set HF_TOKEN."
        return problem(what, seen, advice)
    except Exception as error:  # of the connection, in the words of whatever library the hub's uses
        seen = f"{neither}, which ({constants.ENDPOINT}) cannot be asked: {error or type(error).__name__}"
        return problem(what, seen, f"Set {key} to a Hugging Face model folder, or check the network (HTTPS_PROXY).")
    return not_looked_at(what, f"{key} {name} is a name on Hugging Face's hub, fetched at the start")
