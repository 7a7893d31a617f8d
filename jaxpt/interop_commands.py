"""``jaxpt import`` and ``jaxpt export``: models from Hugging Face, and to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxpt.checkpoint import Checkpoints
from jaxpt.data.corpus import Corpus
from jaxpt.data.pretrained import Pretrained
from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError, Exit
from jaxpt.files import dumps
from jaxpt.folder import RunFolder
from jaxpt.interop import hf
from jaxpt.loading import load
from jaxpt.mesh import single
from jaxpt.models.transformer import Transformer
from jaxpt.objectives.base import Objective
from jaxpt.objectives.causal import CausalLM
from jaxpt.objectives.masked import MaskedLM
from jaxpt.objectives.prefix import PrefixLM
from jaxpt.objectives.span_corruption import SpanCorruption
from jaxpt.optimizers.adamw import AdamW
from jaxpt.run import Phase, Run, check, to_json
from jaxpt.train import Progress

LENGTH, TARGET_LENGTH = 512, 128  # positions of a row to evaluate an imported model with


def import_model(source: Path, out: Path, *, dtype: str | None, json: bool) -> int:
    """``jaxpt import hf DIR OUT``: a folder for ``generate``, ``eval`` and ``Run.start_from``.

    It holds a run of one phase that has not begun (whose objective is the usual one for such a
    model), the tokenizer, and the parameters as the checkpoint of step 0.

    Raises:
      ConfigError, DataError: as ``hf.read``; or there is something at ``out``. Nothing was written.
    """
    out = out.absolute()
    if out.exists():
        raise ConfigError("OUT", f"{out} is there already; give a folder that is not")
    found = hf.read(source)
    tokenizer = Pretrained(path=str(source)).build()
    if tokenizer.vocabulary.size > found.vocab_size:
        raise ConfigError(
            "DIR",
            f"its tokenizer has {tokenizer.vocabulary.size} ids, and its model {found.vocab_size}",
        )
    config = found.config if dtype is None else dataclasses.replace(found.config, dtype=dtype)
    run = check(_run(config, tokenizer.vocabulary, str(out)))
    with hf.appearing(out) as folder:
        home = RunFolder(folder)
        tokenizer.save(home.saved_tokenizer)
        progress = dataclasses.asdict(Progress())
        with Checkpoints(home.checkpoints, run_config=to_json(run)) as checkpoints:
            checkpoints.save(0, {"params": found.params(config)}, progress)
        home.config.write_text(to_json(run), encoding="utf-8")
    model = found.model()
    said = {"folder": str(out), "family": found.family.model_type, "parameters": model.parameters}
    line = f"{said['family']}, {model.parameters:,} parameters: {out}"
    print(dumps(said) if json else line)
    return Exit.OK


def _run(model: Transformer, vocabulary: Vocabulary, out: str) -> Run:
    """A run that has such a model, to be evaluated and asked."""
    both = model.kind == "encoder_decoder"
    return Run(
        model=model,
        tokenizer=Pretrained(path=out),
        phases=(
            Phase(
                name="imported",
                steps=1,
                data=Corpus(),
                objective=_objective(model, vocabulary),
                optimizer=AdamW(),
                batch=8,
                length=min(LENGTH, model.max_length or LENGTH),
                target_length=TARGET_LENGTH if both else None,
            ),
        ),
    )


def _objective(model: Transformer, vocabulary: Vocabulary) -> Objective:
    if model.kind == "encoder":
        return MaskedLM(mask=0.8 if vocabulary.mask is not None else 0.0)
    if model.kind == "decoder":
        return CausalLM()
    return SpanCorruption() if len(vocabulary.sentinels) >= LENGTH // 10 else PrefixLM()


def export_model(
    folder: Path,
    out: Path,
    *,
    to: str | None,
    family: str | None,
    dtype: str | None,
    shard_gigabytes: float,
    keep_factors: bool,
    network: str | None,
    at_step: int | None,
    json: bool,
) -> int:
    """``jaxpt export RUN --to hf OUT``: the parameters to evaluate with, for transformers.

    Raises:
      ConfigError: the folder holds no run with a checkpoint, or transformers has no such model.
        Nothing was written.
    """
    if to != "hf":
        raise ConfigError("--to", f"{to!r} is not known; give hf")
    if not shard_gigabytes > 0:
        raise ConfigError("--shard-gigabytes", f"{shard_gigabytes} is not valid; give above 0")
    loaded = load(folder, at_step, layout=single())
    model, params = loaded.program.model, loaded.params
    if network is not None:
        model, params = model.part(network), params[network]
    chosen = hf.write(
        out,
        model,
        params,
        loaded.tokenizer,
        family=family,
        dtype=dtype,
        shard_bytes=int(shard_gigabytes * 1e9),
        keep_factors=keep_factors,
    )
    said: dict[str, Any] = {"folder": str(out), "family": chosen.model_type, "step": loaded.step}
    line = f"step {loaded.step} as {chosen.architecture}: {out}"
    print(dumps(said) if json else line)
    return Exit.OK
