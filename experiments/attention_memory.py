"""What attention adds to the memory of a train step of T5, on one TPU, without the TPU.

    python -m experiments.attention_memory --target v5e:1

T5 1.1 small with AdamW, 2,048 positions of inputs and 512 of targets, bfloat16 activations, nothing
computed again in the backward pass. "plain XLA" is ``jax.nn.dot_product_attention`` with the bias
and the mask as arrays; "xla" is ours, in chunks of queries, and "pallas_tpu" the kernels. Each is
compiled for the chip in a process of its own, and what the compiler says of its memory is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from typing import Any

import jax
import rich.console
from rich.table import Table

from jaxpt.data.corpus import Corpus
from jaxpt.data.tokenizers import BPE
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.mesh import Mesh
from jaxpt.models import presets
from jaxpt.objectives.span_corruption import SpanCorruption
from jaxpt.optimizers import AdamW
from jaxpt.plan import plan, program_on
from jaxpt.run import Phase, Run
from kernels.attention import api, materialize
from kernels.attention.bias import ALiBi, RelativeBias
from kernels.attention.rule import allowed

PLAIN = "plain XLA"
IMPLEMENTATIONS = (PLAIN, "xla", "pallas_tpu")
VOCABULARY = Vocabulary(size=32_128, pad=0, eos=1, sentinels=tuple(range(32_127, 31_999, -1)))


def plain(q, k, v, *, bias, softcap, scale, dropout, **rule) -> jax.Array:
    """The op as XLA runs it when it is written down: all scores at once."""
    if softcap is not None or dropout is not None:
        raise NotImplementedError("softcap, dropout")
    if isinstance(bias, RelativeBias | ALiBi):
        bias = materialize(bias, q.shape[1], k.shape[1])[None]
    mask = allowed(q.shape[1], k.shape[1], **rule)
    mask = None if mask is None else mask[:, None]
    out: Any = jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, implementation="xla")
    return out


def run_of(implementation: str, args: argparse.Namespace) -> Run:
    model = getattr(presets, args.model)()
    attention = dataclasses.replace(model.attention, implementation=implementation)
    return Run(
        model=dataclasses.replace(model, attention=attention, remat=args.remat),
        tokenizer=BPE(vocab_size=VOCABULARY.size),
        phases=(
            Phase(
                steps=100,
                data=Corpus(),
                objective=SpanCorruption(),
                optimizer=AdamW(lr=1e-3),
                batch=args.batch,
                length=args.length,
                target_length=args.target_length,
            ),
        ),
        mesh=Mesh(data=1),
    )


def measured(implementation: str, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the table."""
    if implementation == PLAIN:
        api.IMPLEMENTATIONS[PLAIN] = plain
    row: dict[str, Any] = {"attention": implementation}
    try:
        found = plan(program_on(run_of(implementation, args), args.target, VOCABULARY))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"note": str(error).split("\n")[0]}
    return row | {"temporaries": found.temporaries, "peak": found.peak}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", default="v5e:1")
    parser.add_argument("--model", default="t5_small")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--target-length", type=int, default=512)
    parser.add_argument("--remat", default="elementwise")
    parser.add_argument("--by", choices=IMPLEMENTATIONS, help="one alone; prints JSON")
    args = parser.parse_args(argv)
    if args.by:
        print(json.dumps(measured(args.by, args)))
        return
    rows = []
    for implementation in IMPLEMENTATIONS:
        command = [sys.executable, "-m", "experiments.attention_memory", *argv]
        done = subprocess.run([*command, "--by", implementation], stdout=subprocess.PIPE, text=True)
        done.check_returncode()
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("attention", "temporaries GiB", "peak GiB", "share of plain XLA's", "")
    base = rows[0].get("temporaries")
    for row in rows:
        sizes = (row.get(name) for name in ("temporaries", "peak"))
        share = base and row.get("temporaries") and row["temporaries"] / base
        table.add_row(
            row["attention"],
            *("" if size is None else f"{size / 2**30:.2f}" for size in sizes),
            f"{share:.2f}" if share else "",
            row.get("note", ""),
        )
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
