"""What a family of models is: its config both ways, and the table of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

from jaxpt.errors import ConfigError
from jaxpt.interop.fields import Fields
from jaxpt.interop.table import Entry
from jaxpt.models.transformer import Transformer
from jaxpt.weights.dense import Dense


class Family:
    """One ``model_type`` of transformers. Subclasses live in a file each in ``families``.

    To add one: derive, write ``config``, ``hf_config`` and ``table``, and put it into ``FAMILIES``
    (``families/__init__.py``). Nothing else needs to know of it. What it need not do: check that
    a model can be exported (``hf_config`` is held against ``config``, see ``expressed``), look for
    missing and left-over tensors, or check shapes, padding, layers stacked or not, low rank.

    model_type: config.json's.
    architecture: the class of transformers with the language model's head, as written and read.
    also: further classes whose files are read, of which this is a part.
    prefix: what their names begin with, and files of the model without its head leave out.
    renamed: what older files call their tensors, as regular expression -> what stands in its place.
    harmless: fields of its config.json that change no logits -> why; beside ``fields.HARMLESS``.
    left_out: regular expressions of their tensors that nothing here needs -> why.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    also: ClassVar[tuple[str, ...]] = ()
    prefix: ClassVar[str] = ""
    renamed: ClassVar[Mapping[str, str]] = {}
    harmless: ClassVar[Mapping[str, str]] = {}
    left_out: ClassVar[Mapping[str, str]] = {}

    def config(self, fields: Fields, names: Collection[str]) -> Transformer:
        """Our config for theirs. Ask ``fields`` for all that matters (with transformers' own
        default): what is not asked for, and not harmless, is refused afterwards.

        Args:
          names: those of the tensors in the files, where the config alone does not tell.

        Raises:
          ConfigError: a variant that is not supported; its field is the name in config.json.
        """
        raise NotImplementedError

    def hf_config(self, model: Transformer) -> dict[str, Any]:
        """The fields of config.json that ``config`` asks for, without ``vocab_size`` and special
        ids. Whatever it cannot express may be ignored: the caller sees that ``config`` does not
        give the model back, and says so.
        """
        raise NotImplementedError

    def table(self, model: Transformer) -> Iterable[Entry]:
        """All tensors of the model, in our names of unrolled layers and dense matrices."""
        raise NotImplementedError

    def aliases(self, model: Transformer) -> Mapping[str, str]:
        """Their tensors that some files hold a second time -> which one they must equal."""
        return {}

    def names(self, model: Transformer) -> set[str]:
        """Their names of the model's tensors."""
        return {name for entry in self.table(model) for name in entry.theirs}


def expressed(family: Family, model: Transformer, vocab_size: int) -> dict[str, Any]:
    """The config.json of a model, as far as the family has it.

    Raises:
      ConfigError: the family has no such model; names the field of ours.
    """
    try:
        found = family.hf_config(model) | {"vocab_size": vocab_size}
        fields = Fields(found)
        back = family.config(fields, family.names(model))
        fields.get("vocab_size")
        fields.finish(family.harmless)
    except ConfigError as error:
        raise ConfigError("model", f"{family.model_type} has no such model: {error}") from None
    path = difference(essence(model), essence(back))
    if path:
        said = _at(essence(model), path), _at(essence(back), path)
        raise ConfigError(
            f"model.{path}", f"{family.model_type} cannot have {said[0]!r}, only {said[1]!r}"
        )
    return found


def essence(model: Transformer) -> Transformer:
    """The model without what does not change its function, with defaults filled in."""
    attention, depth = model.attention, max(model.depth_of_encoder, model.depth_of_decoder)
    windows = tuple(attention.window_of_layer(i) for i in range(depth))
    return dataclasses.replace(
        model,
        attention=dataclasses.replace(
            attention,
            kv_heads=attention.groups(),
            head_dim=model.head_dim,
            scale=model.head_dim**-0.5 if attention.scale is None else attention.scale,
            window=windows if any(windows) else (),
            out_bias=attention.bias if attention.out_bias is None else attention.out_bias,
            dropout=0.0,
            implementation=None,
        ),
        mlp=dataclasses.replace(model.mlp, width=model.mlp.width or 4 * model.width, dropout=0.0),
        encoder_layers=model.depth_of_encoder if model.kind == "encoder_decoder" else None,
        embedding_width=model.width_of_embedding,
        embedding_projection=(
            "in" if model.width_of_embedding == model.width else model.embedding_projection
        ),
        final_norm=model.has_final_norm,
        dropout=0.0,
        scan=False,
        remat="none",
        compute="auto",
        dtype="float32",
        vocab_multiple=1,
        weights=(("*", Dense()),),
        inits=(),
    )


def difference(a: Any, b: Any) -> str | None:
    """The dotted path of the first field in which two configs differ; None where they are equal."""
    if a == b:
        return None
    if type(a) is not type(b) or not dataclasses.is_dataclass(a):
        return ""
    for field in dataclasses.fields(a):
        inner = difference(getattr(a, field.name), getattr(b, field.name))
        if inner is not None:
            return f"{field.name}.{inner}".removesuffix(".")
    return ""


def _at(value: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        value = getattr(value, name)
    return value
