"""A study in its storage: Optuna's tables in a file, or in a database that several machines share.

What is to be tried is put there as a queue when the study is made. A worker claims the next of it, which one worker
alone can do; so every configuration is tried once, by however many workers, whenever they come and go. A worker that
claimed one gives signs of life. Where they end, or its process is gone from this machine, the claim is void and the
configuration is put into the queue again.
"""

import contextlib
import fcntl
import math
import os
import re
import socket
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Self

from ..core.errors import InarchError, StateError
from ..core.records import TrialRecord
from ..data.extras import missing

try:
    import optuna as optuna  # for the other files, which come here first
    from optuna import Study, Trial
    from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
    from optuna.storages import RDBStorage, fail_stale_trials, get_storage
    from optuna.trial import FrozenTrial, TrialState, create_trial
except ImportError as error:
    raise InarchError(missing("optuna", error)) from error

INDEX, RECORD, WORKER, DEATHS, SIGNATURE = "index", "record", "worker", "deaths", "signature"
STEPS, SECONDS = "steps", "seconds"
"""Names of what is kept with a trial."""

JOB, READY = "job", "ready"
"""Names of what is kept with the study, beside the worker that made it."""

MOST_DEATHS = 3
"""A configuration that has taken so many workers with it is not tried again."""

POLL = 0.2
"""Seconds between two looks at a storage that another worker is writing to."""


def storage_url(storage: str | None, folder: Path) -> str:
    """Where the study is kept: the URL, with the driver that inarch installs, or a file in the folder of the study."""
    if storage is None:
        return f"sqlite:///{folder.absolute() / 'study.db'}"
    if "://" not in storage:
        raise StateError(
            f"A study's storage is a URL; got `{storage}`. Write `postgresql://USER@HOST/DATABASE`, or leave it out "
            "for a file in the folder of the study."
        )
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", storage)


