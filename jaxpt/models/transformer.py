"""The config of the Transformer (Vaswani et al. 2017) and its many descendants."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.models import flops
from jaxpt.models.attention import Attention
from jaxpt.models.base import Kind, ModelConfig
from jaxpt.models.mlp import MLP, check_rate
from jaxpt.models.norm import Norm, RMSNorm
from jaxpt.models.position import Learned, Positions, Rotary
from jaxpt.weights.base import Rules, Scope, Weight
from jaxpt.weights.dense import Dense
from jaxpt.weights.init import Init
from kernels.platform import platform

if TYPE_CHECKING:
    from jaxpt.models.network import Network

Placement = Literal["pre", "post", "after", "sandwich"]
Projection = Literal["in", "in_and_out"]
Remat = Literal["none", "elementwise", "full", "dots", "dots_no_batch", "branches"]
DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Transformer(ModelConfig):
    """One Transformer, as decoder (causal, or seeing the batch's prefix), encoder or both."""

    kind: Kind = "decoder"  # decoder honours the batch's prefix; encoder sees both ways
    width: int = 512  # model width D
    layers: int = 8  # layers of the only stack, or of the decoder
    encoder_layers: int | None = None  # layers of an encoder-decoder's encoder; None: as many
    # width of embeddings and learned positions, projected to the model's (ALBERT); None: width
    embedding_width: int | None = None
    # in: embeddings and positions are projected, with a bias; in_and_out: embeddings alone, and
    # before the output the states back, without biases (OPT 350M)
    embedding_projection: Projection = "in"
    attention: Attention = Attention()  # heads, their widths and what is done to scores
    mlp: MLP = MLP()  # hidden width, activation and gating
    norm: Norm = RMSNorm()  # kind of every norm
    positions: Positions = Rotary()  # how order is seen
    # norm before each branch, after the sum (post: BERT), after the branch (OLMo 2), or around it
    placement: Placement = "pre"
    final_norm: bool | None = None  # norm after the last layer; None: unless placement is post
    embedding_norm: bool = False  # norm after the embedding (BERT, BLOOM)
    parallel: bool = False  # attention and MLP side by side on one norm's output (GPT-J, PaLM)
    first_norm: bool = True  # whether the first layer's attention has its norm (ModernBERT's not)
    parallel_norms: bool = False  # whether each of them has a norm of its own (GPT-NeoX, Falcon)
    tied: bool = False  # whether the output projection is the embedding's transpose
    scale_embeddings: bool = False  # multiply embeddings by sqrt(width)
    logit_scale: float = 1.0  # multiplies the logits (tied T5 1.0: width^-0.5)
    logit_softcap: float | None = None  # bounds the logits by its magnitude; None: no bound
    output_bias: bool = False  # a bias for each vocabulary entry at the output
    head_transform: bool = False  # dense, activation and norm before the output (BERT's MLM head)
    head_transform_bias: bool = True  # whether that dense has a bias
    token_types: int = 0  # rows of BERT's token-type table; row 0 is added to each embedding
    # rows of the table of positions inside a blank, for blank infilling (decoder only); 0: none
    inner_positions: int = 0
    dropout: float = 0.0  # rate on embeddings and on what each branch adds
    scan: bool = True  # stack layers and scan over them; False: unrolled, faster, compiles longer
    # what the backward pass recomputes: nothing, norms and activations alone, everything but ...
    remat: Remat = "none"
    compute: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16, on CPU float32
    dtype: DType = "float32"  # of the parameters
    vocab_multiple: int = 128  # the vocabulary's rows are padded up to a multiple of this
    weights: tuple[tuple[str, Weight], ...] = (
        ("*", Dense()),
    )  # (path pattern, weight), first wins
    inits: tuple[tuple[str, Init], ...] = ()  # (path pattern, init), first wins over the defaults

    def __post_init__(self):
        for field in ("width", "layers", "encoder_layers", "embedding_width", "vocab_multiple"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(field, f"{value} is not valid; give 1 or more")
        for field, known in (
            ("kind", ("decoder", "encoder", "encoder_decoder")),
            ("placement", ("pre", "post", "after", "sandwich")),
            ("embedding_projection", ("in", "in_and_out")),
            ("remat", ("none", "elementwise", "full", "dots", "dots_no_batch", "branches")),
            ("compute", ("auto", "float32", "bfloat16")),
            ("dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, field) not in known:
                raise ConfigError(field, f"{getattr(self, field)!r} is none of {', '.join(known)}")
        self._check_embedding()
        if self.parallel_norms and (not self.parallel or self.placement == "post"):
            raise ConfigError(
                "parallel_norms",
                "branches have norms of their own, side by side, where parallel is set and "
                "placement is pre, after or sandwich",
            )
        if self.kind != "encoder_decoder" and self.encoder_layers is not None:
            raise ConfigError("encoder_layers", "only an encoder_decoder has them; leave it None")
        try:
            head_dim = self.attention.width_of_head(self.width)
        except ConfigError as error:
            raise error.within("attention") from None
        if isinstance(self.positions, Rotary):
            self.positions.check(head_dim)
        if not self.first_norm and (self.scan or self.placement != "pre" or self.parallel):
            raise ConfigError(
                "first_norm",
                "a first layer unlike the others needs scan=False, and placement pre without "
                "parallel",
            )
        self._check_scan()
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ConfigError("logit_softcap", f"{self.logit_softcap} is not valid; give above 0")
        if self.token_types < 0:
            raise ConfigError("token_types", f"{self.token_types} is not valid; give 0 or more")
        if self.inner_positions < 0 or (self.inner_positions and self.kind != "decoder"):
            raise ConfigError(
                "inner_positions",
                f"{self.inner_positions} is not valid; give 0 or more, and above 0 only to a "
                f"decoder (this is {self.kind})",
            )
        check_rate("dropout", self.dropout)

    def _check_embedding(self):
        if self.projects_out and (self.head_transform or self.embedding_norm):
            raise ConfigError(
                "embedding_projection",
                "in_and_out has no place for head_transform or embedding_norm",
            )
        if self.tied and self.width_of_output != self.width_of_embedding:
            raise ConfigError(
                "tied",
                f"states of width {self.width} have no product with embeddings of width "
                f"{self.embedding_width}; set head_transform, or embedding_projection to "
                "in_and_out, which bring them there",
            )

    def _check_scan(self):
        period = len(self.attention.window)
        for field, layers in (("layers", self.layers), ("encoder_layers", self.encoder_layers)):
            if self.scan and period and layers is not None and layers % period:
                raise ConfigError(
                    "attention.window",
                    f"its {period} entries do not divide {field} = {layers}; or set scan=False",
                )

    def validate(self, length: int, target_length: int | None = None) -> None:
        """Whether rows of these lengths can be served.

        Args:
          length: positions of a row of the only stack, or of the encoder.
          target_length: positions of a row of the decoder of an encoder-decoder; else None.

        Raises:
          ConfigError: a length that is missing, superfluous, or beyond the position table.
        """
        both = self.kind == "encoder_decoder"
        if both and target_length is None:
            raise ConfigError("target_length", "an encoder_decoder needs one")
        if not both and target_length is not None:
            raise ConfigError(
                "target_length", f"a model of kind {self.kind} has none; leave it None"
            )
        for rows in (length, target_length):
            if rows is not None:
                try:
                    self.positions.validate(rows)
                except ConfigError as error:
                    raise error.within("positions") from None

    def network(self, vocab_size: int, scope: Scope) -> Network:
        from jaxpt.models.network import Network

        return Network(self, vocab_size, scope)

    def flops(self, products, vocab_size, batch, length, target_length) -> float:
        return flops.forward(self, products, vocab_size, batch, length, target_length)

    @property
    def stacked(self) -> bool:
        return self.scan

    def with_stacks(self) -> Transformer:
        # Windows do not touch the parameters, but their number has to divide the layers'.
        attention = dataclasses.replace(self.attention, window=())
        return dataclasses.replace(self, scan=True, attention=attention, first_norm=True)

    @property
    def max_length(self) -> int | None:
        return self.positions.max_length if isinstance(self.positions, Learned) else None

    @property
    def width_of_embedding(self) -> int:
        """Width of the embedding."""
        return self.embedding_width or self.width

    @property
    def std_of_embedding(self) -> float:
        """Of a fresh embedding. Tied, it is also the output matrix, whose logits are to begin of
        order 1."""
        return 1 / math.sqrt(self.width_of_embedding) if self.tied else 1.0

    @property
    def projects_out(self) -> bool:
        """Whether states are brought to the embedding's width before the output, by a matrix."""
        return self.embedding_projection == "in_and_out" and self.width_of_embedding != self.width

    @property
    def width_of_positions(self) -> int:
        """Width of learned positions."""
        return self.width if self.projects_out else self.width_of_embedding

    @property
    def width_of_output(self) -> int:
        """Width of the states that meet the output projection."""
        back = self.head_transform or self.projects_out
        return self.width_of_embedding if back else self.width

    @property
    def head_dim(self) -> int:
        """Width H of a head."""
        return self.attention.width_of_head(self.width)

    @property
    def depth_of_encoder(self) -> int:
        """Layers of the encoder; 0 where there is none."""
        if self.kind == "encoder":
            return self.layers
        return (self.encoder_layers or self.layers) if self.kind == "encoder_decoder" else 0

    @property
    def depth_of_decoder(self) -> int:
        """Layers of the decoder; 0 where there is none."""
        return 0 if self.kind == "encoder" else self.layers

    @property
    def has_final_norm(self) -> bool:
        return self.placement != "post" if self.final_norm is None else self.final_norm

    @property
    def has_dropout(self) -> bool:
        return max(self.dropout, self.attention.dropout, self.mlp.dropout) > 0

    @property
    def rules(self) -> Rules:
        return Rules(self.weights, self.inits, self.dtype)

    def compute_dtype(self) -> jnp.dtype:
        """dtype of activations, on the platform that is compiled for."""
        if self.compute != "auto":
            return jnp.dtype(self.compute)
        return jnp.dtype("float32" if platform() == "cpu" else "bfloat16")

    def padded_vocab(self, vocab_size: int) -> int:
        """Rows of the embedding."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple
