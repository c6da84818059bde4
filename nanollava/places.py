"""Which folders belong together: an official LLaVA comes without its image tower, a LoRA or a projector without the
language model that it was trained over."""

from pathlib import Path

from nanollava import folder as files
from nanollava.error import Error


def language_folder(folder: Path, base: str | Path | None = None) -> Path:
    """Where the language model's weights are: in the folder itself, or, where it holds no more than was trained, in its
    base. Raises Error where that is not found, and for a base given to a folder that holds a whole model."""
    adapter = folder / "adapter_config.json"
    whole = any(folder.glob("pytorch_model*")) or any(folder.glob("model*.safetensors*"))
    if whole:
        check_no_adapters(folder)
    elif not adapter.is_file() and any(folder.glob("adapter_model.*")):
        raise Error(f"{adapter}: no such file beside the adapters; is the download complete?")
    if whole or not (adapter.is_file() or (folder / "mm_projector.bin").is_file()):
        if base is not None:
            raise Error(f"{folder}: holds a whole model; leave out {base} (base=, --base)")
        return folder
    if adapter.is_file():
        name = files.read_json(adapter).get("base_model_name_or_path")
    else:
        name = files.read_json(folder / "config.json").get("_name_or_path")
    beside, name = _beside(folder, name), name or "lmsys/vicuna-7b-v1.5"
    place = files.last_good(base or beside or folder)
    if not place.is_dir() or place.resolve() == folder.resolve():
        raise Error(
            f'{folder}: was trained over a base, "{name}", not in {place}; give its folder (base=, --base)'
            f"{_fetch(name, beside)}"
        )
    return place


def check_no_adapters(folder: Path) -> None:
    """Raises Error where whole weights have adapters beside them: whether these are merged already, nothing tells."""
    if found := [*folder.glob("adapter_model.*"), *folder.glob("adapter_config.json")]:
        raise Error(f"{found[0]}: adapters beside whole weights; move one of the two into a folder of its own")


def find_vision(folder: Path, config: dict, vision: str | Path | None, what: str) -> Path:
    """The folder of the image tower, where the weights do not hold one: the one given, or the first of two places."""
    tower = config.get("mm_vision_tower")
    beside, tower = _beside(folder, tower), tower or "openai/clip-vit-large-patch14-336"
    places = [Path(vision)] if vision is not None else [folder / "vision_tower", *filter(None, [beside])]
    for place in map(files.last_good, places):
        if place.is_dir():
            return place
    raise Error(
        f'{folder}: {what} (mm_vision_tower "{tower}") is neither in the folder itself nor in '
        f"{' nor in '.join(map(str, places))}; give its folder (vision=, --vision)"
        f"{_fetch(tower, beside, 'config.json pytorch_model.bin ')}"
    )


def _beside(folder: Path, name: object) -> Path | None:
    """The folder next to this one that is called like the last part of a repository's name, wherever that was."""
    last = Path(name).name if isinstance(name, str) and name.isprintable() else ""
    return folder.resolve().parent / last if last not in ("", "..") else None


def _fetch(name: object, target: Path | None, files: str = "") -> str:
    """The download command, where the name looks like owner/repository and not like a path."""
    repository = isinstance(name, str) and name.count("/") == 1 and name[0] not in "./~"
    return f" or fetch it: hf download {name} {files}--local-dir {target}" if repository and target else ""
