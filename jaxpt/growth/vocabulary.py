"""Another vocabulary: tables of tokens with more rows, fewer, or those of another tokenizer."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.data.encoding import Tokenizer
from jaxpt.data.tokenizers import TokenizerConfig
from jaxpt.errors import ConfigError
from jaxpt.growth.base import Transition
from jaxpt.state import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class ResizeVocabulary(Transition):
    """Embeddings, output projection and its bias for the vocabulary of the new model.

    A token keeps its row: by its id, or, where both tokenizers are given, by its text (special
    tokens by what they are for). The others' rows are the mean of all old ones, which moves no
    probability of an old token by much (Hewitt 2021, "Initializing New Word Embeddings for
    Pretrained Language Models"), or drawn as in a fresh model. Nothing else may differ.
    """

    new: Literal["mean", "draw"] = "mean"  # rows of tokens that the old vocabulary has not
    # the old and the new tokenizer, both, where ids mean other texts
    before: TokenizerConfig | None = None
    after: TokenizerConfig | None = None  # see before

    def __post_init__(self):
        if self.new not in ("mean", "draw"):
            raise ConfigError("new", f"{self.new!r} is not valid; give mean or draw")
        if (self.before is None) != (self.after is None):
            field = "before" if self.before is None else "after"
            raise ConfigError(field, "missing; give both tokenizers, or neither to go by ids")

    def validate(self, old, new):
        if old.tensors.keys() != new.tensors.keys():
            odd = sorted(old.tensors.keys() ^ new.tensors.keys())
            raise ConfigError("model", f"only the vocabulary may change, not {', '.join(odd[:3])}")
        for path, tensor in new.tensors.items():
            was = old.tensors[path]
            rest = [
                [n for n, axis in zip(t.shape, t.axes, strict=True) if axis != "vocab"]
                for t in (was, tensor)
            ]
            if was.axes != tensor.axes or rest[0] != rest[1]:
                raise ConfigError(
                    "model", f"{path} is {tensor.shape} in this phase and {was.shape} before"
                )
        self._check_tokenizers(old, new)

    def _check_tokenizers(self, old: Any, new: Any) -> None:
        for field, model in (("before", old), ("after", new)):
            config = getattr(self, field)
            if config is not None and (size := config.build().vocabulary.size) != model.vocab_size:
                raise ConfigError(field, f"of {size} ids; the model has {model.vocab_size}")

    def __call__(self, params, old, new, key):
        source = self.rows(old.vocab_size, new.vocab_size)
        flat = flatten(params)
        fresh = flatten(new.init(key)) if self.new == "draw" else flat
        for path, tensor in new.tensors.items():
            if "vocab" in tensor.axes:
                made = self._resized(flat[path], fresh[path], tensor, source, old.vocab_size)
                flat[path] = made.astype(tensor.dtype)
        return unflatten(flat)

    def rows(self, old_size: int, new_size: int) -> np.ndarray:
        """int32 [new_size]: the old id whose row each id gets; -1 where there is none."""
        if self.before is None or self.after is None:
            ids = np.arange(new_size, dtype=np.int32)
            return np.where(ids < old_size, ids, -1).astype(np.int32)
        known = {text: i for i, text in reversed(list(enumerate(texts(self.before.build()))))}
        found = [known.get(text, -1) if text else -1 for text in texts(self.after.build())]
        return np.array(found, np.int32)

    def _resized(self, array, fresh, tensor, source: np.ndarray, old_size: int) -> jax.Array:
        """One tensor along its vocabulary, whose padding stays zero."""
        axis = tensor.axes.index("vocab")
        rows = jnp.moveaxis(array, axis, 0)[:old_size]
        if self.new == "mean":
            mean = jnp.mean(rows.astype(jnp.float32), axis=0).astype(rows.dtype)
            others = jnp.broadcast_to(mean, (len(source), *rows.shape[1:]))
        else:
            others = jnp.moveaxis(fresh, axis, 0)[: len(source)]
        known = jnp.asarray(source >= 0).reshape(-1, *([1] * (rows.ndim - 1)))
        made = jnp.where(known, jnp.take(rows, np.maximum(source, 0), axis=0), others)
        padding = [(0, tensor.shape[axis] - len(source))] + [(0, 0)] * (rows.ndim - 1)
        return jnp.moveaxis(jnp.pad(made, padding), 0, axis)


def texts(tokenizer: Tokenizer) -> list[str]:
    """What each id stands for, comparable between tokenizers: its text with spaces written out, or
    the role of a special id. "" for an id that stands for nothing that another could have."""
    base, vocabulary = tokenizer.base, tokenizer.vocabulary
    found = [""] * vocabulary.size
    # What is cut inside a character has no text of its own.
    pieces = ["" if "\ufffd" in piece else piece for piece in base.pieces()]
    found[: len(pieces)] = pieces[: vocabulary.size]
    roles = {"pad": vocabulary.pad, "eos": vocabulary.eos, "bos": vocabulary.bos}
    roles |= {"mask": vocabulary.mask}
    roles |= {f"sentinel {n}": i for n, i in enumerate(vocabulary.sentinels)}
    roles |= {f"mode {name}": ids[0] for name, ids in vocabulary.modes if len(ids) == 1}
    for role, i in roles.items():
        if i is not None:
            found[i] = f"\0{role}"
    return found
