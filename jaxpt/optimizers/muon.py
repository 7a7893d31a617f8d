"""Muon: momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

For matrices (``is_inner_matrix``, each layer of a stacked tensor by itself) but for the output
projection, with m the moving average of gradients, both terms with Adam's bias correction:

    m <- beta m + (1 - beta) g
    u = orthogonalise(beta m + (1 - beta) g)              Newton-Schulz, ns_steps quintic iterations
    u <- u * rms * sqrt(max(d_in, d_out))                 Liu et al. 2025, eq. 4
      or u * sqrt(max(1, d_out / d_in)) where rms is None   Jordan's own

Embeddings, the output projection, norms and biases follow Adam.
"""

from __future__ import annotations

import dataclasses
import math

import optax
from optax import contrib

from jaxpt.errors import ConfigError
from jaxpt.optimizers.base import Optimizer, Rule, StateType, Tensor, check_shares, of_optax
from jaxpt.optimizers.groups import is_inner_matrix

# Weights are [d_in, d_out].
IN_OUT = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
    """Muon for the matrices, Adam for the rest; see the file's head for the update."""

    weight_decay: float = 0.1  # pull of matrices towards 0, as a share of lr
    beta: float = 0.95  # decay of the matrices' momentum
    nesterov: bool = True  # look one step ahead
    ns_steps: int = 5  # Newton-Schulz iterations
    # root mean square of an update's entries, so that AdamW's lr and decay serve; None: Jordan's
    rms: float | None = 0.2
    adam_lr_scale: float = 1.0  # multiplies the learning rate of what follows Adam
    b1: float = 0.9  # Adam's decay of the first moment
    b2: float = 0.95  # Adam's decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment and to the norm before iterating
    mu_dtype: StateType | None = None  # type of the first moments; None: the state's

    def __post_init__(self):
        super().__post_init__()
        check_shares(self, "beta", "b1", "b2")
        if self.ns_steps < 1:
            raise ConfigError("ns_steps", f"{self.ns_steps} is not valid; give 1 or more")
        for field in ("rms", "adam_lr_scale", "eps"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ConfigError(field, f"{value} is not valid; give a number > 0")

    def rule(self, tensor: Tensor) -> Rule:
        if not is_inner_matrix(tensor):
            adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype)
            return of_optax(optax.chain(adam, optax.scale(self.adam_lr_scale)))
        muon = contrib.scale_by_muon(
            ns_steps=self.ns_steps,
            beta=self.beta,
            eps=self.eps,
            mu_dtype=self.mu_dtype,
            nesterov=self.nesterov,
            weight_dimension_numbers=lambda _: IN_OUT,
        )
        return of_optax(optax.chain(muon, optax.scale(self.size(tensor))))

    def size(self, tensor: Tensor) -> float:
        """The spectral norm of an update of this matrix, without the learning rate."""
        d_in, d_out = tensor.shape
        if self.rms is None:
            return math.sqrt(max(1.0, d_out / d_in))
        return self.rms * math.sqrt(max(d_in, d_out))
