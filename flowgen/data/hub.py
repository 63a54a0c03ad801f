"""Data sets of images on the Hugging Face Hub, read from their Parquet files."""

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from flowgen.data.cache import cache_folder, cached_array, hash_json, lock
from flowgen.data.dataset import ImageDataset, Size, height_and_width
from flowgen.data.preprocess import log_skipped, preprocess
from flowgen.data.splits import Split, hash_name
from flowgen.utils import as_list
from flowgen.utils.console import log, progress_bar
from flowgen.utils.errors import UserError, check_choice, check_whole, user_error
from flowgen.utils.files import atomic_write
from flowgen.utils.hub import check_name, open_hub

CONVERTED = "refs/convert/parquet"  # branch with the Parquet files that the Hub makes itself
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
LABEL_BYTES = 8  # of a class in the cache, int64
BATCH_ROWS = 256  # read at a time
BUCKETS = 120  # of image hashes, by which missing splits are made
Part = tuple[str, range]  # a split on the Hub, and the hash buckets of it that are used
Load = Callable[[bytes], Tensor]
LABEL_COLUMNS = ("label", "labels")  # used if they are integers and no other is chosen


class HubDataset(ImageDataset):
    """A data set OWNER/SET of the Hugging Face Hub whose files are Parquet, or converted to it.

    The files are downloaded once, to the cache of huggingface_hub, and the preprocessed images are
    stored in flowgen's cache; later runs need no network. Gated sets need a token in HF_TOKEN. A
    missing test split is the validation split. One in twelve training images replaces a missing
    validation split; if both are missing, a tenth of the training images is for each of them. They
    are chosen by hash. This class needs the packages huggingface_hub and pyarrow.

    Args:
        name: OWNER/SET.
        revision: A commit, branch or tag; None selects the newest commit at the first use.
        subset: Name of the subset, needed if there are several.
        image_column: Column of the images; None selects the only one.
        label_column: Column of the classes, integers or booleans; None selects an integer column
            `label` or `labels` if it exists. All boolean columns are attributes.
        train_split: Name of the split of training images.
        validation_split: Name of the split of validation images.
        test_split: Name of the split of test images.
        channels: 1 (grayscale) or 3 (RGB).
        size: Height and width that images are resized to, in pixels, or one number for squares.
        crop: Side of a central square that is cut out first, or None.
        bits: See `ImageDataset`.
        random_flip: See `ImageDataset`.
        options: `random_shift` and `binarization` of `ImageDataset`.

    Example:
        >>> from flowgen.data import HubDataset
        >>> data = HubDataset(name="ylecun/mnist", channels=1, size=28)  # doctest: +SKIP
        >>> data.image_shape, data.num_classes  # doctest: +SKIP
        ((1, 28, 28), 10)
    """

    def __init__(
        self,
        *,
        name: str,
        revision: str | None = None,
        subset: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        channels: int = 3,
        size: Size = 64,
        crop: int | None = None,
        bits: int = 5,
        random_flip: bool = True,
        **options: Any,
    ):
        check_choice((1, 3), channels=channels)
        height_and_width(size)  # raises UserError before the download
        if crop is not None:
            check_whole(crop=crop)
        repository = Repository(name, revision, subset, image_column, label_column)
        log.info("%s: license %s, see %s", name, repository.license, repository.url)
        parts = choose_parts(repository.splits, (train_split, validation_split, test_split))
        load = partial(preprocess, size=size, channels=channels, crop=crop)
        shape = (channels, *height_and_width(size))
        super().__init__(
            *(repository.read_part(split, buckets, shape, crop, load) for split, buckets in parts),
            bits=bits,
            random_flip=random_flip,
            attributes=tuple(repository.attributes),
            **options,
        )


