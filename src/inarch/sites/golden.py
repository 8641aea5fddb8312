"""Layouts that are shipped: what a probe found once, for the models for which nothing that could change it has changed.

A file `layouts/<model_type>.json` is found because it is there. It holds one record: a layout, its paths relative to
the base model, and what it was made from. It is valid for a model only if

* the model is of a class of the record, with the same tree of modules: paths, classes, and shapes inside the base;
* every file that defines one of those modules has the text that it had;
* the configuration is the same, apart from what cannot change an architecture (`_IGNORED`).

Anything else is probed. `make` makes such a record, `differences` compares what two probes found.
"""

import hashlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import SiteError
from ..core.site import Site, Sites
from .taps import is_idle

FOLDER = Path(__file__).parent / "layouts"
FORMAT = 1

_IGNORED = re.compile(
    # what the model is called, and what wrote it
    r"_?name_or_path|architectures|transformers_version|dtype|torch_dtype|tokenizer_class|_commit_hash"
    # what a forward is asked for besides its result
    r"|output_attentions|output_hidden_states|return_dict|use_cache|gradient_checkpointing"
    # labels, heads and losses
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|summary_\w+|classifier_\w+"
    # vocabularies: sizes of embeddings, whose shapes are left out too
    r"|vocab_size|\w+_token_ids?|(begin_)?suppress_tokens|tie_word_embeddings"
    # numbers that say how much, not what: initial values, epsilons, masks in training
    r"|initializer_\w+|init_std|\w*(_eps|epsilon)|apply_spec_augment|mask_(time|feature)_\w+"
)
"""Names of configuration fields, at any depth, that do not change where residual branches are."""

_RATES = re.compile(r"\w*(dropout|pdrop|layerdrop|drop_path)\w*")
"""Names of probabilities: whether one is zero may move a tap, before or behind the dropout, but not how large it is."""


def find(model: nn.Module) -> Sites | None:
    """The shipped layout of a model; None if there is none, or none that is valid.

    Raises `SiteError` that names the file if it cannot be read.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    path = file_of(model_type) if isinstance(model_type, str) else None
    return None if path is None or not path.is_file() else read(path).fit(model)


def file_of(model_type: str) -> Path | None:
    """Where the layout of a model type is shipped; None for what is no name of a file."""
    return FOLDER / f"{model_type}.json" if re.fullmatch(r"[\w-]+", model_type) else None


@dataclass(frozen=True, slots=True)
class Record:
    """A layout and what it was made from."""

    sites: Sites
    """Of the base model."""
    classes: Mapping[str, tuple[str, str]]
    """By class of model: the path of the base model in it, and the digest of its tree of modules."""
    files: Mapping[str, str]
    """The digest of each source file, by the name of the Python module."""
    config: Mapping[str, Any]
    made_with: Mapping[str, str]
    """Versions of libraries, for the reader."""

    def fit(self, model: nn.Module) -> Sites | None:
        """The sites of a model; None if the record was made from something else."""
        prefix, structure = self.classes.get(type(model).__name__, ("", ""))
        texts = _sources(model) if structure else None
        if (
            texts is None
            or any(self.files.get(name) != _digest(text) for name, text in texts.items())
            or structure != _structure(model, prefix)
            or not _same_config(self.config, _plain_config(model), texts)
        ):
            return None
        return replace(self.at(prefix), model_class=type(model).__name__, source="golden")

    def at(self, prefix: str) -> Sites:
        """The sites where the base model is at a path."""
        return _moved(self.sites, prefix)

    def changed_files(self) -> list[str]:
        """The Python modules whose source is not what the record was made from. Imports none of them."""
        return [name for name, digest in self.files.items() if _digest_of_module(name) != digest]

    def to_dict(self) -> dict[str, Any]:
        """JSON data, as a file holds it."""
        return {
            "format": FORMAT,
            "made_with": dict(self.made_with),
            "classes": {name: list(known) for name, known in self.classes.items()},
            "files": dict(self.files),
            "config": self.config,
            "layout": self.sites.to_dict(),
        }


def _moved(sites: Sites, prefix: str) -> Sites:
    paths = (".".join(part for part in (prefix, site.layer_path) if part) for site in sites)
    return replace(sites, sites=tuple(replace(site, layer_path=path) for site, path in zip(sites, paths, strict=True)))


# -------------------------------------------------------------------- making and comparing


def make(model: nn.Module, sites: Sites, tasks: Sequence[tuple[nn.Module, Sites]] = ()) -> Record:
    """The record of a base model.

    **Arguments**: `sites` is what a fresh probe found in it. `tasks` are models with heads around the same base, each
    with what a fresh probe found in it; the record is made for those of which the base's layout is the whole truth.

    Raises `SiteError` for a model of whose modules the source or the configuration cannot be read.
    """
    texts = _sources(model)
    if texts is None or getattr(model, "config", None) is None:
        raise SiteError(
            "A shipped layout is of a model with a configuration and with modules from source files, unchanged at run "
            f"time; got {type(model).__name__}. Leave it to the probe."
        )
    config = _plain_config(model)
    classes = {type(model).__name__: ("", _structure(model, ""))}
    for task, found in tasks:
        of_task = _sources(task)
        # Some models with heads hold the base model, some have its parts as their own.
        prefixes = [p for p in (getattr(task, "base_model_prefix", ""), "") if not differences(_moved(sites, p), found)]
        if prefixes and of_task is not None and _same_config(config, _plain_config(task), of_task):
            texts = texts | of_task
            classes[type(task).__name__] = (prefixes[0], _structure(task, prefixes[0]))
    files = {name: _digest(text) for name, text in sorted(texts.items())}
    made_with = {name: version(name) for name in ("transformers", "torch")}
    return Record(sites, classes, files, config, made_with)


def differences(expected: Sites, found: Sites) -> list[str]:
    """What two layouts of one model disagree in, one sentence for each site; empty if in nothing."""
    old, new = ({site.key: site for site in sites} for sites in (expected, found))
    problems = [f"site `{key}` is gone" for key in old if key not in new]
    problems += [f"site `{key}` is new" for key in new if key not in old]
    for key in old.keys() & new.keys():
        changed = [
            f"`{field.name}` was {getattr(old[key], field.name)!r} and is {getattr(new[key], field.name)!r}"
            for field in fields(Site)
            if getattr(old[key], field.name) != getattr(new[key], field.name)
        ]
        problems += [f"at site `{key}` {'; '.join(changed)}"] if changed else []
    if not problems and list(old) != list(new):
        problems.append("the sites run in another order")
    if expected.refused != found.refused:
        problems.append(f"refused was {list(expected.refused)} and is {list(found.refused)}")
    return sorted(problems)


def _digest_of_module(name: str) -> str | None:
    root = importlib.util.find_spec(name.partition(".")[0])
    for folder in (root.submodule_search_locations or ()) if root is not None else ():
        path = Path(folder).joinpath(*name.split(".")[1:]).with_suffix(".py")
        if path.is_file():
            return _digest(_text(str(path)))
    return None


# -------------------------------------------------------------------- reading


def read(path: Path) -> Record:
    """The record in a file. Raises `SiteError` that names the file if it holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return _record(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SiteError) as error:
        raise SiteError(
            f"A shipped layout is a record of format {FORMAT}, as inarch installs it; got {type(error).__name__}: "
            f"{error} at `{path}`. Install inarch again, or remove the file, and the model is probed."
        ) from error


