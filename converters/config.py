"""Conversion settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from mmedge.bundle.tuning import Objective
from mmedge.converters.methods.recipes import Recipe, parse_recipe
from mmedge.errors import ConversionError
from mmedge.specs import Precision, did_you_mean

__all__ = [
    "AUTO",
    "HEAD_FILE",
    "TARGETS",
    "ConvertConfig",
    "JpegDraft",
    "check_head_options",
    "recipes",
    "reject_search_options",
    "short_names",
]


JpegDraft: TypeAlias = Literal["off", "auto"]

_SETS: dict[tuple[str, str], tuple[str, ...]] = {
    ("cpu", "int8"): ("int8-dynamic", "int8-static"),
    ("tensorrt", "int8"): ("int8-static-symmetric-half",),
    ("tensorrt", "fp8"): ("fp8-half",),
    ("tensorrt", "int4"): ("int4-blocked-half",),
}
"""Precisions of each short name, by target; int8-static only with calibration data."""
HEAD_FILE = "head.json"
"""What describes a head in its folder."""
AUTO = "auto"
"""The precision that starts a search."""
TARGETS = ("cpu", "tensorrt")


@dataclass(frozen=True)
class ConvertConfig:
    """Settings of a conversion.

    Attributes:
        source: A folder, or a hub id.
        out: The bundle to write; its name ends in ".mmedge".
        precisions: Names of recipes (see recipes.py), "int8" for int8-dynamic and, with calibration
            data, int8-static. "ROLE:NAME" is for one role, and replaces the general list; a
            name alone applies to all other roles. "auto" alone searches.
        revision: Branch, tag or commit of a hub repository.
        merge_adapter: Merge the LoRA adapter beside the weights.
        calibration: Images (and captions) for calibration.
        evaluate: Images with captions or labels for evaluation; never the calibration
            data. None measures on synthetic samples.
        targets: What the graphs are made for: "cpu", "tensorrt" for engines, or both.
        default: Variant or precision that `load` uses by default, or several as in
            "int8,text_encoder:fp16"; None chooses the fastest within the accuracy budget.
        template: How a label becomes a text for zero-shot accuracy, "{}" standing for the label.
        overwrite: Overwrite an existing bundle.
        skip_bad: Skip unreadable images instead of stopping.
        seed: Random seed.
        explain: Measure the sensitivity of each layer.
        max_drop: For "auto": largest allowed drop of the metric.
        metric: For "auto": a name in evaluation.metrics.METRICS; None takes recall@1 where the
            evaluation data has captions, zero-shot or accuracy where it has labels, and else
            class-agreement of classifiers, or cosine-p1.
        objective: For "auto": what is to be made small.
        taps: Hidden states that become outputs of the encoders, for heads: "patches", "tokens",
            "patches@2" behind the second block.
        jpeg_draft: "auto" decodes large JPEG files at a fraction of their size if that loses no
            more than the accuracy budget on the evaluation data; "off" decodes them whole.
    """

    source: str
    out: Path
    precisions: tuple[str, ...] = ("fp32",)
    revision: str | None = None
    merge_adapter: bool = False
    calibration: Path | None = None
    evaluate: Path | None = None
    targets: tuple[str, ...] = ("cpu",)
    default: str | None = None
    template: str = "a photo of a {}"
    overwrite: bool = False
    skip_bad: bool = False
    seed: int = 0
    explain: bool = False
    max_drop: float = 0.01
    metric: str | None = None
    objective: Objective = "latency"
    jpeg_draft: JpegDraft = "off"
    taps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("out", "calibration", "evaluate"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path))  # callers outside mypy pass a str
        for target in self.targets:
            if target not in TARGETS:
                raise ConversionError(
                    f"Unknown target: got '{target}', expected one or more of "
                    f"{', '.join(TARGETS)}." + did_you_mean(target, TARGETS)
                )
        if self.jpeg_draft not in get_args(JpegDraft):
            raise ConversionError(
                f"--jpeg-draft: got '{self.jpeg_draft}', expected "
                f"{' or '.join(get_args(JpegDraft))}."
            )
        if not self.precisions:
            raise ConversionError("No precision: name one or more, such as fp32,int8.")
        if self.searches:
            self._check_search()
        else:
            self._check_no_search()
        named = recipes(self)
        if not self.searches and self.default is not None:
            _require_default([name for _, name in self._defaults], named)
        for recipe in named:
            if recipe.needs_calibration and self.calibration is None:
                raise ConversionError(
                    f"{recipe.variant} needs calibration data. Pass --calibration FOLDER with "
                    "images like those seen on the device (and captions.jsonl for the text "
                    "encoder)."
                )
        if self.explain and self.calibration is None:
            raise ConversionError(
                "--explain measures each layer on calibration data. Pass --calibration FOLDER."
            )
        if "{}" not in self.template:
            raise ConversionError(
                f"Template '{self.template}' has no place for the label. Put {{}} there, as in "
                f"'{ConvertConfig.template}'."
            )

    @property
    def searches(self) -> bool:
        """Whether the precision is searched for."""
        return any(precision.rpartition(":")[2] == AUTO for precision in self.precisions)

    def of_role(self, role: str) -> tuple[str, ...]:
        """Return the precisions of a role: its own, else the general ones.

        Raises:
            ConversionError: If there are none.
        """
        split = [precision.rpartition(":") for precision in self.precisions]
        own = tuple(name for named, _, name in split if named == role)
        found = own or tuple(name for named, _, name in split if not named)
        if not found:
            raise ConversionError(
                f"No precision for {role}: got '{','.join(self.precisions)}'. Name one for it, as "
                f"in {role}:fp32, or one without a role, which is for all that have none of their "
                "own."
            )
        return found

    def default_of(self, role: str) -> str | None:
        """Return the default that is named for a role, else the one for all."""
        named = dict(self._defaults)
        return named.get(role, named.get(""))

    @property
    def _defaults(self) -> list[tuple[str, str]]:
        parts = [] if self.default is None else self.default.split(",")
        return [(role, name) for role, _, name in (part.strip().rpartition(":") for part in parts)]

    def require_roles(self, roles: Iterable[str]) -> None:
        """Check that precisions and defaults name existing roles.

        Raises:
            ConversionError: If they name another, or a role has no precision.
        """
        known = tuple(roles)
        defaults = (f"{role}:{name}" for role, name in self._defaults if role)
        for named in (*self.precisions, *defaults):
            role, separator, _ = named.rpartition(":")
            if separator and role not in known:
                raise ConversionError(
                    f"'{named}': the model has no role '{role}', but {', '.join(known)}."
                    + did_you_mean(role, known)
                )
        for role in known:
            self.of_role(role)

    def _check_no_search(self) -> None:
        of_search = {
            "--max-drop": self.max_drop != ConvertConfig.max_drop,
            "--metric": self.metric is not None,
            "--objective": self.objective != ConvertConfig.objective,
        }
        reject_search_options(
            [option for option, given in of_search.items() if given], self.precisions
        )

    def _check_search(self) -> None:
        if self.precisions != (AUTO,):
            raise ConversionError(
                f"Precision auto cannot be combined: got '{','.join(self.precisions)}'. The search "
                "tries all precisions, for every role."
            )
        if self.targets != ("cpu",):
            raise ConversionError(
                "Precision auto measures on this machine, which runs no TensorRT graphs. "
                "Name the precisions, or search for the CPU."
            )
        if self.default is not None:
            raise ConversionError(
                f"--default {self.default}: precision auto chooses the default itself. Leave "
                "--default out, or name the precisions."
            )
        if self.objective not in get_args(Objective):
            raise ConversionError(
                f"Unknown objective: got '{self.objective}', expected one of "
                f"{', '.join(get_args(Objective))}."
                + did_you_mean(self.objective, get_args(Objective))
            )
        if not 0.0 <= self.max_drop < 1.0:
            raise ConversionError(
                f"--max-drop: got {self.max_drop}, expected a share of the metric from 0 to 1, "
                "such as 0.01."
            )


def _require_default(defaults: Sequence[str], named: Sequence[Recipe]) -> None:
    names = [recipe.variant for recipe in named]
    for default in {*defaults} - {*names, *(recipe.precision.value for recipe in named)}:
        raise ConversionError(
            f"--default: got '{default}', expected one of the precisions that are made, "
            f"{', '.join(names)}." + did_you_mean(default, names)
        )


def reject_search_options(options: Sequence[str], precisions: Sequence[str]) -> None:
    """Reject search options without a search.

    Args:
        options: Those that were given.
        precisions: What was named.

    Raises:
        ConversionError: If there is any.
    """
    if options:
        raise ConversionError(
            f"{', '.join(options)}: for --precision auto, which searches. What is named, "
            f"'{','.join(precisions)}', is made whatever it loses. Leave one of the two out."
        )


def short_names(targets: Iterable[str]) -> frozenset[str]:
    """Return the short names, by target."""
    return frozenset({AUTO, *(name for known, name in _SETS if known in set(targets))})


def recipes(config: ConvertConfig, role: str | None = None) -> tuple[Recipe, ...]:
    """Return the named recipes, highest precision first; none for a search.

    Args:
        config: The configuration.
        role: For one role; None returns those of all.

    Raises:
        ConversionError: If a name is unknown, or the role has none.
    """
    if role is None:
        names = tuple(precision.rpartition(":")[2] for precision in config.precisions)
    else:
        names = config.of_role(role)
    found: dict[str, Recipe] = {}
    for precision in names:
        if precision == AUTO:
            continue
        sets = {target: _SETS.get((target, precision)) for target in config.targets}
        for target, short in sets.items():
            for name in short or (precision,):
                recipe = parse_recipe(name)
                if short and target == "cpu" and not _has_data(recipe, config):
                    continue
                found[recipe.variant] = recipe
    order = list(Precision)
    return tuple(sorted(found.values(), key=lambda recipe: order.index(recipe.precision)))


def _has_data(recipe: Recipe, config: ConvertConfig) -> bool:
    return config.calibration is not None or not recipe.needs_calibration


def check_head_options(config: ConvertConfig, on: Sequence[Path], *, fuse: bool) -> bool:
    """Return whether the source is a head, and check that it has an encoder.

    Args:
        config: The configuration.
        on: Bundles of encoders that were given.
        fuse: Whether one graph is wanted.

    Raises:
        ConversionError: If a head has no encoder, or another model has one.
    """
    is_head = (Path(config.source) / HEAD_FILE).is_file()
    if is_head and not on:
        raise ConversionError(
            f"{config.source} is a head. Name the bundle of the encoder that it reads: --on BUNDLE."
        )
    if not is_head and (on or fuse):
        raise ConversionError(
            f"--on and --fuse are for heads, but {config.source} has no {HEAD_FILE}. Leave them "
            "out, or see docs/heads.md."
        )
    return is_head