def masked(text: str) -> str:
    """A URL, or a text with one in it, without its password."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


class Board:
    """The queue and the results of one study."""

    def __init__(self, url: str, name: str, *, grace: float) -> None:
        self.url, self.name, self.grace = url, name, grace
        self.worker = f"{_here()}:{os.getpid()}:{_birth(os.getpid())}"
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        is_file = url.startswith("sqlite:")
        # SQLite knows no lock on a row: workers that share a file take turns.
        self._turns = Path(f"{url.removeprefix('sqlite:///')}.lock") if is_file else None
        engine = {"connect_args": {"timeout": 60}} if is_file else {"pool_pre_ping": True}
        with _reachable(url), _unwarned(), self.alone():
            self.database = RDBStorage(
                url,
                engine_kwargs=engine,
                heartbeat_interval=max(1, int(grace / 4)),
                grace_period=max(1, int(grace)),
                heartbeat_stale_trial_callback=lambda _, trial: self._queue_again(trial, died=True),
            )
            self.storage = get_storage(self.database)  # which remembers finished trials

    @property
    def shown(self) -> str:
        """This worker, as `host:process`."""
        return _shown(self.worker)

    def close(self) -> None:
        """Leave the storage."""
        self.database.remove_session()
        self.database.engine.dispose()

    # The study

    def job(self) -> dict[str, Any]:
        """All that was asked for when the study was made."""
        return dict(self._load().user_attrs[JOB])

    def create(self, job: Mapping[str, Any], queue: list[dict[str, Any]]) -> None:
        """Make the study with its queue of values; `{}` leaves them to the sampler. Does nothing where it is there.

        Where its maker died half way it is made anew.
        """
        while True:
            try:
                study = optuna.create_study(storage=self.storage, study_name=self.name, direction="maximize")
            except DuplicatedStudyError:
                if self._await_ready():
                    return
                self.delete()
                continue
            study.set_user_attr(WORKER, self.worker)
            study.set_user_attr(JOB, dict(job))
            for index, values in enumerate(queue):
                study.enqueue_trial(values, user_attrs={INDEX: index})
            study.set_user_attr(READY, value=True)
            return

    def delete(self) -> None:
        """Remove the study with all its trials."""
        with contextlib.suppress(KeyError):
            optuna.delete_study(study_name=self.name, storage=self.storage)

    def _await_ready(self) -> bool:
        """Wait until another worker has made the study; False where it died over it."""
        end = time.monotonic() + self.grace
        while time.monotonic() < end:
            try:
                known = self._load().user_attrs
            except KeyError:
                return False
            if READY in known:
                return True
            if _is_dead(known.get(WORKER, "")):
                return False
            time.sleep(POLL)
        return False

    def _load(self, sampler: Any = None) -> Study:
        return optuna.load_study(study_name=self.name, storage=self.storage, sampler=sampler)

    # Claiming

    def claim(self, sampler: Callable[[int], Any], *, later: Collection[int] = ()) -> "Claim | None":
        """The next configuration of the queue, for this worker alone; None where all are claimed or done.

        `sampler` makes Optuna's sampler for a configuration of that number; those of the numbers `later` are passed
        over.
        """
        self.bury()
        study = self._load()
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        for trial in sorted(waiting, key=lambda one: one.user_attrs[INDEX]):
            index = int(trial.user_attrs[INDEX])
            if index in later:
                continue
            number = self._id(study, trial)
            with self.alone():
                # The sign of life first: what is claimed without one would be claimed for ever.
                self.database.record_heartbeat(number)
                is_ours = self.storage.set_trial_state_values(number, state=TrialState.RUNNING)
            if is_ours:
                self.storage.set_trial_user_attr(number, WORKER, self.worker)
                return Claim(self, index, Trial(self._load(sampler(index)), number))
        return None

    def bury(self) -> None:
        """Put into the queue again what dead workers had claimed."""
        study = self._load()
        with self.alone(), _unwarned():
            fail_stale_trials(study)
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if _is_dead(trial.user_attrs.get(WORKER, "")) and self._fail(self._id(study, trial)):
                    self._queue_again(trial, died=True)
            lost = self._lost(study)
            for trial in lost:
                self._queue_again(trial, died=True)

    def _lost(self, study: Study) -> list[FrozenTrial]:
        """Claims that are void and were not queued again, because the worker who was at it died too."""
        latest = {int(one.user_attrs[INDEX]): one for one in study.get_trials(deepcopy=False)}
        return [one for one in latest.values() if one.state == TrialState.FAIL and RECORD not in one.user_attrs]

    def _fail(self, number: int) -> bool:
        """Make a claim void; False where another worker was quicker."""
        try:
            return self.storage.set_trial_state_values(number, state=TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False

    def _queue_again(self, trial: FrozenTrial, *, died: bool) -> None:
        study = self._load()
        deaths = int(trial.user_attrs.get(DEATHS, 0)) + died
        kept = {INDEX: trial.user_attrs[INDEX], DEATHS: deaths}
        if deaths >= MOST_DEATHS:
            record = TrialRecord(
                number=kept[INDEX],
                status="failed",
                decided_by="worker",
                reason=f"{deaths} workers died over it",
                worker=trial.user_attrs.get(WORKER, ""),
            )
            study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={**kept, RECORD: record.to_dict()}))
            return
        study.add_trial(
            create_trial(
                state=TrialState.WAITING,
                user_attrs=kept,
                # A training that goes on takes the same values, and does not report again what it has reported.
                system_attrs={
                    **trial.system_attrs,
                    "fixed_params": {**trial.system_attrs["fixed_params"], **trial.params},
                },
                intermediate_values=trial.intermediate_values,
            )
        )

    def _id(self, study: Study, trial: FrozenTrial) -> int:
        own = self.storage.get_study_id_from_name(study.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(own, trial.number)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One worker after the other: by a lock on a file, or by one in PostgreSQL. Other databases have none here.

        Between a claim that is made void and its configuration in the queue again, nobody else may find it lost.
        """
        if self._turns is None:
            with self._alone_in_database():
                yield
            return
        with _reachable(self.url):
            lock = self._turns.open("a")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _alone_in_database(self) -> Iterator[None]:
        engine = self.database.engine if hasattr(self, "database") else None  # there is none while tables are made
        if engine is None or engine.dialect.name != "postgresql":
            yield
            return
        attempt = f"SELECT pg_try_advisory_xact_lock({zlib.crc32(f'inarch {self.name}'.encode())})"
        end = time.monotonic() + self.grace  # who holds it for longer has lost its connection
        with engine.connect() as turn:
            while not turn.exec_driver_sql(attempt).scalar() and time.monotonic() < end:
                time.sleep(POLL / 4)
            yield

    # Results

    def trials(self) -> list[FrozenTrial]:
        """The last attempt at each configuration, in the order of the study."""
        latest: dict[int, FrozenTrial] = {}
        for trial in self._load().get_trials(deepcopy=False):
            latest[int(trial.user_attrs[INDEX])] = trial
        return [latest[index] for index in sorted(latest)]

    def records(self) -> list[TrialRecord]:
        """Every configuration, with what became of it so far."""
        attempts: dict[int, list[FrozenTrial]] = {}
        for trial in self._load().get_trials(deepcopy=False):
            attempts.setdefault(int(trial.user_attrs[INDEX]), []).append(trial)
        return [_record(index, attempts[index]) for index in sorted(attempts)]

    def twin(self, signature: str, index: int) -> TrialRecord | None:
        """What became of another trial with this signature that was trained, or else one that is being trained.

        Of two that are taken up at one time the earlier in the study is trained. None where there is neither.
        """
        running = None
        for trial in self._load().get_trials(deepcopy=False):
            known, state = trial.user_attrs, trial.state
            if known.get(SIGNATURE) != signature or known[INDEX] == index:
                continue
            if state in (TrialState.COMPLETE, TrialState.PRUNED) and RECORD in known:
                record = TrialRecord.from_dict(known[RECORD])
                if record.same_as is None:
                    return record
            elif state == TrialState.RUNNING and known[INDEX] < index and not _is_dead(known.get(WORKER, "")):
                running = TrialRecord(number=int(known[INDEX]), status="running")
        return running

    def is_over(self) -> bool:
        """Whether nothing is left to be done, by anyone."""
        return all(trial.state.is_finished() and RECORD in trial.user_attrs for trial in self.trials())


class Claim:
    """One configuration, claimed by this worker. As a context it gives signs of life."""

    def __init__(self, board: Board, index: int, trial: Trial) -> None:
        self.board, self.index, self.trial = board, index, trial
        self._id = board._id(trial.study, board.storage.get_trial(trial._trial_id))  # noqa: SLF001
        self._is_over = threading.Event()
        self._signs = threading.Thread(target=self._give_signs, daemon=True)

    def __enter__(self) -> Self:
        self._signs.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._signs.join()

    def _give_signs(self) -> None:
        while not self._is_over.wait(self.board.grace / 4):
            # A storage that cannot be reached now may be later; if not, the claim becomes void, as it should.
            with contextlib.suppress(Exception):
                self.board.database.record_heartbeat(self._id)

    def sign(self, signature: str) -> None:
        """Keep what tells equal configurations."""
        with _taken():
            self.board.storage.set_trial_user_attr(self._id, SIGNATURE, signature)

    def frozen(self) -> FrozenTrial:
        """The trial as it is in the storage now."""
        return self.board.storage.get_trial(self._id)

    def spend(self, steps: int, seconds: float) -> None:
        """Tell what was spent so far. Raises `Taken` where the claim is void."""
        with _taken():
            self.board.storage.set_trial_user_attr(self._id, STEPS, steps)
            self.board.storage.set_trial_user_attr(self._id, SECONDS, seconds)

    def report(self, value: float, epoch: int) -> None:
        """Tell the metric after an epoch. Raises `Taken` where the claim is void."""
        with _taken():
            self.board.storage.set_trial_intermediate_value(self._id, epoch, value)

    def finish(self, record: TrialRecord) -> None:
        """Write what became of it. Raises `Taken` where the claim is void."""
        self.spend(record.steps, record.seconds)
        with _taken():
            self.board.storage.set_trial_user_attr(self._id, RECORD, record.to_dict())
            if record.status in ("finished", "repeated") and record.value is not None:
                self.board.storage.set_trial_state_values(self._id, state=TrialState.COMPLETE, values=[record.value])
            else:
                state = TrialState.FAIL if record.status == "failed" else TrialState.PRUNED
                self.board.storage.set_trial_state_values(self._id, state=state)

    def release(self) -> None:
        """Give it back, to be gone on with later."""
        with self.board.alone():
            trial = self.board.storage.get_trial(self._id)
            if self.board._fail(self._id):  # noqa: SLF001  the two are one
                self.board._queue_again(trial, died=False)  # noqa: SLF001


