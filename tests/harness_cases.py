"""A few questions as local tasks of lm_eval: choices, whole texts, and texts up to a stop."""

import json
import pathlib

CHOICES = [
    {
        "context": "the model reads a",
        "choices": ["stretch of text", "taken out", "says"],
        "gold": 0,
    },
    {"context": "what comes", "choices": ["next", "of", "reads a stretch of it"], "gold": 0},
    {"context": "text and says what was", "choices": ["out", "taken", "or"], "gold": 1},
    {"context": "it", "choices": ["was", "model", "the model reads"], "gold": 2},
    {"context": "", "choices": ["the model", "what", "stretch"], "gold": 0},
]
TEXTS = [{"text": "the model reads a stretch of text"}, {"text": "what comes next " * 9}]
COMMON = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
TASKS = {
    "choices": (
        CHOICES,
        """output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
""",
    ),
    "whole": (
        TEXTS,
        """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
""",
    ),
    "written": (
        CHOICES[:4],
        """output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until:
    - "e"
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
    ),
}


def write_tasks(folder: pathlib.Path) -> pathlib.Path:
    """The tasks' files, in a folder for ``include_path``."""
    folder.mkdir(parents=True)
    for name, (records, config) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        text = COMMON.format(name=f"jaxpt_{name}", data=data) + config
        (folder / f"{name}.yaml").write_text(text)
    return folder


NAMES = tuple(f"jaxpt_{name}" for name in TASKS)
