"""Pictures in the TOML of kohya's programs: a dataset file, or a training file that names folders itself."""

from collections.abc import Mapping
from pathlib import PurePath

from ..errors import ZTurboError
from .record import Theirs
from .sets import PictureSet
from .shared import side

FOLDERS = ("image_dir", "image_directory", "train_data_dir", "reg_data_dir")
MUSUBI_SIZE = [960, 544]  # where its file says nothing
# settings that a training file may have for all sets
COMMON = (
    *("resolution", "train_batch_size", "dataset_repeats", "flip_aug", "shuffle_caption", "keep_tokens"),
    *("caption_dropout_rate", "bucket_no_upscale", "enable_bucket", "alpha_mask", "validation_split"),
    *("caption_extension", "caption_prefix", "caption_suffix", "color_aug", "random_crop", "in_json"),
)
OPTIONS = (
    ("batch_size", "batch_size", "whole"),
    ("train_batch_size", "batch_size", "whole"),
    ("flip_aug", "data.flip", "flag"),
    ("shuffle_caption", "data.shuffle_tags", "flag"),
    ("keep_tokens", "data.keep_tags", "whole"),
    ("validation_split", "data.validation", "number"),
)


def is_dataset(values: Mapping) -> bool:
    return isinstance(values.get("datasets"), list)


def of_training(source: Theirs, dataset: dict | None) -> list[PictureSet]:
    """Of a dataset file, else of the folders that the training file itself names."""
    common = {key: source.raw(key) for key in COMMON if source.values.get(key) is not None}
    if dataset is not None:
        source.seen.add("dataset_config")
        return of_dataset(dataset, common)
    found = []
    for key in ("train_data_dir", "reg_data_dir"):
        if folder := source.text(key):
            found.append(_set(Theirs({**common, key: folder}), key, key == "reg_data_dir"))
    return found


def of_dataset(values: Mapping, common: Mapping) -> list[PictureSet]:
    """What a set says counts before its dataset's, that before [general], and that before the training file's."""
    top = Theirs(values)
    general, found = top.section("general").values, []
    for dataset in top.sections("datasets"):
        subsets, mine = dataset.sections("subsets"), {**common, **general, **dataset.values}
        mine.pop("subsets", None)
        for subset in subsets or [dataset]:
            name = subset.where.rstrip(".")
            found.append(_set(Theirs({**mine, **_plain(subset)}, f"{name}."), name))
    if not found:
        raise ZTurboError("The dataset file has no [[datasets]]. Give one that names folders of pictures.")
    return found


def _plain(subset: Theirs) -> dict:
    return {key: value for key, value in subset.values.items() if key != "subsets"}


def _set(one: Theirs, name: str, beside: bool = False) -> PictureSet:
    folder = next(filter(None, (one.text(key) for key in FOLDERS)), "")
    if not folder and PurePath(str(one.values.get("image_jsonl_file"))).name == "metadata.jsonl":
        folder = str(PurePath(one.text("image_jsonl_file") or "").parent)
    given = one.raw("resolution")
    given = MUSUBI_SIZE if given is None and one.values.get("image_directory") else given
    sides = () if given is None else (side(given, f"{one.where}resolution"),)
    repeats = next(filter(None, (one.whole(key) for key in ("num_repeats", "dataset_repeats"))), 1)
    found = PictureSet(name, folder, sides, one, repeats, beside or bool(one.flag("is_reg")))
    for key, ours, kind in OPTIONS:
        value = getattr(one, kind)(key)
        if value is not None:
            found.options.setdefault(ours, (value, one.said(key)))
    dropout = one.number("caption_dropout_rate")
    said = one.said("caption_dropout_rate") or f"{name} caption_dropout_rate (not in the file)"
    found.options["data.caption_dropout"] = (dropout or 0.0, said)
    small = one.flag("bucket_no_upscale")
    found.options["data.upscale"] = (
        not small,
        one.said("bucket_no_upscale") or f"{name} bucket_no_upscale (not there)",
    )
    if one.flag("alpha_mask"):
        found.options["data.masks"] = ("files and alpha", one.said("alpha_mask"))
    return found
