"""Folders of Hugging Face models: config.json, generation_config.json, safetensors and tokenizer
files, read and written without torch or transformers.

    model = read("DIR")                     a config of ours, its parameters
    write("OUT", config, vocab_size, params, tokenizer)

What a family has where is said in ``families``; everything is checked before a byte is written,
and a folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpt.data.encoding import Tokenizer
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError, DataError
from jaxpt.files import write_json
from jaxpt.interop import tokenizer as tokenizers
from jaxpt.interop.factors import FILE as FACTORS
from jaxpt.interop.factors import read_factors, write_factors
from jaxpt.interop.families import FAMILIES
from jaxpt.interop.family import Family, expressed
from jaxpt.interop.fields import Fields
from jaxpt.interop.held import Held, dense_model, gathered, unrolled_shapes
from jaxpt.interop.shards import SHARD_BYTES, Shards, read_object, write_shards
from jaxpt.interop.table import Entry
from jaxpt.models.model import Model
from jaxpt.models.transformer import Transformer
from jaxpt.state import Params

CONFIG, GENERATION = "config.json", "generation_config.json"
DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer")
FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A model of Hugging Face as one of ours. Making it has read no array.

    config: its dtype is bfloat16 where all arrays of the files are, else float32; its matrices are
      dense, unless the folder has the factors that we wrote.
    raw: config.json.
    """

    folder: Path
    family: Family
    config: Transformer
    vocab_size: int
    raw: Mapping[str, Any]
    shards: Shards
    factors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def model(self) -> Model:
        """The config, built."""
        return Model(self.config, self.vocab_size)

    def params(self, config: Transformer | None = None) -> Params:
        """The parameters, nested, on the host.

        Args:
          config: the model's, where something is to differ that changes no function: layers
            stacked or not, the parameters' type, how far the vocabulary is padded.
        """
        model = Model(config or self.config, self.vocab_size)
        dense = dense_model(config or self.config, self.vocab_size)
        return gathered(model, {**_load(self.family, dense, self.shards), **self.factors})


def read(folder: str | os.PathLike) -> Pretrained:
    """What a folder of Hugging Face holds, all checked: the config, and every tensor's name, shape
    and type.

    Raises:
      ConfigError: a variant that is not supported; names the field of config.json.
      DataError: files that are missing, unsound, or do not fit the config.
    """
    folder = Path(folder)
    raw = read_object(folder / CONFIG)
    family = family_of(raw)
    shards = Shards(folder, family.prefix, family.renamed)
    fields = Fields(raw)
    vocab_size = fields.integer("vocab_size")
    for name in DEPTHS:  # tables are made of them before the files are asked for each tensor
        depth = raw.get(name)
        if isinstance(depth, int | float) and depth > len(shards):
            raise DataError(f"{folder}: {name} is {depth}, and it has {len(shards)} tensors")
    config = family.config(fields, frozenset(shards))
    fields.finish(family.harmless)
    dtypes = {shards.dtype(name) for name in shards}
    only_bfloat16 = dtypes == {jnp.dtype("bfloat16")}
    config = dataclasses.replace(config, dtype="bfloat16" if only_bfloat16 else "float32")
    model = Model(config, vocab_size)
    _load(family, model, shards)  # views alone: nothing is read
    factors: Mapping[str, np.ndarray] = {}
    if (folder / FACTORS).is_file():
        config, factors = read_factors(folder, config, vocab_size)
    return Pretrained(folder, family, config, vocab_size, raw, shards, factors)


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises ConfigError for one that is not here."""
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError("model_type", f"{name!r} is not supported; known: {', '.join(FAMILIES)}")
    family, classes = FAMILIES[name], raw.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(each, str) for each in classes):
        raise ConfigError("architectures", f"{classes!r} is no list of names")
    if classes and not {family.architecture, *family.also} & {*classes}:
        raise ConfigError(
            "architectures", f"{classes} is not supported; {name} is read as {family.architecture}"
        )
    return family


def _load(family: Family, model: Model, shards: Shards) -> dict[str, np.ndarray]:
    """Views of the files by our paths of unrolled layers. Raises DataError where tensors are
    missing, left over, or of other shapes or types."""
    table, shapes = list(family.table(_config(model))), unrolled_shapes(model)
    _check_table(family, table, shapes)
    for name in (name for entry in table for name in entry.theirs):
        if name not in shards:
            raise DataError(f"{shards.folder}: no tensor {name}")
        if shards.dtype(name).name not in FLOATS:
            raise DataError(f"{shards.folder}: {name} is of type {shards.dtype(name)}")
    _check_rest(family, model, table, shards)
    found = {}
    for entry in table:
        wanted = [shapes[path] for path in entry.ours]
        try:
            arrays = entry.load([shards[name] for name in entry.theirs], wanted)
        except (ValueError, IndexError) as error:  # of other axes altogether
            names = " and ".join(f"{name} {shards.shape(name)}" for name in entry.theirs)
            raise DataError(f"{shards.folder}: {names} does not fit ({error})") from None
        for path, array, shape in zip(entry.ours, arrays, wanted, strict=True):
            if array.shape != shape:
                names = " and ".join(f"{name} {shards.shape(name)}" for name in entry.theirs)
                raise DataError(
                    f"{shards.folder}: {names} gives {array.shape} for {path}, which the config "
                    f"says is {shape}"
                )
            found[path] = array
    return found


def _check_rest(family: Family, model: Model, table: list[Entry], shards: Shards) -> None:
    """What the files hold beside the table must be known."""
    known = {name for entry in table for name in entry.theirs}
    aliases = family.aliases(_config(model))
    for name in sorted(set(shards) - known):
        if name in aliases:
            if not np.array_equal(shards[name], shards[aliases[name]]):
                raise DataError(
                    f"{shards.folder}: {name} differs from {aliases[name]}, to which it is tied"
                )
        elif not any(re.fullmatch(pattern, name) for pattern in family.left_out):
            raise DataError(
                f"{shards.folder}: {name} has no place in a model of type {family.model_type}"
            )


def _check_table(family: Family, table: list[Entry], shapes: Mapping[str, Any]) -> None:
    """A family's own mistakes: every tensor of ours must be in its table once."""
    ours = [path for entry in table for path in entry.ours]
    if sorted(ours) != sorted(shapes):
        odd = sorted(set(ours) ^ set(shapes)) or [p for p in ours if ours.count(p) > 1]
        raise ConfigError("model", f"{family.model_type}'s table is wrong at {', '.join(odd[:4])}")


