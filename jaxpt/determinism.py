"""The same numbers in every run: what XLA has to be told before it starts."""

from __future__ import annotations

import os

import jax
from jax._src import xla_bridge  # nothing public says whether a backend has started

from jaxpt.errors import ConfigError

# On GPUs some operations add in the order in which threads come, and kernels are chosen by timing
# them. The first flag forbids both, the second says the former again to older versions. CPUs and
# TPUs need nothing.
FLAGS = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_exclude_nondeterministic_ops=true")


def prepare(deterministic: bool) -> None:
    """Sets what is needed, before JAX starts.

    Raises:
      ConfigError: it has started, on GPUs, without.
    """
    if not deterministic:
        return
    given = os.environ.get("XLA_FLAGS", "")
    lacking = [flag for flag in FLAGS if flag not in given.split()]
    if lacking and not xla_bridge.backends_are_initialized():
        os.environ["XLA_FLAGS"] = " ".join([given, *lacking]).strip()
    elif lacking and jax.default_backend() == "gpu":
        raise ConfigError(
            "deterministic",
            "JAX has started without the flags that this needs; before anything else, set "
            f"XLA_FLAGS='{' '.join(FLAGS)}'",
        )
