"""What every adapted model is: a module that one thread at a time calls, streams, resets."""

from __future__ import annotations

import abc
import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from ..engine.interrupts import surely
from ..engine.model_watch import ModelWatch, said_of
from ..engine.precision import Precision
from ..engine.result import StepResult
from ..engine.shift_detector import Guard
from ..engine.state import checked_value
from ..engine.streaming import Pipeline, Stream
from ..families import Family
from ..methods.base import Method
from .saved import Saved
from .warmup import Batches, Rehearsal, Warmup, warm_up

F = TypeVar("F", bound=Callable[..., Any])


class Lock:
    """A lock that the thread which holds it may take again. Copies and pickles are new locks."""

    def __init__(self) -> None:
        # RLock: its release by a thread that does not hold it is an error, so that the release
        # may be tried without knowing how far an interrupted acquire came
        self._lock = threading.RLock()
        self._owner: int | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Waits until no other thread is inside."""
        thread = threading.get_ident()
        if self._owner == thread:
            yield
            return
        try:
            try:
                self._lock.acquire()
                self._owner = thread
                yield
            finally:
                self._leave(thread)
        finally:  # again, where Ctrl-C arrived while it was left
            self._leave(thread)

    def _leave(self, thread: int) -> None:
        if self._owner == thread:
            self._owner = None
        with contextlib.suppress(RuntimeError):  # not held
            self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


def exclusive(method: F) -> F:
    """Lets one thread at a time run a method of an object with a ``_lock``. ``torch.compile`` does
    not trace it: tracing would lose the backward pass inside a step, and every check of a value
    would warn."""

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(alone)(self, *args, **kwargs)
        with self._lock():
            return method(self, *args, **kwargs)

    return cast(F, alone)


class Adapted(Saved):
    """A model that adapts to what it is called on. Made by ``fasttta.adapt``.

    The wrapped model is never modified: frozen weights are shared with it, tuned tensors are
    private. ``train()`` and ``eval()`` change nothing, ``torch.no_grad()`` and
    ``torch.inference_mode()`` make no difference.

    One thread uses it at a time. Calls of other threads wait: for one batch of a stream, or until a
    ``source()`` block ends. A call that fails or is interrupted anywhere leaves the state as
    it was before or as it is after, never between.

    Subclasses hold the state as one immutable object, and say how a call runs.

    Attributes:
        method, precision: names; options: the method object; seed: argument of ``adapt``.
        engine: how steps run, ``"eager"`` or ``"graph"``.
    """

    #: whether a call takes images; a method may treat each as a separate episode
    takes_images: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        working: nn.Module,
        family: Family,
        method: Method,
        precision: Precision,
        *,
        engine: str,
        seed: int,
        guard: Guard | None = None,
        verify_model: str = "first",
        extended: nn.Module | None = None,
        copies: Mapping[str, tuple[str, int]] | None = None,
    ) -> None:
        """
        Args:
            model: the user's module; working: the copy that calls run; extended: the model with
                prompts or a head that the method adds, None if it adds nothing.
            family: what ``recognise`` returned.
            copies: of the user's module, for ``ModelWatch``.
        """
        super().__init__()
        self._lock = Lock()
        self._owner = object()  # marks the checkpoints of this object; a copy gets another one
        self.method, self.precision = method.name, precision.name
        self.options, self.engine, self.seed = method, engine, seed
        # not registered as children: .to(), .train() and .parameters() must not reach the user's
        # model, nor move tensors from under the optimiser
        self._hidden = (model, working, extended)
        self._family, self._numbers, self._guard = family, precision, guard
        self._watch = ModelWatch(model, verify_model, copies)
        self._verified = family.module is None
        self._in_source: bool = False
        self._warned_single = False  # of a batch of one sample

    def made_by(self, remake: Callable[..., Any], spec: Any, engine: str) -> Self:
        """Keeps what pickling needs to rebuild this object.

        Args:
            remake: a module-level function that rebuilds the object from the model, ``spec``, the
                method, ``engine``, a record and tensors.
            engine: as ``adapt`` got it.
        """
        self._remake, self._spec, self._asked = remake, spec, engine
        return self

    @abc.abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adapts on a batch and predicts it."""

    @abc.abstractmethod
    def step(self, *args: Any, **kwargs: Any) -> StepResult:
        """Adapts on a batch and predicts it, with losses and statistics."""

    @abc.abstractmethod
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """What a call returns, with the current state; adapts nothing."""

    @property
    @abc.abstractmethod
    def tuned(self) -> dict[str, Tensor]:
        """Copies of what is adapted, by name."""

    @abc.abstractmethod
    def _pipeline(self, encode_batch: int | None, cache: Any) -> Pipeline:
        """How a stream reads, encodes and steps."""

    @abc.abstractmethod
    def _merged(self) -> nn.Module:
        """A plain module with the adapted weights."""

    @abc.abstractmethod
    def _ready(self) -> None:
        """Puts the weights of the state into the model that calls run; inside ``source()`` the
        source's weights."""

    @abc.abstractmethod
    def _first_state(self) -> Any:
        """The state of a fresh ``adapt``."""

    @abc.abstractmethod
    def _with_tuned(self, values: Mapping[str, Tensor]) -> Any:
        """The state with other values of some tuned tensors; changes nothing."""

    def _verify(self, compare: Callable[[], bool]) -> None:
        """Checks that the wrapped model has not changed, and that it computes what fasttta assumes.
        The second check runs on the first batch, and again after a change that may affect results.

        Args:
            compare: runs the second check. It returns False where the batch decides nothing, and
                raises ValueError where the results differ.
        """
        changed = self._watch.check()
        if changed is not None:
            self._family.compare_again()
            self._verified = False
        if not self._verified:
            with said_of(changed):
                verified = compare()
            if changed is not None and verified:
                self._watch.accept()
            self._verified = verified

    @property
    def device(self) -> torch.device:
        """Where the model runs, and takes its inputs."""
        return next(self._hidden[1].parameters()).device

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and values of the tuned tensors, as ``tuned`` has them: copies, so that neither an
        optimiser nor ``requires_grad_`` reaches what adapts. ``load_tuned`` sets them."""
        for name, value in self.tuned.items():
            yield f"{prefix}.{name}" if prefix else name, nn.Parameter(value)

    def get_parameter(self, target: str) -> nn.Parameter:
        """The tuned tensor of a name, a copy as ``named_parameters`` yields it.

        Raises:
            AttributeError: nothing of this name is tuned.
        """
        tuned = self.tuned
        if target not in tuned:
            names = ", ".join(list(tuned)[:6]) or "nothing by this method"
            raise AttributeError(f"{target!r} is not tuned; tuned: {names}")
        return nn.Parameter(tuned[target])

    def print_tuned(self) -> None:
        """Prints how many values are tuned, and their share of the model's."""
        tuned = self.tuned
        count = sum(x.numel() for x in tuned.values())
        model = {id(x): x.numel() for x in self._hidden[1].parameters()}
        total = max(sum(model.values()), count)
        print(
            f"tuned: {count:,} of {total:,} values ({100 * count / max(total, 1):.4g} %) in "
            f"{len(tuned)} tensors, by {self.method!r}"
        )

    def stream(
        self, loader: Iterable[Any], encode_batch: int | None = None, cache: Any = None
    ) -> Iterator[StepResult]:
        """Steps on every batch of a loader, in order, yielding a result each.

        Args:
            loader: yields one batch at a time as a tuple or list of the model's inputs (without
                labels), the input itself where there is one, or ``fasttta.data.Batch``; for models
                of images what ``step`` takes as images, or ``Views``. For a model on a GPU it may
                yield tensors in host memory; pinned ones it must not write to again before their
                result is there.
            encode_batch: samples that the frozen encoders take at a time, ahead of the steps that
                use them (on a GPU while the steps before run); None: as the batches come.
                Different batch shapes may change the numbers within float noise.
            cache: ``fasttta.data.FeatureCache``, where encoded features are looked for and kept.

        Methods that tune inside the encoders can neither encode ahead nor keep features, and ignore
        both arguments; so does a stream inside ``source()``. Models of images ignore
        ``encode_batch``, because a step encodes all its views together, and refuse a cache.

        Returns:
            An iterator with the ``len`` of the loader, if the loader has one. Leaving it early
            loses no batch: if the loader is itself an iterator, batches that were read ahead and
            not adapted on come first in the next stream over it, whichever adapted model makes that
            stream.

        Raises:
            ValueError, TypeError: a batch or an argument cannot be used; the batches before it
                have been adapted on, and the next stream over the same iterator begins after it.
        """
        return Stream(self._pipeline(encode_batch, cache).results(loader), loader)

    @contextlib.contextmanager
    def source(self) -> Iterator[Self]:
        """The untouched source model inside the block: calls predict with it and adapt nothing.
        Calls of other threads wait until the block ends."""
        with self._lock():
            if self._in_source:
                yield self
                return
            with surely(self._leave_source):
                self._in_source = True
                self._ready()
                yield self

    def _leave_source(self) -> None:
        self._in_source = False
        self._ready()

    @exclusive
    def warmup(self, *inputs: Any, encode_batch: int | None = None, **options: Any) -> Warmup:
        """Builds, compiles and captures all that a stream of such batches will need, so that no
        batch waits for it. The state does not change in any bit: neither weights, optimiser,
        window and guard, nor random numbers; also if this fails.

        The method runs on the inputs with every number of batches in its window and, where kernels
        depend on it (eager steps on a GPU), with every smaller batch. Compiled kernels and the C++
        library stay on the disk for other processes; captured graphs are this object's.

        Args:
            inputs: a batch of the stream's shapes and types, as ``step`` takes it; values only must
                be usable. For models of images: images, or ``views=``.
            encode_batch: as ``stream`` will get it.
            options: other arguments of ``step``.

        Returns:
            What was made, with the seconds of each; printed, it is a table.

        Raises:
            RuntimeError: inside ``source()``, where nothing adapts.
            ValueError, TypeError: the inputs cannot be used.
        """
        if self._in_source:
            raise RuntimeError("warmup inside source(): leave the block, nothing adapts in it")
        return warm_up(self, self._rehearsal(inputs, encode_batch, options))

    def _rehearsal(
        self, inputs: tuple[Any, ...], encode_batch: int | None, options: dict[str, Any]
    ) -> Rehearsal:
        """The calls that need all that batches like these will."""
        return Batches(inputs, options, encode_batch)

    @exclusive
    def load_tuned(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets some or all of the tuned tensors (of methods that treat every image as an episode:
        what episodes start from); optimiser and method state stay. ``reset`` and a guard go back
        to what ``adapt`` made.

        Raises:
            ValueError, TypeError: an unknown name, wrong shape or type, non-finite values; then
                nothing is changed.
        """
        tuned, values = self.tuned, {}
        with torch.inference_mode(False), torch.no_grad():
            for name, value in tensors.items():
                if name not in tuned:
                    names = ", ".join(list(tuned)[:6]) or "nothing by this method"
                    raise ValueError(f"{name!r} is not tuned; tuned: {names}")
                values[name] = checked_value(name, value, tuned[name])
            state = self._with_tuned(values)
        self._publish(state)

    @exclusive
    def reset(self) -> None:
        """The state of a fresh ``adapt``, bit for bit."""
        self._publish(self._first_state())

    @exclusive
    def unwrap(self, merge: bool = False) -> nn.Module:
        """A plain module: the user's, or with ``merge`` one that holds the adapted weights.

        For a fusion model, ``merge`` returns a copy of the user's module with the adapted weights.
        Where that module has no place for the prompts or the head that a method added, it returns a
        copy of the extended model (BriMPR's PromptVA has a place for prompts). For a model of
        images, it returns a ``fasttta.models.CLIP`` that predicts the classes with the prompt from
        which episodes start: an episode leaves nothing to merge.
        """
        return self._merged() if merge else self._hidden[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(), .cuda(), .half(): a no-op where nothing would change, else refused
        parameter = next(self._hidden[1].parameters())
        probe = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        moved = fn(probe)
        if moved.device != probe.device or moved.dtype != probe.dtype:
            raise RuntimeError(
                f"an adapted model stays on {probe.device} in its precision; move or convert the "
                "model first and call fasttta.adapt on it"
            )
        return self
