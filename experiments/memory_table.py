"""Bytes that a train step of LLaMA takes by each method, on one chip, without the chip.

    python -m experiments.memory_table --target h100:1 --models 7b --json >> memory.jsonl

The settings are those of ``configs/llama_SIZE_METHOD.py``, in bfloat16, at batch 1 and 256
positions, as the papers' figures are. Where all layers are updated at once, states are bfloat16 and
every layer's activations are computed again in the backward pass. 13B is as 7B, with LLaMA 13B's
sizes. Of one device: parameters, optimizer state, what the compiler adds for a while (gradients
too), and the peak, which is all of it. "no indices": the support is drawn again, from a key, at
every use. Work space that libraries take while they run (of a decomposition on a GPU, say) the
compiler does not know of.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable
from typing import Any

import rich.console
from rich.table import Table

from configs import _llama
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.environment import version
from jaxpt.layerwise import LayerwiseStep
from jaxpt.models import presets
from jaxpt.models.transformer import Transformer
from jaxpt.plan import plan, program_on
from jaxpt.run import Run
from jaxpt.weights import Grouped

VOCABULARY = Vocabulary(size=32_000, pad=0, eos=1)


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    run: size of the model -> its config; the last phase counts.
    layers: whether layers are updated one by one, with moments in 8 bits.
    support: of the sparse part, where it is not the config's.
    """

    run: Callable[[Any], Run]
    layers: bool = False
    support: Grouped | None = None


METHODS = {
    "Adam": Method(_llama.full),
    "Adam, 8 bit, per layer": Method(_llama.full, layers=True),
    "low rank": Method(_llama.low_rank),
    "low rank, 8 bit, per layer": Method(_llama.low_rank, layers=True),
    "LORO": Method(_llama.loro),
    "SLTrain 1/32": Method(_llama.sltrain, support=Grouped(32)),
    "SLTrain 1/20": Method(_llama.sltrain, support=Grouped(20)),
    "SLTrain 1/32, 8 bit, per layer": Method(_llama.sltrain, layers=True, support=Grouped(32)),
    "SLTrain 1/20, 8 bit, per layer": Method(_llama.sltrain, layers=True, support=Grouped(20)),
    "SLTrain 1/32, 8 bit, per layer, no indices": Method(
        _llama.sltrain, layers=True, support=Grouped(32, stored=False)
    ),
    "SLTrain 1/20, 8 bit, per layer, no indices": Method(
        _llama.sltrain, layers=True, support=Grouped(20, stored=False)
    ),
    "ReLoRA": Method(_llama.relora),
    "GaLore": Method(_llama.galore),
    "GaLore, 8 bit, per layer": Method(_llama.galore, layers=True),
    "Grass": Method(_llama.grass),
    "Grass, 8 bit, per layer": Method(_llama.grass, layers=True),
    "Fira": Method(_llama.fira),
    "APOLLO": Method(_llama.apollo),
    "APOLLO-mini": Method(_llama.apollo_mini),
    "SPAM": Method(_llama.spam),
    "Stable-SPAM": Method(_llama.stable_spam),
}
MODELS = ("60m", "130m", "350m", "1b", "7b", "13b")


def run_of(method: Method, model: str) -> Run:
    """The config of a row and a model."""
    run = method.run("7b" if model == "13b" else model)
    last = run.phases[-1]
    config = run.model_of(len(run.phases) - 1)
    assert isinstance(config, Transformer)
    if model == "13b":
        large = presets.llama_13b()
        sizes = {f: getattr(large, f) for f in ("width", "layers", "attention", "mlp")}
        config = dataclasses.replace(config, **sizes)
    if method.support is not None:
        config = dataclasses.replace(config, weights=supported(config.weights, method.support))
    config = dataclasses.replace(
        config,
        compute="bfloat16",
        scan=True,
        remat="none" if method.layers else "full",
    )
    held = "8bit" if method.layers else "bfloat16"
    phase = dataclasses.replace(
        last,
        batch=1,
        length=256,
        model=None,
        begin=(),
        optimizer=dataclasses.replace(last.optimizer, state_dtype=held),
        step=LayerwiseStep() if method.layers else last.step,
    )
    return dataclasses.replace(run, model=config, phases=(phase,))


def supported(weights: tuple, support: Grouped) -> tuple:
    """The same weights, with this support in the sparse parts."""
    return tuple(
        (pattern, dataclasses.replace(weight, support=support))
        if hasattr(weight, "support")
        else (pattern, weight)
        for pattern, weight in weights
    )


def measure(name: str, model: str, target: str) -> dict[str, Any]:
    """A row as a dict, in bytes."""
    found = plan(program_on(run_of(METHODS[name], model), target, VOCABULARY))
    versions = {name: version(name) for name in ("jax", "jaxlib", "libtpu")}
    return {
        "model": model,
        "method": name,
        "target": target,
        **dataclasses.asdict(found),
        "peak": found.peak,
        **versions,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table("model", "method", title="GB of one device")
    columns = ("parameters", "state", "temporaries", "peak")
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row[column] / 1e9:.2f}" for column in columns]
        made.add_row(row["model"], row["method"], *cells)
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--target", default="h100:1", help="see jaxpt/plan.py")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--json", action="store_true", help="print a line of JSON a row instead")
    options = parser.parse_args(argv)
    rows = []
    for model, name in itertools.product(options.models, options.methods):
        rows.append(measure(name, model, options.target))
        if options.json:
            print(json.dumps(rows[-1]), flush=True)
    if not options.json:
        rich.console.Console().print(table(rows))


if __name__ == "__main__":
    main()
