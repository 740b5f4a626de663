"""Directories with published weights: where they are, what they are, their fingerprint, and their leaves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from mmjax import hub, tree
from mmjax.checkpoints import awq, weights
from mmjax.checkpoints.safetensors import Stored
from mmjax.data.images import ImageProcessor
from mmjax.errors import UserError
from mmjax.families import find, keys, reading
from mmjax.families.family import Config, Family
from mmjax.families.keys import Rule
from mmjax.models import multimodal, quantised
from mmjax.models.config import ModelConfig
from mmjax.models.encoder_config import ViTConfig
from mmjax.models.quantised import Quantisation
from mmjax.preprocessing import has_tokenizer, read_image_processor, read_tokenizer
from mmjax.tree import Params

SAMPLES = 64  # places of each weight file that go into a fingerprint
SAMPLE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Published:
    """A directory of a known family: its config.json (completed), its family and its shapes."""

    directory: Path
    foreign: Config
    family: Family
    config: ModelConfig

    @property
    def places(self) -> list[Path]:
        """The directory, and the sub-folders in which it has its parts."""
        return [self.directory, *_folders(self.directory, self.family, self.foreign).values()]


def locate(name: str, near: Path | None = None) -> Path:
    """The directory of a path (also relative to `near`), or of a repository, OWNER/NAME or OWNER/NAME@REVISION, in the local
    Hugging Face cache.

    Nothing is downloaded. Raises UserError saying what to download.
    """
    for candidate in (Path(name).expanduser(), *([near / name] if near else [])):
        if candidate.is_dir():
            return candidate.resolve()
    cached = hub.snapshot(name)
    if cached is not None:
        return cached
    raise UserError(f"{name}: no such directory")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def open_published(directory: Path) -> Published:
    """What the directory's config.json says; no weights are read, at most their names."""
    where = str(directory / "config.json")
    written = read_json(directory / "config.json")
    foreign = awq.without_method(written, where)
    family = find(foreign, where)
    if family.complete is not None and weights.files(directory):
        foreign = family.complete(foreign, _tensors(directory, family, foreign))
    foreign = {**foreign, **_token_ids(directory, family, foreign)}
    for part, name in family.external(foreign).items():
        # The config of a part that is published elsewhere stands only there.
        key = "text_config" if part == "llm" else f"{part}_config"
        if not foreign.get(key):
            other = open_published(locate(name, directory)).foreign
            foreign = {**foreign, key: other.get(key, other)}
    read = Published(directory, foreign, family, family.read_config(foreign, where))
    config = _as_prepared(read.places, read.config)
    found = [file for place in (directory, *read.places) if place.is_dir() for file in weights.files(place)]
    packed = bool(found) and ("quantization_config" in written or any(f.suffix == ".pt" for f in found))
    return dataclasses.replace(read, config=dataclasses.replace(config, quantisation=_packed(read) if packed else None))


def quantised_as(source: Published, spec: Quantisation | None) -> Published:
    """The directory, to be read so quantised. Raises UserError where its weights are quantised already."""
    if spec is None:
        return source
    if (held := source.config.quantisation) is not None and held != spec:
        raise UserError(f"{source.directory} holds its weights in {held.format} already: they cannot be quantised again")
    return dataclasses.replace(source, config=dataclasses.replace(source.config, quantisation=spec))


def _packed(source: Published) -> Quantisation | None:
    """How the directory's own files hold kernels in few bits; None where they do not."""
    stored = _stored(source)
    if not any(isinstance(tensor, awq.Packed) for tensor in stored.values()):
        return None
    shapes, targets, groups = dense_shapes(source.config), [], set()
    for r in source.family.rules(source.config, source.foreign):
        held = [stored.get(name) for name in keys.names(r, shapes)]
        packed = [tensor for tensor in held if isinstance(tensor, awq.Packed)]
        kernels = [path for path in r.paths if quantised.may_be_quantised(path)]
        if packed and len(packed) < len(held):
            raise UserError(f"{source.directory}: {r.name} is packed in {len(packed)} of {len(held)} layers, which is not supported")
        if packed and kernels:
            targets += [path.removesuffix("/kernel") for path in kernels]
            groups |= {tensor.group for tensor in packed}
    if len(groups) > 1:
        raise UserError(f"{source.directory}: its weights are in groups of {sorted(groups)}; one size for all is supported")
    return Quantisation("int4", tuple(targets), block=groups.pop()) if groups else None


def dense_shapes(config: ModelConfig) -> Params:
    """The shapes of the parameters as files hold them: nothing quantised."""
    return multimodal.shapes(dataclasses.replace(config, quantisation=None))


def own_image_processor(places: list[Path], config: ModelConfig) -> ImageProcessor | None:
    """The image processor of the first place that has the file of one."""
    return next((found for place in places if (found := read_image_processor(place, config)) is not None), None)


def _token_ids(directory: Path, family: Family, foreign: Config) -> Config:
    """The ids that config.json leaves to the tokenizer."""
    absent = [(field, token) for field, token in family.tokens if foreign.get(field) is None]
    if not absent or not has_tokenizer(directory):
        return {}
    known = read_tokenizer(directory).get_vocab()
    return {field: known[token] for field, token in absent if token in known}


def _as_prepared(places: list[Path], config: ModelConfig) -> ModelConfig:
    """A multimodal model at the size that its image processor gives pictures: its encoder may have been made for another."""
    if config.connector is None or not isinstance(config.vision, ViTConfig):
        return config
    processor = own_image_processor(places, config)
    return config.at_size(processor.height) if processor and processor.height == processor.width else config


