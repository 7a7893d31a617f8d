"""Runs small enough to be killed many times: every family of objectives, phases, masks that change,
mixing that learns. See ``experiments/chaos.py``."""

from __future__ import annotations

import dataclasses

from jaxpt.checkpoint import Checkpoint
from jaxpt.data.corpus import Corpus
from jaxpt.data.loader import Loading
from jaxpt.data.markov import Markov
from jaxpt.data.mixing import ODM
from jaxpt.data.mixture import Mixture
from jaxpt.data.sentence_order import SentenceOrder
from jaxpt.data.tokenizers import Bytes
from jaxpt.evaluation import Evaluate
from jaxpt.growth import Average, Convert, Keep, Stack
from jaxpt.mesh import Mesh
from jaxpt.models.attention import Attention
from jaxpt.models.distilled import Distilled
from jaxpt.models.electra import Discriminator, Electra
from jaxpt.models.headed import headed
from jaxpt.models.mlp import MLP
from jaxpt.models.position import Learned
from jaxpt.models.transformer import Transformer
from jaxpt.monitor import Monitor
from jaxpt.objectives import (
    PELA,
    UL2,
    BlankInfilling,
    CausalLM,
    FillInTheMiddle,
    MaskedLM,
    Objective,
    OnDevice,
    PrefixLM,
    ReplacedTokens,
    SequenceClassification,
    SpanCorruption,
)
from jaxpt.optimizers import AdamW, Cosine
from jaxpt.run import Phase, Run
from jaxpt.sparsity import RigL
from jaxpt.weights import Dense, LowRank, Masked

MODEL = Transformer(
    width=16, layers=2, attention=Attention(heads=2), mlp=MLP(width=32), vocab_multiple=8
)
TEXT = Markov(order=1, symbols=12, length=300)
OTHER = Markov(order=2, symbols=12, length=200, seed=1)
LEARNT = Mixture(parts=((TEXT, 1.0), (OTHER, 1.0)), names=("one", "two"), policy=ODM())
EVALUATIONS, SAVES = 5, 3  # steps of a phase between two of them


def tiny(objective: Objective, steps: int, model: Transformer = MODEL, **phase) -> Run:
    """One phase on one device; batches are made by a thread."""
    two = model.kind == "encoder_decoder"
    own = {
        "steps": steps,
        "data": TEXT,
        "objective": objective,
        "optimizer": AdamW(lr=1e-2, schedule=Cosine()),
        "batch": 8,
        "length": 32,
        "target_length": 24 if two else None,
    }
    return Run(
        model=model,
        phases=(Phase(**own | phase),),
        tokenizer=Bytes(),
        evaluate=Evaluate(every=EVALUATIONS, batches=2, samples=0),
        checkpoint=Checkpoint(every=SAVES),
        monitor=Monitor(every=1, console="off", tensorboard=False),
        loader=Loading(window=8),
        mesh=Mesh(devices=1),
    )


def encoder(**own) -> Transformer:
    return dataclasses.replace(MODEL, kind="encoder", **own)


def with_workers(run: Run) -> Run:
    """Batches are made by two processes."""
    return dataclasses.replace(run, loader=Loading(window=8, workers=2))


def masks(steps: int) -> Run:
    """RigL exchanges entries of masks every second step; dropout's key goes on, too."""
    model = dataclasses.replace(
        MODEL, dropout=0.1, weights=(("*/mlp/*", Masked(0.25)), ("*", Dense()))
    )
    return tiny(CausalLM(), steps, model, updates=(RigL(every=2, stop=steps, drop=0.5),))


def mixing(steps: int) -> Run:
    """Two domains, whose weights follow the losses."""
    return tiny(CausalLM(), steps, data=LEARNT)


