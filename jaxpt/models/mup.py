"""muP: hyperparameters that were found on a narrow model serve a wide one (Yang et al. 2022,
"Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer").

    model=MuP(base=Shapes(width=256, heads=4), width=2048, attention=Attention(heads=32), ...)

Standard deviations, scales and learning rates in the config are those of the base model, and at its
shapes this is the plain Transformer. Where a matrix has r_in times as many inputs and r_out times
as many outputs as the base's, it is as in the paper's table 8:

                        embeddings, norms, biases   output       other matrices
    std at first        base's                      base's       base's / sqrt(r_in)
    multiplier          1                           1 / r_in     1
    lr of AdamW, Lion   1                           1            1 / r_in
    lr of SGD           r_out                       r_in         r_out / r_in

and scores are scaled by 1 / head_dim, not 1 / sqrt(head_dim), times what makes it the base's at the
base's head (definition 4.1). A matrix inside the network whose outputs do not grow (to an
embedding of fixed width) has base's / r_in as its std, as table 3 has it. Muon's orthogonal
updates u of matrices follow norm(u) ~ sqrt(r_out / r_in) (Yang et al. 2023, "A spectral condition
for feature learning", condition 1), and all else that it updates AdamW's. The pull of weight decay,
lr x weight_decay, does not change with the width.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from typing import Any

from jaxpt.errors import ConfigError
from jaxpt.models.model import Model
from jaxpt.models.transformer import Transformer
from jaxpt.optimizers import SGD, AdamW, Lion, Muon
from jaxpt.optimizers.groups import is_inner_matrix
from jaxpt.optimizers.rules import one_layer
from jaxpt.paths import without_number
from jaxpt.weights.base import Rules
from jaxpt.weights.dense import Dense
from jaxpt.weights.init import Init, Normal

OUTPUT = "lm_head"  # the matrix before the logits, where it is not the embedding's transpose


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shapes of the base model, at which the hyperparameters were found; what is not here does not
    change with the width."""

    width: int = 256  # model width
    heads: int = 4  # query heads
    kv_heads: int | None = None  # key/value heads; None: as many as query heads
    head_dim: int | None = None  # width of a head; None: width / heads
    mlp_width: int | None = None  # hidden width of the MLP; None: four times the model's


@dataclasses.dataclass(frozen=True)
class Times(Init):
    """Another initialiser's draws times a factor."""

    of: Init
    factor: float  # what each entry is multiplied by

    def std(self, fan_in, fan_out):
        return self.factor * self.of.std(fan_in, fan_out)

    def __call__(self, key, shape, fan_in, fan_out, dtype):
        return (self.factor * self.of(key, shape, fan_in, fan_out, "float32")).astype(dtype)


@dataclasses.dataclass(frozen=True)
class MuP(Transformer):
    """A Transformer whose init, scales and learning rates follow from a base model's by its widths.

    For AdamW, Lion, SGD and Muon, and matrices that are held dense. A phase that goes on with
    another kind of model (``headed``) is given that of ``plain``.
    """

    base: Shapes = Shapes()  # at which std, scales and learning rates are as they stand here

    def __post_init__(self):
        super().__post_init__()
        if self.scale_embeddings:
            raise ConfigError(
                "scale_embeddings", "sqrt(width) grows with the width: set a std by inits instead"
            )
        if not all(isinstance(weight, Dense) for _, weight in self.weights):
            raise ConfigError("weights", "the widths of muP are those of dense matrices alone")
        try:
            self.of_base()
        except ConfigError as error:
            raise error.within("base") from None

    @property
    def rules(self) -> Rules:
        raise ConfigError("model", "MuP is a model by itself, not a network of another")

    def build(self, vocab_size: int) -> Model:
        return self.plain(vocab_size).build(vocab_size)

    def plain(self, vocab_size: int) -> Transformer:
        """The Transformer that this is at its width, all scales worked out."""
        base = self.of_base()
        outer = self.width_of_output / base.width_of_output
        at_base = self.attention.scale or base.head_dim**-0.5
        scale = at_base * base.head_dim / self.head_dim
        own, small = _models(self, vocab_size)
        inits = {}
        for path, tensor in own.tensors.items():
            named, std = without_number(path), _std(path, own, small)
            given = next((i for p, i in self.inits if fnmatch.fnmatchcase(named, p)), None)
            if given is None and tensor.std:
                inits[named] = Normal(std)
            elif given is not None:
                inits[named] = Times(given, std / tensor.std) if tensor.std else given
        return self.transformer(
            attention=dataclasses.replace(self.attention, scale=scale),
            logit_scale=self.logit_scale / outer,
            inits=tuple(inits.items()),
        )

    def rate_scales(self, optimizer: Any, vocab_size: int) -> dict[str, float]:
        """Path -> factor of the learning rate. Raises ConfigError for other optimizers."""
        if type(optimizer) not in (AdamW, Lion, SGD, Muon):
            name = type(optimizer).__name__
            raise ConfigError(
                "optimizer", f"muP has no learning rates for {name}; known: AdamW, Lion, Muon, SGD"
            )
        own, base = _models(self, vocab_size)
        return {path: _rate(optimizer, path, own, base) for path in own.tensors}

    def of_base(self) -> Transformer:
        """The base model."""
        base = self.base
        attention = dataclasses.replace(
            self.attention, heads=base.heads, kv_heads=base.kv_heads, head_dim=base.head_dim
        )
        mlp = dataclasses.replace(self.mlp, width=base.mlp_width)
        return self.transformer(width=base.width, attention=attention, mlp=mlp)

    def transformer(self, **changes: Any) -> Transformer:
        """The plain one with these fields, and other values for some."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Transformer)}
        return Transformer(**(fields | changes))


@functools.lru_cache(maxsize=8)
def _models(config: MuP, vocab_size: int) -> tuple[Model, Model]:
    """Plain models with the fields as they are, of the own shapes and of the base's."""
    return config.transformer().build(vocab_size), config.of_base().build(vocab_size)


def _std(path: str, own: Model, base: Model) -> float:
    """A tensor's standard deviation at first."""
    inputs, outputs = _growth(path, own, base)
    if path.startswith(f"{OUTPUT}/"):
        inputs = 1.0
    return base.tensors[path].std / (inputs if outputs == 1 else math.sqrt(inputs))


def _growth(path: str, own: Model, base: Model) -> tuple[float, float]:
    """(r_in, r_out); of what is no matrix (1, how many times as long it is)."""
    owner = path.rpartition("/")[0]
    if owner in own.products:
        a, b = own.products[owner], base.products[owner]
        return a.d_in / b.d_in, a.d_out / b.d_out
    return 1.0, math.prod(own.tensors[path].shape) / math.prod(base.tensors[path].shape)


def _rate(optimizer: Any, path: str, own: Model, base: Model) -> float:
    """The factor of one tensor's learning rate."""
    inputs, outputs = _growth(path, own, base)
    output = path.startswith(f"{OUTPUT}/")
    if isinstance(optimizer, SGD):
        return inputs if output else outputs / inputs
    row = own.tensors[path]
    if isinstance(optimizer, Muon) and is_inner_matrix(row):
        sizes = [optimizer.size(one_layer(model.tensors[path])) for model in (own, base)]
        return math.sqrt(outputs / inputs) * sizes[1] / sizes[0]
    return 1.0 if output else 1 / inputs
