"""Takes the events of a journal to MLflow, whatever happens there meanwhile."""

import logging
import time
from pathlib import Path

from mlflow.exceptions import MlflowException

from semformer.errors import StoreError, UserError, first_line
from semformer.secrets import without_password
from semformer.store import Store
from sweeps.tracking.journal import Journal
from sweeps.tracking.recorder import Recorder
from sweeps.tracking.runs import Gone

log = logging.getLogger(__name__)
EVENTS_A_TIME = 5000
LONGEST_WAIT = 5.0
"""Seconds between two attempts to deliver."""
PATIENCE = 60.0
"""Seconds for which events are tried again that MLflow, though it answers, does not take for some cause."""


class Delivery:
    """Of one journal. `errors` gets a line for every event that was refused for good."""

    def __init__(self, journal: Journal, recorder: Recorder, errors: list[str]):
        self.journal, self.recorder, self.errors = journal, recorder, errors
        self.last_error = "there was no time"
        self._size = EVENTS_A_TIME
        self._attempts, self._cause, self._since, self._failed = 0, "", 0.0, float("-inf")

    def step(self) -> float:
        """Deliver the next events; returns the seconds after which to go on, more than 0 after a failure, and while the
        journal cannot be read or written.

        While MLflow or the store does not answer, an event is tried for ever. One that MLflow refuses is looked for by
        halves, and skipped: at the second attempt if it will never be taken, else after PATIENCE seconds.
        """
        try:
            entries = self.journal.read(self._size)
        except OSError as error:
            self.last_error = str(error)
            return LONGEST_WAIT
        try:
            self.recorder.write([event for _, event in entries])
        except Exception as error:
            self.recorder.forget()
            self.last_error = told(error, self.recorder.runs.uri)
            if (wait := self._wait(error)) is not None:
                return wait
            if len(entries) > 1:
                self._size = len(entries) // 2
                return 0.0
            self.errors.append(self.last_error)
            log.warning("MLflow does not take an event (%s): %s", entries[0][1]["event"], self.last_error)
            log.debug("%s", entries[0][1], exc_info=error)
        self._attempts = 0
        self._size = min(2 * self._size, EVENTS_A_TIME)
        self.journal.advance(entries[-1][0], len(entries))
        return 0.0

    def _wait(self, error: Exception) -> float | None:
        """Seconds until the same events are tried again; None where that would not help."""
        now = time.monotonic()
        known = self._attempts > 0 or (self._cause == self.last_error and now - self._failed < PATIENCE)
        self._attempts, self._failed = self._attempts + 1, now
        wait = min(0.1 * 2**self._attempts, LONGEST_WAIT)
        if not known or isinstance(error, StoreError) or not self.recorder.runs.answers():
            self._cause, self._since = self.last_error, now
            return wait
        if self._attempts == 1 or (not _is_final(error) and now - self._since < PATIENCE):
            return wait
        self._attempts = 1  # its half is tried once before it is halved in turn
        return None


def deliver(folder: Path, store: Store, uri: str, *, patience: float = 60.0) -> int:
    """Take what is left in a sweep's folder to the MLflow at `uri`; returns how many events that was.

    Raises UserError when MLflow cannot be reached, or takes nothing for `patience` seconds, and when it refuses events.
    """
    journal = Journal(folder)
    try:
        return _deliver_all(journal, Recorder(uri, store, journal.files, journal.described), patience)
    finally:
        journal.close()


def _deliver_all(journal: Journal, recorder: Recorder, patience: float) -> int:
    errors: list[str] = []
    delivery, delivered, since = Delivery(journal, recorder, errors), 0, time.monotonic()
    while before := journal.undelivered:
        wait = delivery.step()
        delivered += before - journal.undelivered
        if before > journal.undelivered:
            since = time.monotonic()
        elif time.monotonic() - since > patience:
            uri = recorder.runs.uri
            raise UserError(
                f"--tracking-uri {without_password(uri, uri)}: MLflow does not answer; {before} events of "
                f"{journal.files.parent} are still to be delivered. Try again when it is back."
            )
        time.sleep(wait)
    if errors:
        raise UserError(
            f"{len(errors)} of {delivered} events in {journal.files.parent} were refused, the first because of "
            f"{errors[0]}"
        )
    return delivered


def told(error: Exception, uri: str) -> str:
    """An error in a line, without the password of `uri`."""
    return without_password(f"{type(error).__name__}: {first_line(error)}", uri)


def _is_final(error: Exception) -> bool:
    """Whether trying again must fail again, if MLflow answers."""
    if isinstance(error, MlflowException):
        return error.get_http_status_code() in (400, 404, 409)
    return isinstance(error, Gone | LookupError | TypeError | ValueError | AttributeError)