def _record(data: Mapping[str, Any]) -> Record:
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']!r}")
    return Record(
        sites=Sites.from_dict(data["layout"]),
        classes={name: (str(prefix), str(structure)) for name, (prefix, structure) in data["classes"].items()},
        files=dict(data["files"]),
        config=dict(data["config"]),
        made_with=dict(data["made_with"]),
    )


# -------------------------------------------------------------------- what a layout depends on


def _sources(model: nn.Module) -> dict[str, str] | None:
    """The text of every file that defines a module of the model or its forward, torch's own left out, by the name of
    the Python module. None where one cannot be read, or an instance has a forward of its own."""
    texts: dict[str, str] = {}
    if any("forward" in module.__dict__ for module in model.modules()):
        return None
    for kind in {type(module) for module in model.modules()}:
        for name, path in _files(kind):
            if path is None:
                return None
            try:
                texts[name] = _text(path)
            except (OSError, ValueError):
                return None
    return texts


def _files(kind: type[nn.Module]) -> Iterator[tuple[str, str | None]]:
    """The files that define a class and its forward; the latter from its code, as a forward may have been replaced."""
    if not _is_torch(kind.__module__):
        yield kind.__module__, getattr(sys.modules.get(kind.__module__), "__file__", None)
    forward: Any = inspect.unwrap(kind.forward)
    code = getattr(forward, "__code__", None)
    place = getattr(forward, "__globals__", {}).get("__name__", "?")
    if not _is_torch(place):
        yield place, code.co_filename if code is not None else None


def _is_torch(module: str) -> bool:
    return module.partition(".")[0] == "torch"


@cache
def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _structure(model: nn.Module, prefix: str) -> str:
    """A digest of the tree of modules: paths, classes, whether they do nothing, and inside the base the shapes of all
    but embeddings."""
    lines = []
    inside = f"{prefix}." if prefix else ""
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        lines.append(f"{path} {kind.__module__}.{kind.__qualname__}{' idle' * is_idle(module)}")
        if f"{path}.".startswith(inside) and not isinstance(module, nn.Embedding):
            lines += [
                f"{name} {tuple(parameter.shape)}"
                for name, parameter in module._parameters.items()  # the module's own, which `parameters` walks for
                if parameter is not None
            ]
    return _digest("\n".join(lines))


def _plain_config(model: nn.Module) -> Any:
    """The configuration as JSON data, without what is ignored."""
    return _stripped(json.loads(json.dumps(model.config.to_dict(), default=str)))  # type: ignore[operator, union-attr]


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: item for name, item in sorted(value.items()) if not _IGNORED.fullmatch(name)}
        return {name: bool(item) if _RATES.fullmatch(name) else _stripped(item) for name, item in kept.items()}
    return [_stripped(item) for item in value] if isinstance(value, list) else value


def _same_config(recorded: Any, present: Any, texts: Mapping[str, str]) -> bool:
    """Whether two configurations agree. A field that only the present one has must be one that no file mentions: old
    checkpoints are full of those."""
    if not isinstance(recorded, dict) or not isinstance(present, dict):
        return bool(recorded == present)
    if any(name not in present or not _same_config(value, present[name], texts) for name, value in recorded.items()):
        return False
    extra = [name for name in present if name not in recorded]
    return not any(re.search(rf"\b{re.escape(name)}\b", text) for name in extra for text in texts.values())
