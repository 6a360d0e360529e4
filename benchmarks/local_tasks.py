"""Tasks in lm-evaluation-harness's format, as far as they can be read without it.

Generation tasks whose data are a local JSON-lines file and whose templates need no code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_compiler.errors import OptionInvalid

__all__ = ["MAX_NEW_TOKENS", "Item", "Task", "load_items", "load_task"]

MAX_NEW_TOKENS = 256
"""Of an answer, where a task does not say."""
_INSTALL = "Install lm_eval for such a task."


@dataclass(frozen=True)
class Task:
    """What is used of a task's YAML file.

    Args:
        name: of the task.
        data: its JSON-lines file.
        doc_to_text, doc_to_target: Jinja templates over the fields of a line.
        until, max_gen_toks: see `generate_until`.
    """

    name: str
    data: Path
    doc_to_text: str
    doc_to_target: str
    until: tuple[str, ...]
    max_gen_toks: int


@dataclass(frozen=True)
class Item:
    """One question and the answer that counts as right."""

    text: str
    target: str


def load_task(path: Path) -> Task:
    """Read a task in the harness's format, as far as `evaluate` serves it.

    Args:
        path: of the YAML file. Its data file is looked up from the working directory, as the
            harness does, then beside the YAML file.
    Raises:
        OptionInvalid: a field is missing or asks for what is not served here.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:  # !function, which runs code, ends here as well
        raise OptionInvalid("a task", "plain YAML", str(error), where=str(path)) from error
    served = {"output_type": "generate_until", "dataset_path": "json"}
    for field, wanted in served.items():
        if content.get(field) != wanted:
            raise OptionInvalid(
                f"{field} of a task", wanted, content.get(field), where=str(path), fix=_INSTALL
            )
    for field in ("doc_to_text", "doc_to_target", "task"):
        if not isinstance(content.get(field), str):
            raise OptionInvalid(
                f"{field} of a task", "text", content.get(field), where=str(path), fix=_INSTALL
            )
    for field in ("filter_list", "process_docs", "process_results", "num_fewshot"):
        if content.get(field):
            raise OptionInvalid(
                f"{field} of a task", "absent", content[field], where=str(path), fix=_INSTALL
            )
    kwargs = dict(content.get("generation_kwargs") or {})
    until = kwargs.pop("until", [])
    tokens = kwargs.pop("max_gen_toks", MAX_NEW_TOKENS)
    if kwargs.pop("do_sample", False) or kwargs.pop("temperature", 0.0) or kwargs:
        raise OptionInvalid(
            "generation_kwargs of a task",
            "until, max_gen_toks and greedy choice",
            content["generation_kwargs"],
            where=str(path),
            fix=_INSTALL,
        )
    return Task(
        name=content["task"],
        data=_data_file(content, path),
        doc_to_text=content["doc_to_text"],
        doc_to_target=content["doc_to_target"],
        until=(until,) if isinstance(until, str) else tuple(until),
        max_gen_toks=int(tokens),
    )


def _data_file(content: Mapping[str, Any], path: Path) -> Path:
    files = (content.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, Mapping):
        files = files.get(content.get("test_split", "test"))
    if not isinstance(files, str):
        raise OptionInvalid(
            "dataset_kwargs.data_files of a task",
            "one file for the test split",
            files,
            where=str(path),
            fix=_INSTALL,
        )
    for file in (Path(files), path.with_name(Path(files).name)):
        if file.is_file():
            return file
    raise OptionInvalid("the data file of a task", "a file", files, where=str(path))


def load_items(task: Task) -> Iterator[Item]:
    """The items of a task in file order; a template that names no field of a line is an error."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    text = environment.from_string(task.doc_to_text)
    target = environment.from_string(task.doc_to_target)
    for line in task.data.read_text(encoding="utf-8").splitlines():
        if line.strip():
            doc = json.loads(line)
            yield Item(text.render(**doc), target.render(**doc))
