"""SIGTERM and SIGINT end a training after its step; a second one ends at once.

Python runs its signal handlers between two of its own instructions, so never
while the main thread waits inside TensorFlow. The byte that the interpreter
writes for each signal comes at once; a thread reads it.
"""
import contextlib
import os
import signal
import sys
import threading

from tf_compat import tf

_received = []


@contextlib.contextmanager
def noted():
  """Within this, signals are noted; `StopHook` acts on them."""
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  old_fd = signal.set_wakeup_fd(writer)
  # Without a handler there is no byte.
  old = [(number, signal.signal(number, lambda *args: None))
         for number in (signal.SIGTERM, signal.SIGINT)]
  thread = threading.Thread(target=_read, args=(reader,))
  thread.daemon = True
  thread.start()
  try:
    yield
  finally:
    for number, handler in old:
      signal.signal(number, handler)
    signal.set_wakeup_fd(old_fd)
    os.close(writer)  # the thread reads the end and goes


def _read(reader):
  for number in iter(lambda: os.read(reader, 1), b''):
    if _received:
      os._exit(128 + ord(number))
    _received.append(ord(number))
  os.close(reader)


def exit_on_sigterm():
  """For a process that has nothing to save: SIGTERM ends it with status 0."""
  signal.signal(signal.SIGTERM, lambda *args: sys.exit(0))


def received():
  """True if a signal asked this process to stop."""
  return bool(_received)


def exit_status():
  """0, also after SIGTERM, which supervisors send; 130 after SIGINT."""
  return 130 if signal.SIGINT in _received else 0


class StopHook(tf.train.SessionRunHook):
  """Ends training after the step in which a signal came.

  The Estimator saves a checkpoint whenever training ends.
  """

  def after_run(self, run_context, run_values):
    if received():
      tf.logging.info('Stopping: saving a checkpoint first')
      run_context.request_stop()


class EndEvaluationHook(tf.train.SessionRunHook):
  """Ends an evaluation in the middle or at the end of training at once.

  Nothing is lost: the checkpoint that it evaluates was saved before.
  """

  def after_run(self, run_context, run_values):
    if received():
      raise SystemExit(exit_status())