def choose_parts(splits: Collection[str], names: tuple[str, str, str]) -> list[Part]:
    """Return the parts for training, validation and test.

    Args:
        splits: Names of the splits on the Hub.
        names: Names of the splits for training, validation and test; the last two may not exist.
    """
    train, validation, test = names
    if train not in splits:
        raise UserError(
            f"data.train_split={train} does not exist: choose one of {', '.join(sorted(splits))}"
        )
    everything = range(BUCKETS)
    if validation in splits and test in splits:
        return [(train, everything), (validation, everything), (test, everything)]
    existing = test if test in splits else validation
    if existing in splits:
        twelfth = BUCKETS // 12
        return [
            (train, everything[twelfth:]),
            (train, everything[:twelfth]),
            (existing, everything),
        ]
    tenth = BUCKETS // 10
    return [
        (train, everything[2 * tenth :]),
        (train, everything[tenth : 2 * tenth]),
        (train, everything[:tenth]),
    ]


class Repository:
    """One commit of a data set on the Hub.

    Everything but the images is in a file of the cache after the first use.

    Args:
        name: OWNER/SET.
        revision: See `HubDataset`, as for the other arguments.
        subset: Name of the subset.
        image_column: Column of the images.
        label_column: Column of the classes.
    """

    def __init__(
        self,
        name: str,
        revision: str | None,
        subset: str | None,
        image_column: str | None,
        label_column: str | None,
    ):
        self.name = check_name(name, "data set")
        self.file_prefix = f"hub-{name.replace('/', '--')}"
        digest = hash_json([name, revision, subset, image_column, label_column])
        path = cache_folder() / f"{self.file_prefix}-{digest}.json"
        with lock(path.with_suffix(".lock"), name):
            try:
                index = json.loads(path.read_text())
            except (OSError, ValueError):  # missing or damaged
                index = _request_index(name, revision, subset)
            self.commit: str = index["commit"]
            self.url: str = index["url"]
            self.license: str = index["license"]
            self.splits: dict[str, list[str]] = index["splits"]
            if "image" not in index:
                first = next(iter(self.splits.values()))[0]
                with self.open(first) as file:
                    index |= choose_columns(file.schema_arrow, image_column, label_column)
                with atomic_write(path) as temporary:
                    temporary.write_text(json.dumps(index))
        self.image: str = index["image"]
        self.label: str | None = index["label"]
        self.attributes: list[str] = index["attributes"]

    def open(self, path: str) -> Any:
        """Return a `pyarrow.parquet.ParquetFile`, after a download if it is not in the cache."""
        with user_error("data=hub needs the package pyarrow: pip install pyarrow"):
            from pyarrow import parquet
        missing = f"{path} of {self.name} is no longer on the Hub: choose another data.revision"
        with open_hub(self.name, missing) as hub:
            file = hub.hf_hub_download(
                self.name,
                path,
                repo_type="dataset",
                revision=self.commit,
                library_name="flowgen",
            )
        with user_error(f"{file} is damaged: delete it, and it will be downloaded again"):
            return parquet.ParquetFile(file)

    def read_part(
        self,
        split: str,
        buckets: range,
        shape: tuple[int, int, int],
        crop: int | None,
        load: Load,
    ) -> Split:
        """Return the images of a part of a split, memory-mapped, with labels and attributes.

        The cache has one record per image: its pixels, its label if there is one, and its
        attributes.

        Args:
            split: Name of the split.
            buckets: Hash buckets of the images in this part.
            shape: Channels, height and width of the images.
            crop: See `preprocess`.
            load: Function that decodes an image file.
        """
        fingerprints = [
            *(self.name, self.commit, self.splits[split], [buckets.start, buckets.stop]),
            *(self.image, self.label, self.attributes, shape, crop),
        ]
        num_pixels = math.prod(shape)
        labels_end = num_pixels + (LABEL_BYTES if self.label else 0)
        table = cached_array(
            f"{self.file_prefix}-{split}",
            fingerprints,
            lambda: self._records(split, buckets, load),
        ).view(-1, labels_end + len(self.attributes))
        stored = table[:, num_pixels:labels_end]
        labels = torch.empty(stored.shape, dtype=torch.uint8).copy_(stored)  # aligned to 8 bytes
        labels = labels.view(torch.int64).flatten()
        if len(labels) and labels.min() < 0:
            raise UserError(
                f"data.label_column={self.label} has negative classes in the split {split}, which "
                "may hide its labels: choose another column, or another split as in "
                "data.test_split=validation"
            )
        return Split(
            table[:, :num_pixels].unflatten(1, shape),
            labels if self.label else None,
            table[:, labels_end:].bool() if self.attributes else None,
        )

    def _records(self, split: str, buckets: range, load: Load) -> Iterator[Tensor]:
        """Yield the records of some images at a time, uint8 (n, bytes of a record)."""
        skipped: list[str] = []
        count = 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for path, first_row, batch in self._batches(split):
                title = PurePosixPath(path).name
                rows = [
                    row
                    for row in range(len(batch))
                    if hash_name(f"{title} {first_row + row}") % BUCKETS in buckets
                ]
                if not rows:
                    continue
                files = batch.column(self.image).take(rows).to_pylist()
                images = list(pool.map(partial(_decode, load), files))
                skipped += [
                    f"row {first_row + row} of {path} {image}"
                    for row, image in zip(rows, images, strict=True)
                    if isinstance(image, UserError)
                ]
                count += len(rows)
                usable = [
                    row
                    for row, image in zip(rows, images, strict=True)
                    if isinstance(image, Tensor)
                ]
                if usable:
                    pixels = [image.flatten() for image in images if isinstance(image, Tensor)]
                    yield torch.cat([torch.stack(pixels), *self._labels(batch.take(usable))], 1)
        log_skipped(skipped, count)

    def _batches(self, split: str) -> Iterator[tuple[str, int, Any]]:
        """Yield the path, the index of the first row and the columns of some rows at a time."""
        labels = [self.label] if self.label else []
        columns = list(dict.fromkeys([self.image, *labels, *self.attributes]))
        for path in self.splits[split]:
            with self.open(path) as file:
                batches = file.iter_batches(BATCH_ROWS, columns=columns)
                total = -(-file.metadata.num_rows // BATCH_ROWS)
                row = 0
                for batch in progress_bar(batches, f"preparing {path}", total):
                    yield path, row, batch
                    row += len(batch)

    def _labels(self, batch: Any) -> list[Tensor]:
        """Return the bytes of the labels and of the attributes of some rows, uint8 (n, bytes)."""
        parts = []
        if self.label:
            with user_error(f"data.label_column={self.label} has missing values: choose another"):
                labels = torch.tensor(
                    [int(label) for label in batch.column(self.label).to_pylist()]
                )
            parts.append(labels.view(torch.uint8).view(-1, LABEL_BYTES))
        for name in self.attributes:
            values = [bool(value) for value in batch.column(name).to_pylist()]
            parts.append(torch.tensor(values, dtype=torch.uint8)[:, None])
        return parts


def _decode(load: Load, value: Any) -> Tensor | UserError:
    """Return an image, or the error if it cannot be decoded."""
    file = value["bytes"] if isinstance(value, dict) else value
    try:
        return load(file or b"")
    except UserError as error:
        return error


def _request_index(name: str, revision: str | None, subset: str | None) -> dict[str, Any]:
    """Ask the Hub for the commit, the license and the Parquet files by split."""
    with open_hub(name, f"{name} has no file of this name: choose another data.name") as hub:
        api = hub.HfApi(library_name="flowgen")
        info = api.dataset_info(name, revision=revision)
        card = info.card_data.to_dict() if info.card_data else {}
        url = f"{api.endpoint}/datasets/{name}"
        paths = _parquet_paths(info)
        if not paths and revision is None:
            try:
                info = api.dataset_info(name, revision=CONVERTED)
            except hub.errors.RevisionNotFoundError:
                log.debug("%s has no branch %s", name, CONVERTED)
            paths = _parquet_paths(info)
    if not paths:
        raise UserError(
            f"{name} has no Parquet files on the Hub: download its images and use data=folder"
        )
    license_names = card.get("license") or "unknown"
    return {
        "commit": info.sha,
        "url": url,
        "license": license_names if isinstance(license_names, str) else ", ".join(license_names),
        "splits": group_by_split(paths, card.get("configs") or [], subset),
    }


def _parquet_paths(info: Any) -> list[str]:
    paths = [file.rfilename for file in info.siblings or []]
    return sorted(path for path in paths if path.endswith(".parquet"))


def group_by_split(
    paths: Sequence[str], subsets: Sequence[dict[str, Any]], subset: str | None
) -> dict[str, list[str]]:
    """Return the paths of each split.

    Args:
        paths: Paths of Parquet files in the repository.
        subsets: The field `configs` of the card of the data set: `config_name`, and `data_files`
            with a `split` and a `path` each, or the paths of the training images. Without it, the
            words in the paths tell the split.
        subset: Name of the subset, or None if there is one only.
    """
    files_of = {
        str(item["config_name"]): item["data_files"]
        for item in subsets
        if isinstance(item.get("data_files"), list) and "config_name" in item
    }
    splits: dict[str, list[str]] = {}
    if files_of:
        for entry in files_of[_choose_subset(list(files_of), subset)]:
            if isinstance(entry, str):
                entry = {"split": "train", "path": entry}
            patterns = as_list(entry["path"])
            matches = [path for path in paths if any(fnmatch(path, item) for item in patterns)]
            splits.setdefault(str(entry["split"]), []).extend(matches)
    else:
        folders = {path: path.split("/")[0] for path in paths if "/" in path}
        folders = {
            path: name
            for path, name in folders.items()
            if name != "data" and _split_word(name) is None
        }
        if folders:
            chosen = _choose_subset(sorted(set(folders.values())), subset)
            paths = [path for path in paths if folders.get(path, chosen) == chosen]
        for path in paths:
            splits.setdefault(_split_word(path) or "train", []).append(path)
    splits = {split: matches for split, matches in splits.items() if matches}
    if not splits:
        raise UserError("this subset has no Parquet files on the Hub: choose another data.subset")
    return splits


def _choose_subset(names: list[str], subset: str | None) -> str:
    if subset is None and len(names) == 1:
        return names[0]
    if subset in names:
        return str(subset)
    if subset is None and "default" in names:
        return "default"
    raise UserError(f"data.subset={subset or 'null'}: choose one of {', '.join(names)}")


def _split_word(path: str) -> str | None:
    """Return the split that the last word of a path names, such as test for data/test-0.parquet."""
    words = [word for word in re.split(r"[/._\d-]+", path.lower()) if word]
    splits = [split for word in words for split, names in SPLIT_WORDS.items() if word in names]
    return splits[-1] if splits else None


def choose_columns(
    schema: Any, image_column: str | None, label_column: str | None
) -> dict[str, Any]:
    """Return the columns of the image, the label (or None) and the attributes.

    Args:
        schema: A `pyarrow.Schema`. An image is a struct with the field `bytes`, or bytes.
        image_column: The column of the images, or None for the only struct.
        label_column: The column of the labels, or None for an integer column `LABEL_COLUMNS`.
    """
    import pyarrow as pa

    types = dict(zip(schema.names, schema.types, strict=True))
    images = [
        name
        for name, kind in types.items()
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    ]
    if image_column is None and len(images) != 1:
        raise UserError(
            f"{len(images)} columns have images: set data.image_column to one of "
            f"{', '.join(images or types)}"
        )
    labels = [
        name
        for name, kind in types.items()
        if pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    ]
    image = image_column or images[0]
    if image not in types or not (image in images or pa.types.is_binary(types[image])):
        raise UserError(
            f"data.image_column={image} is not a column of images: choose one of "
            f"{', '.join(images)}"
        )
    if label_column is not None and label_column not in labels:
        raise UserError(
            f"data.label_column={label_column} is not a column of integers or booleans: "
            f"choose one of {', '.join(labels)}"
        )
    found = [name for name in LABEL_COLUMNS if name in labels]
    return {
        "image": image,
        "label": label_column or (found[0] if found else None),
        "attributes": [name for name in labels if pa.types.is_boolean(types[name])],
    }