def load_leaves(source: Published, *, dtype: Any, shardings: Params | None = None, check_finite: bool = True) -> Params:
    """All leaves of a published model; a part that the directory lacks is read where its config says that it is
    published.
    """
    rules = source.family.rules(source.config, source.foreign)
    stored, shapes = _stored(source), dense_shapes(source.config)
    elsewhere: Params = {}
    for part, name in source.family.external(source.foreign).items():
        own = [r for r in rules if r.paths[0].startswith(f"{part}/")]
        absent = [r for r in own if not any(name in stored for name in keys.names(r, shapes))]
        if absent and (absent == own or part in source.family.partial):
            other = quantised_as(open_published(locate(name, source.directory)), source.config.quantisation)
            found = load_part(other, part, dtype=dtype, shardings=shardings, check_finite=check_finite, heads=True)
            elsewhere = tree.merge(elsewhere, _picked(found, absent, shapes, other.directory))
            rules = [r for r in rules if r not in absent]
    return tree.merge(_load(source, stored, rules, dtype, shardings, check_finite), elsewhere)


def _picked(found: Params, rules: list[Rule], shapes: Params, where: Path) -> Params:
    """The leaves of these rules among those that were found elsewhere. Raises UserError where they are not what they must be."""
    flat, wanted = tree.flatten(quantised.dense_shapes(found)), tree.flatten(shapes)
    paths = [path for r in rules for path in r.paths]
    wrong = [path for path in paths if path not in flat or flat[path].shape != wanted[path].shape]
    if wrong:
        listed = ", ".join(f"{path} {list(wanted[path].shape)}" for path in wrong)
        raise UserError(f"{where} is to give what the directory lacks, and has not {listed}")
    chosen = set(paths)
    return tree.unflatten({path: leaf for path, leaf in tree.flatten(found).items() if quantised.kernel_of(path) in chosen})


def load_part(
    source: Published,
    part: str,
    *,
    dtype: Any,
    shardings: Params | None = None,
    check_finite: bool = True,
    heads: bool = False,
) -> Params:
    """One part ("llm", "vision") of a published model, whatever else the directory holds.

    Without `heads` an encoder's projection and classification heads stay behind: few connectors read them.
    """
    rules = source.family.rules(source.config, source.foreign)
    shapes, stored = dense_shapes(source.config), _stored(source)
    reading.check(stored, rules, shapes, **_expected(source))
    behind = () if heads else ("vision/projection/", "vision/head/")
    rules = [r for r in rules if r.paths[0].startswith(f"{part}/") and not r.paths[0].startswith(behind)]
    wanted = {name for r in rules for name in keys.names(r, shapes)}
    stored = {name: tensor for name, tensor in stored.items() if name in wanted}
    return _load(source, stored, rules, dtype, shardings, check_finite)


def _tensors(directory: Path, family: Family, foreign: Config) -> dict[str, Stored]:
    places = _folders(directory, family, foreign) or {"": directory}
    stored = {prefix + name: tensor for prefix, place in places.items() for name, tensor in weights.read(place).items()}
    return keys.renamed(awq.unpacked(stored), family.spellings)


def _folders(directory: Path, family: Family, foreign: Config) -> dict[str, Path]:
    """Prefix of tensors -> sub-folder; empty where the weights stand in the directory itself."""
    if weights.files(directory):
        return {}
    return {folder.prefix: directory / folder.name for folder in family.folders(foreign).values()}


def _stored(source: Published) -> dict[str, Stored]:
    """The tensors under the names of the key table. Of tied weights a file may hold only the copy."""
    stored = _tensors(source.directory, source.family, source.foreign)
    for copy, original in _copies(source).items():
        if original not in stored and copy in stored:
            stored[original] = stored[copy]
    return stored


def _expected(source: Published) -> dict[str, Any]:
    return {"copies": _copies(source), "unused": source.family.unused, "where": source.directory}


def _copies(source: Published) -> dict[str, str]:
    return source.family.copies(source.config) | source.family.copies_in(source.config, source.foreign)


def _load(
    source: Published,
    stored: dict[str, Stored],
    rules: list[Rule],
    dtype: Any,
    shardings: Params | None,
    check_finite: bool,
) -> Params:
    return reading.load(
        stored,
        rules,
        dense_shapes(source.config),
        dtype=dtype,
        quantisation=source.config.quantisation,
        shardings=shardings,
        check_finite=check_finite,
        **_expected(source),
    )


def fingerprint(directory: Path) -> str:
    """A hash that changes with any weight file's name, size, header or sampled bytes, with config.json, and with a run's
    checkpoints.

    Reads a few hundred KB of each file, not all of it.
    """
    digest = hashlib.sha256()
    named = [directory / name for name in ("config.json", "adapter_config.json", "recipe.json")]
    files = sorted(p for p in directory.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    for path in [*named, *files, *sorted(directory.glob("checkpoints/*/*/manifest.json"))]:
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)}\0{size}\0".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))  # headers, and small files as a whole
            for k in range(SAMPLES if size > 1 << 20 else 0):
                file.seek((size - SAMPLE_BYTES) * k // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def bases(source: Published) -> dict[str, str]:
    """Reference -> fingerprint of a directory, and of those that hold parts of it."""
    others = [
        locate(name, source.directory)
        for name in source.family.external(source.foreign).values()
        if _at_hand(name, source)
    ]
    return {str(directory): fingerprint(directory) for directory in (*source.places, *others)}


def _at_hand(name: str, source: Published) -> bool:
    try:
        locate(name, source.directory)
    except UserError:
        return False
    return True