def phases(steps: int) -> Run:
    """Causal; then deeper, with a prefix, an average and workers' batches of another shape."""
    run = tiny(CausalLM(), steps // 2)
    second = dataclasses.replace(
        run.phases[0],
        name="second",
        steps=steps - steps // 2,
        model=dataclasses.replace(MODEL, layers=4),
        begin=(Stack(),),
        keep_optimizer=False,
        objective=PrefixLM(),
        batch=4,
        length=48,
        updates=(Average(decay=0.9),),
    )
    return with_workers(dataclasses.replace(run, phases=(run.phases[0], second)))


def everything(steps: int) -> Run:
    """Masks that change, domains that follow the losses; then a prefix and an average."""
    run = masks(steps // 2).replace(**{"model.layers": 1, "data": LEARNT})
    second = dataclasses.replace(
        run.phases[0],
        name="second",
        steps=steps - steps // 2,
        objective=PrefixLM(),
        batch=4,
        length=48,
        updates=(Average(decay=0.9),),
    )
    return dataclasses.replace(run, phases=(run.phases[0], second))


def distilled(steps: int) -> Run:
    """A dense model; its low-rank approximation learns from it; that goes on alone (PELA)."""
    cut = LowRank(rank=0.4)
    student = dataclasses.replace(MODEL, weights=(("*/mlp/*", cut), ("*", Dense())))
    run = tiny(CausalLM(), steps // 3)
    first = run.phases[0]
    again = {"keep_optimizer": False}
    second = dataclasses.replace(
        first,
        name="pela",
        model=Distilled(student=student, teacher=MODEL),
        begin=(Convert(),),
        objective=PELA(CausalLM()),
        **again,
    )
    third = dataclasses.replace(
        first,
        name="alone",
        steps=steps - 2 * (steps // 3),
        model=student,
        begin=(Keep("student"),),
        **again,
    )
    return dataclasses.replace(run, phases=(first, second, third))


def labelled(steps: int) -> Run:
    """Masked words, then a head that tells which of two sentences comes first."""
    run = tiny(MaskedLM(), steps // 2, encoder(), data=Corpus())
    second = dataclasses.replace(
        run.phases[0],
        name="finetune",
        steps=steps - steps // 2,
        model=headed(encoder(), classes=2),
        begin=(Keep(fresh=("head*",)),),
        keep_optimizer=False,
        data=SentenceOrder(),
        objective=SequenceClassification(classes=2),
        length=64,
    )
    return dataclasses.replace(run, phases=(run.phases[0], second))


def electra(steps: int) -> Run:
    own = {"kind": "encoder", "layers": 1, "attention": Attention(heads=2), "vocab_multiple": 8}
    generator = Transformer(width=8, tied=True, head_transform=True, output_bias=True, **own)
    model = Electra(generator, Discriminator(width=16, **own))
    return tiny(ReplacedTokens(), steps).replace(model=model)


def blanks(steps: int) -> Run:
    model = dataclasses.replace(MODEL, positions=Learned(64), inner_positions=64, scan=False)
    return tiny(BlankInfilling(), steps, model)


def middle(steps: int) -> Run:
    marks = Bytes(modes=("PRE", "SUF", "MID"))
    return tiny(FillInTheMiddle(), steps).replace(tokenizer=marks)


BOTH = dataclasses.replace(MODEL, kind="encoder_decoder")
# Name -> the run of so many steps.
CASES = {
    "causal": lambda steps: with_workers(tiny(CausalLM(), steps)),
    "prefix": lambda steps: tiny(PrefixLM(), steps),
    "masked": lambda steps: tiny(MaskedLM(), steps, encoder()),
    "spans": lambda steps: tiny(SpanCorruption(), steps, BOTH),
    "ul2": lambda steps: with_workers(tiny(UL2(), steps, BOTH)),
    "ul2-decoder": lambda steps: tiny(UL2(), steps),
    "on-device": lambda steps: tiny(OnDevice(SpanCorruption()), steps, BOTH),
    "middle": middle,
    "blanks": blanks,
    "electra": electra,
    "labelled": labelled,
    "distilled": distilled,
    "phases": phases,
    "masks": masks,
    "mixing": mixing,
    "everything": everything,
}


def of_processes(run: Run, processes: int) -> Run:
    """The run on a device of each of so many processes."""
    return dataclasses.replace(run, mesh=Mesh(data=processes)) if processes > 1 else run
