"""Loading of annotators by `--with NAME|module:factory`, and their identity."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flux_batch.config.factory import FACTORY, check_options, imported
from flux_batch.dataset.annotators.checked import CheckedAnnotator
from flux_batch.errors import FluxBatchError, JobError, did_you_mean, one_line
from flux_batch.redaction import public_tree

# Annotators are imported when they are opened, since some need a model's libraries.
_PACKAGE = "flux_batch.dataset.annotators"
BUILT_IN: Mapping[str, str] = {
    "phash": f"{_PACKAGE}.pixels:PerceptualHash",
    "sharpness": f"{_PACKAGE}.pixels:Sharpness",
    "exposure": f"{_PACKAGE}.pixels:Exposure",
    "facts": f"{_PACKAGE}.facts:Facts",
    "clip": f"{_PACKAGE}.clip:Clip",
    "aesthetic": f"{_PACKAGE}.clip:Aesthetic",
    "safety": f"{_PACKAGE}.safety:Safety",
    "caption": f"{_PACKAGE}.vision:Caption",
    "ask": f"{_PACKAGE}.vision:Ask",
}
_OPTION_HINT = "--set key=value"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class AnnotatorSpec:
    """An annotator to open: its name in the output, a built-in name or `module:factory`, and its options.

    `folder`: where its module is also searched: the folder in which the command runs.
    """

    name: str
    annotator: str
    options: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""

    def __post_init__(self) -> None:
        if self.annotator not in BUILT_IN and not FACTORY.fullmatch(self.annotator):
            raise JobError(
                f"{self.annotator}: is not an annotator; it must be {', '.join(sorted(BUILT_IN))}, or module:factory"
                f"{did_you_mean(self.annotator, BUILT_IN)}"
            )
        if not _NAME.fullmatch(self.name):
            raise JobError(f"{self.name!r}: cannot name an annotation; use letters, digits, `_` and `-`")
        try:
            json.dumps(self.options)
        except (TypeError, ValueError) as error:
            raise JobError(f"{self.name}: its options must be plain values: {one_line(error)}") from error

    @classmethod
    def parse(cls, text: str, options: Mapping[str, Any] | None = None) -> AnnotatorSpec:
        """Parse [NAME=]ANNOTATOR; the default name is that of the annotator. Raises: JobError."""
        name, _, annotator = text.rpartition("=")
        name = name or annotator.rpartition(":")[2].rpartition(".")[2]
        return cls(name=name, annotator=annotator, options=dict(options or {}), folder=os.getcwd())

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the identity that is known before the annotator is open."""
        return {
            "annotator": self.annotator,
            "options": json.loads(json.dumps(public_tree(dict(self.options), "options"))),
        }


@dataclass(frozen=True)
class OpenAnnotator:
    """A loaded annotator, and the identity that its results depend on."""

    spec: AnnotatorSpec
    checked: CheckedAnnotator
    identity: Mapping[str, Any]


def parse_specs(texts: Iterable[str], options: Mapping[str, Any]) -> list[AnnotatorSpec]:
    """Parse every `--with` and its `--set`: `NAME.key`, or `key` if there is only one annotator. Raises: JobError."""
    specs = [AnnotatorSpec.parse(text) for text in texts]
    names = [spec.name for spec in specs]
    if not specs:
        raise JobError(f"--with: name an annotator: {', '.join(sorted(BUILT_IN))}, or module:factory")
    if twice := [name for name in names if names.count(name) > 1]:
        raise JobError(f"--with {twice[0]}: is there twice; give one another name, as in --with other={twice[0]}")
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in options.items():
        owner, _, option = key.rpartition(".")
        owner = owner or (names[0] if len(names) == 1 else "")
        if owner not in given:
            raise JobError(f"--set {key}: must begin with the name of an annotator: {', '.join(names)}")
        given[owner][option] = value
    return [AnnotatorSpec.parse(text, given[name]) for text, name in zip(texts, names, strict=True)]


def changing_options(spec: AnnotatorSpec, names: Collection[str]) -> set[str]:
    """Return the named options that change results; an empty set if only an open annotator can show it.

    That is so if a function makes the annotator, or if only the workers have its packages.
    Raises: JobError for an option that the annotator does not have.
    """
    if not names:
        return set()
    try:
        factory = _imported(spec)
    except JobError:
        return set()
    check_options(factory, spec.options, spec.annotator, _OPTION_HINT)
    return set(names) - getattr(factory, "execution_options", frozenset()) if isinstance(factory, type) else set()


def check_factory(spec: AnnotatorSpec, hint: str = _OPTION_HINT) -> Callable[..., Any]:
    """Return the factory of an annotator. Raises: JobError if it cannot be imported, or lacks these options.

    hint: the way to set an option, for the message.
    """
    factory = _imported(spec)
    check_options(factory, spec.options, spec.annotator, hint)
    return factory


def _imported(spec: AnnotatorSpec) -> Callable[..., Any]:
    return imported(BUILT_IN.get(spec.annotator, spec.annotator), spec.folder, "an annotator")


def open_annotator(spec: AnnotatorSpec) -> OpenAnnotator:
    """Import and open an annotator. Raises: JobError if that fails; errors of this package pass through."""
    factory = check_factory(spec)
    try:
        annotator = factory(**spec.options)
    except FluxBatchError:
        raise
    except Exception as error:  # a user's code raises anything
        raise JobError(
            f"{spec.name}: {spec.annotator} cannot be opened: {type(error).__name__}: {one_line(error)}"
        ) from error
    checked = CheckedAnnotator(annotator, spec.name)
    execution: frozenset[str] = getattr(annotator, "execution_options", frozenset())
    identity = {
        **spec.identity,
        "version": str(getattr(annotator, "version", "1")),
        "revision": getattr(annotator, "revision", None),
        "columns": {column.name: str(column.type) for column in checked.columns},
    }
    identity["options"] = {key: value for key, value in identity["options"].items() if key not in execution}
    return OpenAnnotator(spec, checked, identity)