class Taken(Exception):  # noqa: N818  no error: the trial is in other hands
    """Another worker has taken a trial over, because this one gave no sign of life for too long."""


@contextlib.contextmanager
def _taken() -> Iterator[None]:
    try:
        yield
    except UpdateFinishedTrialError:
        raise Taken from None


def _record(index: int, attempts: list[FrozenTrial]) -> TrialRecord:
    last = attempts[-1]
    begun = [one for one in attempts if WORKER in one.user_attrs]
    steps = sum(int(one.user_attrs.get(STEPS, 0)) for one in attempts)
    seconds = math.fsum(float(one.user_attrs.get(SECONDS, 0)) for one in attempts)
    common: dict[str, Any] = {"number": index, "steps": steps, "seconds": seconds, "attempts": len(begun)}
    if RECORD in last.user_attrs and last.state.is_finished():
        return TrialRecord.from_dict({**last.user_attrs[RECORD], **common})
    curve = tuple((float(epoch), value) for epoch, value in sorted(last.intermediate_values.items()))
    is_running = last.state == TrialState.RUNNING
    return TrialRecord(
        **common,
        status="running" if is_running else "waiting",
        curve=curve,
        worker=_shown(last.user_attrs.get(WORKER, "")) if is_running else "",
    )


def _shown(worker: str) -> str:
    """`host:process`."""
    place, _, rest = worker.partition(":")
    return f"{place.partition('/')[0]}:{rest.partition(':')[0]}"


@cache
def _here() -> str:
    """This machine since it was started, and where its processes are numbered: containers may share a name."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    try:
        since = zlib.crc32(f"{boot.read_text()}{space.readlink()}".encode())
    except OSError:
        since = 0
    return f"{socket.gethostname()}/{since:08x}"


def _birth(process: int) -> str:
    """When a process began, as the system counts it: its number alone may belong to another one by now."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_dead(worker: str) -> bool:
    """Whether it ran on this machine and does no longer; of another machine nobody can tell but by the clock."""
    host, _, rest = worker.partition(":")
    process, _, birth = rest.partition(":")
    if host != _here() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _birth(int(process)) != birth


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Optuna warns of what it may still change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _reachable(url: str) -> Iterator[None]:
    """Turn the database's errors into ours, without the password."""
    try:
        yield
    except InarchError:
        raise
    except ImportError as error:
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        if url.startswith("postgresql+psycopg:"):
            raise InarchError(missing("psycopg", cause)) from error
        raise StateError(
            f"A database needs its driver; got none for `{masked(url)}`: {cause}. Install the driver, or use "
            "`postgresql://`."
        ) from None
    except Exception as error:  # noqa: BLE001  SQLAlchemy and every driver have errors of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise StateError(
            f"A study's storage must be reachable; got `{masked(url)}`: {masked(reason)}. Check the address and that "
            "the database is up."
        ) from None
