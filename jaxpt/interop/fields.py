"""The fields of a config.json: each understood, known to be harmless, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from jaxpt.errors import ConfigError

T = TypeVar("T")
REQUIRED: Any = object()

_OUTPUT = "what a forward pass returns, not what it computes"
_TRAINING = "how training initialises or regularises"
_GENERATION = "how text is generated"
_BOOKS = "bookkeeping of transformers"
# Fields that any config.json may have and that change no logits: name -> why.
HARMLESS: dict[str, str] = {
    **dict.fromkeys(
        ("_name_or_path", "architectures", "model_type", "transformers_version", "auto_map"), _BOOKS
    ),
    **dict.fromkeys(("torch_dtype", "dtype"), "the files say which types they hold"),
    **dict.fromkeys(("use_cache", "output_attentions", "output_hidden_states"), _OUTPUT),
    **dict.fromkeys(("return_dict", "return_dict_in_generate", "output_past"), _OUTPUT),
    **dict.fromkeys(
        ("initializer_range", "initializer_factor", "gradient_checkpointing"), _TRAINING
    ),
    **dict.fromkeys(
        ("id2label", "label2id", "num_labels", "problem_type"), "of classifiers' heads"
    ),
    **dict.fromkeys(("classifier_dropout", "finetuning_task", "task_specific_params"), _TRAINING),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"), _GENERATION),
    **dict.fromkeys(("decoder_start_token_id", "max_length", "prefix"), _GENERATION),
    **dict.fromkeys(("tokenizer_class", "_commit_hash", "chunk_size_feed_forward"), _BOOKS),
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), "which code computes it"),
    **dict.fromkeys(("pretraining_tp", "tie_encoder_decoder"), _BOOKS),
}


class Fields:
    """A config.json as a family reads it. What it asks for is understood; ``finish`` refuses what
    nobody asked for and nobody knows to be harmless."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = dict(raw)
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.raw

    def get(self, name: str, default: Any = REQUIRED, kind: Any = None) -> Any:
        """The field's value, or ``default`` (transformers' own) where it is not there.

        Args:
          kind: type or tuple of types that it must have; None: the default's.

        Raises:
          ConfigError: it is missing and has no default, or is of another type.
        """
        self._asked.add(name)
        value = self.raw.get(name, default)
        if value is REQUIRED:
            raise ConfigError(name, "missing in config.json")
        if kind is None:
            kind = type(default) if default not in (None, REQUIRED) else object
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds:
            kinds += (int,)
        if not isinstance(value, kinds) or (
            isinstance(value, bool) and not {bool, object} & {*kinds}
        ):
            names = " or ".join(k.__name__ for k in kinds)
            raise ConfigError(name, f"{value!r} in config.json is no {names}")
        return value

    def integer(self, name: str, default: Any = REQUIRED, least: int = 1) -> int:
        """``get`` of a whole number that is at least ``least``."""
        value = self.get(name, default, int)
        if value < least:
            raise ConfigError(name, f"{value} in config.json is below {least}")
        return value

    def choose(self, name: str, table: Mapping[Any, T], default: Any = REQUIRED) -> T:
        """What ``table`` has for the field's value. Raises ConfigError where it has nothing."""
        value = self.get(name, default, object)
        if not isinstance(value, str | int | float | bool | None) or value not in table:
            known = ", ".join(map(repr, table))
            raise ConfigError(name, f"{value!r} is not supported; known: {known}")
        return table[value]

    def expect(self, name: str, value: Any, default: Any = REQUIRED) -> None:
        """Raises ConfigError unless the field has this value, the only one that is supported.

        Args:
          default: what it has where it is not there; as ``value`` if not given.
        """
        found = self.get(name, value if default is REQUIRED else default, object)
        if found != value:
            raise ConfigError(name, f"{found!r} is not supported; only {value!r} is")

    def finish(self, harmless: Mapping[str, str]) -> None:
        """Refuses fields that nobody asked for, but for harmless ones (name -> why). Raises
        ConfigError, which names the first."""
        known = self._asked | HARMLESS.keys() | harmless.keys()
        left = sorted(name for name in self.raw if name not in known)
        if left:
            value = self.raw[left[0]]
            more = f" (nor are {', '.join(left[1:])})" if left[1:] else ""
            raise ConfigError(left[0], f"{value!r} in config.json is not understood{more}")