def write(
    out: str | os.PathLike,
    model: Model,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    family: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    keep_factors: bool = False,
) -> Family:
    """Writes a folder that transformers loads; it appears when it is complete.

    Args:
      out: a folder that is not there yet.
      model: a Transformer's.
      params: its parameters; matrices that are held otherwise are written dense.
      tokenizer: the run's, a ``Tokenizer``; None: no tokenizer files, and no special ids.
      family: a ``model_type``; None: the first that has such a model.
      dtype: float32 or bfloat16; None: that of the parameters.
      shard_bytes: files are no longer.
      keep_factors: write the parameters of matrices that are not held dense too: see ``factors``.

    Returns:
      The family that it was written as.

    Raises:
      ConfigError: nothing was written: there is something at ``out``, or transformers has no such
        model; names the field of ours.
    """
    out = Path(out)
    if out.exists():
        raise ConfigError("OUT", f"{out} is there already; give a folder that is not")
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError("dtype", f"{dtype!r} is not valid; give float32 or bfloat16")
    chosen, config = choose(_config(model), model.vocab_size, family)
    table = list(chosen.table(_config(model)))
    held = Held(model, params)
    _check_table(chosen, table, held)
    dtype = dtype or _config(model).dtype
    config |= {"model_type": chosen.model_type, "architectures": [chosen.architecture]}
    config |= {"dtype": dtype, "torch_dtype": dtype}
    ids = special_ids(_config(model), None if tokenizer is None else tokenizer.vocabulary, config)
    with appearing(out) as folder:
        write_shards(folder, _saved(table, held, jnp.dtype(dtype)), shard_bytes)
        if keep_factors:
            write_factors(folder, model, params)
        if tokenizer is not None:
            tokenizers.write(folder, tokenizer, _config(model).kind)
        write_json(folder / GENERATION, {n: i for n, i in ids.items() if i is not None})
        write_json(folder / CONFIG, config | ids)
    return chosen


def _saved(table: list[Entry], held: Held, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    for entry in table:
        arrays = entry.save([held[path] for path in entry.ours])
        for name, array in zip(entry.theirs, arrays, strict=True):
            yield name, np.ascontiguousarray(array.astype(dtype))


def choose(
    model: Transformer, vocab_size: int, name: str | None = None
) -> tuple[Family, dict[str, Any]]:
    """The family that has such a model, and its config.json.

    Raises:
      ConfigError: none has, or the one of that name has not; says why.
    """
    if name is not None:
        if name not in FAMILIES:
            raise ConfigError("family", f"{name!r} is unknown; known: {', '.join(FAMILIES)}")
        return FAMILIES[name], expressed(FAMILIES[name], model, vocab_size)
    reasons = []
    for family in FAMILIES.values():
        try:
            return family, expressed(family, model, vocab_size)
        except ConfigError as error:
            reasons.append(str(error))
    near = [reason for reason in reasons if not reason.startswith("model.kind:")]
    raise ConfigError("model", f"transformers has no such model: {'; '.join(near or reasons)}")


def special_ids(
    model: Transformer, vocabulary: Vocabulary | None, config: Mapping[str, Any]
) -> dict[str, int | None]:
    """The special ids as config.json and generation_config.json have them.

    Args:
      vocabulary: None where nobody knows them. Then they are null: transformers would take others.
      config: the rest of config.json.

    Raises:
      ConfigError: the model needs another one than the vocabulary has (RoBERTa's padding).
    """
    ids: dict[str, int | None] = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"))
    if vocabulary is not None:
        values = vocabulary.pad, vocabulary.eos, vocabulary.bos
        ids = dict(zip(ids, values, strict=True))
        if model.kind == "encoder_decoder":
            ids["decoder_start_token_id"] = vocabulary.pad
    for name in ids.keys() & config.keys():
        if ids[name] not in (None, config[name]):
            raise ConfigError(
                "tokenizer",
                f"its {name} is {ids[name]}, and the model can only have {config[name]}",
            )
        ids[name] = config[name]
    return ids


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write into, which becomes ``out`` at the end, or goes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            raise ConfigError("OUT", f"{out} has appeared in the meantime")
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _config(model: Model) -> Transformer:
    if not isinstance(model.config, Transformer):
        name = type(model.config).__name__
        raise ConfigError("model", f"{name} is of several networks; Hugging Face has it as none")
    return model.config
