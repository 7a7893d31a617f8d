"""Writes a golden run: one that every later version has to restore, whatever has changed by then.

    python tests/golden/make.py

Run it when ``jaxpt.migrations.FORMAT`` has grown, and commit the folder: it is called by that
format and by JAX's version. Those that are there already are never written anew.
"""

from __future__ import annotations

import pathlib
import shutil
import sys
import tempfile

import jax

from jaxpt.checkpoint import Checkpoint
from jaxpt.data.loader import Loading
from jaxpt.data.markov import Markov
from jaxpt.data.mixing import ODM
from jaxpt.data.mixture import Mixture
from jaxpt.data.tokenizers import Bytes
from jaxpt.evaluation import Evaluate
from jaxpt.files import read_metrics, write_json
from jaxpt.growth import Average
from jaxpt.mesh import Mesh
from jaxpt.migrations import FORMAT
from jaxpt.models.attention import Attention
from jaxpt.models.mlp import MLP
from jaxpt.models.transformer import Transformer
from jaxpt.monitor import Monitor
from jaxpt.objectives import CausalLM
from jaxpt.optimizers import AdamW
from jaxpt.run import Phase, Run
from jaxpt.train import train
from jaxpt.weights import Dense, Masked

HERE = pathlib.Path(__file__).parent
SAVED, STEPS = 3, 5  # the checkpoint's step, and those whose losses are noted
KEPT = ("config.json", "tokenizer", "checkpoints")


def run() -> Run:
    """A decoder with weights of two kinds, an average, data whose mixture learns."""
    chains = ((Markov(symbols=8, length=200), 1.0), (Markov(symbols=8, seed=1, length=200), 1.0))
    return Run(
        model=Transformer(
            width=4,
            layers=1,
            attention=Attention(heads=1),
            mlp=MLP(width=8),
            tied=True,
            vocab_multiple=8,
            weights=(("*/mlp/*", Masked(0.5)), ("*", Dense())),
        ),
        phases=(
            Phase(
                steps=STEPS,
                data=Mixture(parts=chains, names=("a", "b"), policy=ODM()),
                objective=CausalLM(),
                optimizer=AdamW(lr=1e-2),
                batch=4,
                length=16,
                updates=(Average(decay=0.9),),
            ),
        ),
        tokenizer=Bytes(sentinels=0, modes=()),
        evaluate=Evaluate(batches=1, samples=0),
        checkpoint=Checkpoint(every=SAVED, keep=1, keep_every=SAVED),
        monitor=Monitor(every=1, console="off", tensorboard=False),
        loader=Loading(window=8),
        mesh=Mesh(devices=1),
    )


def main() -> int:
    target = HERE / f"format-{FORMAT}-jax-{jax.__version__}"
    if target.exists():
        print(f"{target} is there already")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder) / "run"
        train(run(), home)
        rows = read_metrics(home / "metrics.jsonl")
        losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
        for checkpoint in (home / "checkpoints").iterdir():
            if checkpoint.name != str(SAVED):
                shutil.rmtree(checkpoint)
        target.mkdir()
        for name in KEPT:
            (home / name).rename(target / name)
        write_json(target / "losses.json", {s: v for s, v in losses.items() if s > SAVED})
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
