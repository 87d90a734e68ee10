"""Base class of all kinds of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from mmedge.bundle.manifest import Manifest, Variant
from mmedge.bundle.opening import Bundle
from mmedge.closing import Closing
from mmedge.errors import InputError
from mmedge.notebook import html_table
from mmedge.preprocess.decode import MAX_PIXELS, Channels, ImageOptions
from mmedge.preprocess.registry import Processor, open_processor
from mmedge.preprocess.steps import Alpha
from mmedge.runtimes.selection.remembered import Choice
from mmedge.runtimes.session import Session
from mmedge.sessions.warming import WarmingState, WarmingUp
from mmedge.specs import Array, Modality

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from mmedge.models.running import Run
    from mmedge.preprocess.image import ImageProcessor
    from mmedge.preprocess.video import VideoProcessor
    from mmedge.runtimes.session import SessionOptions
    from mmedge.sessions.warming import WarmingReport

__all__ = ["Model", "Stages"]


@dataclass(frozen=True, slots=True)
class Stages:
    """An end-to-end call of a role and its stages, for the profile.

    Attributes:
        whole: The call that a user makes.
        parts: What it consists of, by name, in order; each can be called alone.
        input: What it is fed, in words.
    """

    whole: Callable[[], object]
    parts: Mapping[str, Callable[[], object]]
    input: str


class Model(Closing):
    """A loaded bundle. One subclass per kind; made by `mmedge.load`.

    Args:
        bundle: Where processors and files come from.
        sessions: By role name, all of the bundle's or some. They are closed with the model.
        variants: The variant that each of the sessions runs.
        choices: Why each of the sessions runs in its backend; None if not chosen.
        warming: What makes better sessions in the background; stopped with the model.

    Raises:
        BundleError: If a processor's file is missing or unusable.
    """

    kind: ClassVar[str]
    """The `type` of the manifest's kind."""

    def __init__(
        self,
        bundle: Bundle,
        sessions: Mapping[str, Session],
        variants: Mapping[str, Variant],
        choices: Mapping[str, Choice] | None = None,
        warming: WarmingUp | None = None,
    ) -> None:
        self._bundle = bundle
        self._sessions = dict(sessions)
        self._variants = dict(variants)
        self._choices = dict(choices or {})
        self._warming = warming
        self._reopen: Callable[[], Model] | None = None
        names = {name for role in sessions for name in bundle.manifest.processors_of(role)}
        self._processors: dict[str, Processor] = {
            name: open_processor(bundle.manifest.processors[name], bundle.path) for name in names
        }

    @classmethod
    def load(  # noqa: PLR0913, all that a user may choose
        cls,
        path: Path | str,
        *,
        device: str | None = None,
        precision: str | Mapping[str, str] | None = None,
        backend: str | None = None,
        roles: Sequence[str] | None = None,
        options: SessionOptions | None = None,
        measure: bool | None = None,
        warm: str | None = None,
        warming_report: WarmingReport | None = None,
        channels: Channels = "rgb",
        alpha: Alpha | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> Self:
        """Load a bundle of this kind; `mmedge.load` accepts any kind.

        Where several installed backends can run a role, the first load on a machine measures which
        is the fastest, a second or two for each role and in memory for all of them at once, and
        remembers it in the cache folder ($MMEDGE_CACHE_DIR, else ~/.cache/mmedge); later loads
        open that one alone. Naming the backend measures nothing, nor does `measure=False`.
        `Model.choices` says what runs and why.

        Args:
            path: The bundle's folder.
            device: "cpu", "cuda" or "cuda:N"; "gpu" is another word for "cuda". None takes the
                device of `options`, and without these the best that the backend has here; with no
                backend named, the first installed one.
            precision: A precision ("int8": the first variant that has it, which is the one of
                highest fidelity), the exact name of a variant ("int8-dynamic"), or one of these
                for each role, by role name. None, or a role that is not named, takes the bundle's
                default.
            backend: One of mmedge.runtimes.BACKENDS, for all roles; None takes the fastest for
                each. TensorRT takes part once its engine is built (`mmedge build`); named here, it
                builds one for as long as that takes.
            roles: What to load, such as ["image_encoder"] on a device that never sees a text; None
                loads all. What is not loaded costs neither time nor memory.
            options: Threads and memory settings.
            measure: Whether to measure which backend is the fastest where that is not cached; on a
                small device False takes the first one that is installed. None takes
                $MMEDGE_MEASURE, 0 or 1, else True.
            warm: A backend that runs at once, such as "onnxruntime", while TensorRT's engines are
                built in the background, which takes minutes the first time. Each engine is run on
                the golden inputs and takes over between two calls; one whose outputs differ is
                refused. `backend` then names whose engines (None: the TensorRT that is installed),
                and `device` is a GPU. What runs meanwhile uses that GPU if it can, else the CPU.
                `Model.warming` shows the progress. None waits for what is to run.
            warming_report: With `warm`: called at every step, from the background thread.
            channels: Order of the channels in image arrays: "rgb", or "bgr" for frames of OpenCV.
            alpha: "white" composites transparent pixels onto white, "drop" ignores the alpha
                channel; None does what the bundle says.
            max_pixels: Images of more pixels are refused before they are decoded; of a larger
                JPEG, a fraction of its size is decoded.

        Returns:
            The model. Close it, or use it in a `with` block, to free its memory. A process that it
            is sent to loads it again.

        Raises:
            BundleError: If the bundle cannot be opened or trusted, or is of another kind.
            InputError: If it holds no such role or variant; those it holds are listed.
            BackendError: If the backend or the device is missing, or would not run the graph
                there.
        """
        from mmedge.models.load import load_as

        return load_as(
            cls,
            path,
            device=device,
            precision=precision,
            backend=backend,
            roles=roles,
            options=options,
            measure=measure,
            warm=warm,
            warming_report=warming_report,
            channels=channels,
            alpha=alpha,
            max_pixels=max_pixels,
        )

    def opened(self, images: ImageOptions, reopen: Callable[[], Model]) -> None:
        """Store image options, and how to load the same model again."""
        self._reopen = reopen
        for name, processor in self._processors.items():
            if processor.modality in (Modality.IMAGE, Modality.VIDEO):
                shown = cast("ImageProcessor | VideoProcessor", processor)
                self._processors[name] = shown.with_options(
                    channels=images.channels, alpha=images.alpha, max_pixels=images.max_pixels
                )

    def __reduce__(self) -> tuple[Any, ...]:
        if self._reopen is None:
            raise InputError(
                f"{self!r}: cannot be sent to another process, since mmedge.load did not make it. "
                "Load the bundle there."
            )
        return self._reopen, ()

    @property
    def bundle(self) -> Bundle:
        """The bundle that this model was loaded from."""
        return self._bundle

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def sessions(self) -> Mapping[str, Session]:
        """The sessions by role name."""
        return self._sessions

    @property
    def variants(self) -> Mapping[str, Variant]:
        """The variant that runs, by role name."""
        return self._variants

    @property
    def choices(self) -> Mapping[str, Choice]:
        """Backend choice with reason and measurements, by role name."""
        return self._choices

    @property
    def warming(self) -> Mapping[str, WarmingState]:
        """Progress of the background builds, by role name.

        Empty where `load` was not asked to run meanwhile.
        """
        return {} if self._warming is None else self._warming.states

    def wait_until_warm(self, timeout_s: float | None = None) -> bool:
        """Wait for the background builds.

        Args:
            timeout_s: Seconds to wait at most; None waits as long as it takes.

        Returns:
            Whether every role runs its engine; `warming` has the reason if not.
        """
        return self._warming is None or self._warming.wait(timeout_s)

    @classmethod
    def stage_names(cls, manifest: Manifest, role: str) -> tuple[str, ...]:  # noqa: ARG003
        """Return the names of the stages of a role; empty if it has none."""
        return ()

    def call(self, role: str, sample: object) -> Callable[[], object] | None:  # noqa: ARG002
        """Return the end-to-end call of a role, for the profile.

        Args:
            role: A role that is loaded.
            sample: One raw input of the role's modality.

        Returns:
            None where no call of this kind takes a raw input of that role.
        """
        return None

    def stages(self, role: str, sample: object) -> Stages | None:  # noqa: ARG002
        """Return the end-to-end call of a role and its stages; None if there is none."""
        return None

    @property
    def runs(self) -> Mapping[str, Run]:
        """What `mmedge run` can do with this model, by name, the usual first."""
        return {}

    def close(self) -> None:
        """Free the engines' memory, and stop background builds. Closing twice is allowed."""
        if self._warming is not None:
            self._warming.stop()
        for session in self._sessions.values():
            session.close()

    def __repr__(self) -> str:
        roles = ", ".join(
            f"{role}={self._variants[role].name} in {session.placement.backend} on "
            f"{session.placement.device}"
            for role, session in self._sessions.items()
        )
        return f"<{type(self).__name__} {self.manifest.name}: {roles}>"

    def _repr_html_(self) -> str:
        placements = {role: session.placement for role, session in self._sessions.items()}
        rows = (
            (role, self._variants[role].name, placed.backend, placed.device, placed.engine)
            for role, placed in placements.items()
        )
        caption = f"{type(self).__name__} {self.manifest.name}"
        return html_table(caption, ("role", "variant", "backend", "device", "engine"), rows)

    def _session(self, role: str) -> Session:
        if role in self._sessions:
            return self._sessions[role]
        if role in self.manifest.roles:
            raise InputError(f"The {role} was not loaded. Name it in roles= of mmedge.load.")
        raise InputError(
            f"{self._bundle.path}: holds no {role}, only {list(self.manifest.roles)}. Convert a "
            "model that has one."
        )

    def _processor(self, role: str) -> Processor:
        """Return the processor of a loaded role."""
        self._session(role)
        return self._processors[str(self.manifest.processor_of(role))]

    def _run(self, role: str, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run a role, converting inputs to the graph's dtypes."""
        session = self._session(role)
        specs = {spec.name: spec.dtype for spec in session.inputs}
        return session.run(
            {name: np.asarray(array, specs.get(name)) for name, array in feed.items()}
        )

    def _batch_size(self, role: str, wanted: int | None) -> int:
        """Return the samples of a role's call: as many as wanted, else its largest batch."""
        if wanted is not None and wanted < 1:
            raise InputError(f"batch_size: got {wanted}, expected 1 or more.")
        axis = self._session(role).inputs[0].shape[0]
        if isinstance(axis, int):
            return axis
        bounds = self.manifest.roles[role].axes.get(axis)
        return wanted or (1 if bounds is None else bounds.max)
