"""The flags of each command of ``jaxpt`` beside those of the run."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TrainFlags:
    workdir: str | None = None  # the run's folder; None: runs/ and the config file's name
    dry_run: bool = False  # print what would be trained, tensor by tensor, and stop
    restart: bool = False  # begin again from step 0 where the folder holds no checkpoint yet
    # folder of a run to make again from what it holds, in the place of CONFIG; --workdir is then
    # that folder's name and "-again", unless it is given
    from_run: str | None = None
    config: str | None = None  # that run's config file, where it has classes of its own
    # HOST:PORT of process 0, of several processes; SLURM, TPU pods and Open MPI need no flags
    coordinator: str | None = None
    processes: int | None = None  # how many processes train together
    process_id: int | None = None  # which of them this is, from 0


@dataclasses.dataclass(frozen=True)
class EvalFlags:
    split: Literal["train", "validation"] = "validation"  # which documents
    at_step: int | None = None  # the step to evaluate; None: the latest
    all_checkpoints: bool = False  # evaluate all that there are, into the run's folder probes/
    tasks: tuple[str, ...] = ()  # of lm_eval to ask instead (names, or a,b); extra: eval
    include_path: str | None = None  # folder of further tasks of lm_eval (YAML files)
    limit: int | None = None  # documents of each task; None: all
    fewshot: int | None = None  # examples in front of each question; None: the task's own number
    mode: str | None = None  # UL2 mode to announce to tasks (R, S, X); None: of what goes on
    max_length: int | None = None  # positions of a task's context; None: the model's own
    config: str | None = None  # the run's config file, where it has classes of its own
    json: bool = False  # print one JSON object


@dataclasses.dataclass(frozen=True)
class GenerateFlags:
    prompt: tuple[str, ...] = ()  # texts to go on from, or to fill in; each gives an output
    mode: str | None = None  # mode token to put first (R, S, X)
    max_tokens: int = 64  # at most so many new tokens
    temperature: float = 0.0  # of sampling; 0 takes the likeliest token each time
    top_k: int | None = None  # sample among the so many likeliest tokens
    top_p: float | None = None  # sample among the likeliest tokens of so much probability
    min_p: float | None = None  # sample among tokens of this share of the likeliest's probability
    beams: int = 1  # width of beam search, which above 1 takes the place of sampling
    samples: int = 1  # answers to each prompt
    seed: int = 0  # of sampling
    at_step: int | None = None  # the step to generate with; None: the latest
    config: str | None = None  # the run's config file, where it has classes of its own
    json: bool = False  # print one JSON object


@dataclasses.dataclass(frozen=True)
class BenchFlags:
    input_only: bool = False  # time the input pipeline alone
    warmup: int = 3  # steps before the clock starts
    timed: int = 20  # steps that are timed
    json: bool = False  # print one JSON object


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    # a chip (v4, v5e, v5p, v6e, h100, h200) and how many: v5e:4x4, v5p:2x2x1, h100:8
    topology: str | None = None
    share: float = 0.5  # of the chip's peak, which products of matrices are taken to reach
    search: bool = False  # try meshes, remat policies and batches, and rank those that fit
    batches: tuple[int, ...] = ()  # batches that the search tries; none: the config's
    limit: int = 12  # most programs that the search compiles
    json: bool = False  # print one JSON object


@dataclasses.dataclass(frozen=True)
class ShowFlags:
    count: int = 1  # how many examples of each task
    split: Literal["train", "validation"] = "train"  # which documents
    phase: str | None = None  # the phase whose data is shown; None: the first
    # the number in its phase of the only batch to show, from 1, as guard.jsonl has it
    at_batch: int | None = None
    json: bool = False  # print one JSON object


@dataclasses.dataclass(frozen=True)
class BuildFlags:
    # bytes, a tokenizer.json, a SentencePiece .model, or the folder of a saved tokenizer;
    # None: that of SOURCE, where it is a CONFIG
    tokenizer: str | None = None
    shards: int | None = None  # files of each split; None: by the source's size, at least 8
    workers: int | None = None  # processes; None: one a core
    deduplicate: bool = False  # leave out documents whose text occurs before in the same split
    validation: str | None = None  # files to validate on; None: a share of SOURCE is held out
    holdout: float | None = None  # share that is held out for validation; None: the source's own
    # what a document of text files is; None: a file
    document: Literal["file", "paragraph", "line"] | None = None
    field: str | None = None  # key, column or feature of the text; None: text
    train_split: str | None = None  # split to train on, of tfds: and hf:; None: train
    validation_split: str | None = None  # split to validate on, of tfds: and hf:; None: validation
    # what to do about documents that cannot be used; None: raise an error
    errors: Literal["raise", "skip"] | None = None
    json: bool = False  # print one JSON object


@dataclasses.dataclass(frozen=True)
class VerifyFlags:
    json: bool = False  # print one JSON object


@dataclasses.dataclass(frozen=True)
class LaunchFlags:
    workdir: str | None = None  # the run's folder, on a file system that all machines share
    job_name: str | None = None  # what the scheduler calls it; None: the config file's name
    out: str = "."  # folder that the files are written to
    json: bool = False  # print one JSON object


@dataclasses.dataclass(frozen=True)
class ListCheckpointsFlags:
    json: bool = False  # print one JSON object


@dataclasses.dataclass(frozen=True)
class VerifyCheckpointsFlags:
    at_step: int | None = None  # the step to verify; None: all
    json: bool = False  # print one JSON object


@dataclasses.dataclass(frozen=True)
class CleanCheckpointsFlags:
    # remove all but the so many newest, once the newest is verified; None: what was cut off or
    # set aside as damaged alone
    keep: int | None = None
    dry_run: bool = False  # say what would go, and remove nothing
    json: bool = False  # print one JSON object


@dataclasses.dataclass(frozen=True)
class ImportFlags:
    # type of the parameters; None: bfloat16 where all the files' are, else float32
    dtype: Literal["float32", "bfloat16"] | None = None
    json: bool = False  # print one JSON object


@dataclasses.dataclass(frozen=True)
class ExportFlags:
    to: str | None = None  # what to write: hf, a folder that transformers loads
    family: str | None = None  # its model_type, where several have such a model; None: the first
    dtype: Literal["float32", "bfloat16"] | None = None  # of the files; None: the parameters'
    shard_gigabytes: float = 5.0  # files of parameters are no longer than this
    keep_factors: bool = False  # write what is not held dense as it is, too: factors.safetensors
    network: str | None = None  # which network of a model of several; None: it is one
    at_step: int | None = None  # the step to export; None: the latest
    json: bool = False  # print one JSON object


@dataclasses.dataclass(frozen=True)
class MergeFlags:
    uniform: tuple[str, ...] = ()  # RUN or RUN@STEP each: the mean of their parameters
    greedy: tuple[str, ...] = ()  # the mean of those of them that make it better
    task_arithmetic: tuple[str, ...] = ()  # the first, and what the others have learnt beyond it
    scale: float = 1.0  # of what is learnt, for task arithmetic
    by: str | None = None  # NAME/FIGURE that the greedy mean is to raise; None: lower the loss
    json: bool = False  # print one JSON object


@dataclasses.dataclass(frozen=True)
class DoctorFlags:
    json: bool = False  # print one JSON object
