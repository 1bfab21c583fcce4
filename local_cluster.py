"""A whole cluster on this machine: --local-cluster worker=2,ps=1,evaluator=1.

One child process per task, on loopback ports, with the same command line. For
trying a cluster out; its processes share this machine's cores.
"""
import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

# After the first signal: longer than any task gives itself to stop.
STOP_SECS = 40


def task_counts(text):
  """argparse type: 'worker=2,ps=1' to {'worker': 2, 'ps': 1}; '' to {}."""
  counts = {}
  for item in filter(None, text.split(',')):
    job, _, count = item.partition('=')
    if (job not in ('worker', 'ps', 'evaluator') or job in counts or
        not count.isdigit() or not 1 <= int(count) <= 64 or
        (job == 'evaluator' and count != '1')):
      raise argparse.ArgumentTypeError(
          '%r: expected worker=W,ps=P[,evaluator=1], numbers from 1 to 64, a '
          'chief being there always' % text)
    counts[job] = int(count)
  if counts and 'ps' not in counts:
    raise argparse.ArgumentTypeError('%r: expected a ps, such as ps=1' % text)
  return counts


def free_ports(count):
  """Ports of the loopback interface that nobody uses at the moment."""
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
    for s in sockets:
      s.bind(('127.0.0.1', 0))
    return [s.getsockname()[1] for s in sockets]


class LocalCluster(object):
  """Starts the tasks, restarts those that die, passes signals on."""

  def __init__(self, counts, command, max_restarts):
    """Args:
      counts: dict of job to number of tasks, beside the chief.
      command: list of str, what every task runs.
      max_restarts: int, over all tasks.
    """
    jobs = {'chief': 1}
    jobs.update(counts)
    evaluators = jobs.pop('evaluator', 0)
    ports = iter(free_ports(sum(jobs.values())))
    self._cluster = {
        job: ['127.0.0.1:%d' % next(ports) for _ in range(count)]
        for job, count in sorted(jobs.items())}
    self._tasks = [(job, i) for job in ('ps', 'chief', 'worker')
                   for i in range(jobs.get(job, 0))]
    self._tasks += [('evaluator', 0)] * evaluators
    self._command = command
    self._restarts_left = max_restarts
    self._children = {}
    self._threads = []
    self._signals = []
    self._stop_by = float('inf')

  def run(self):
    """Runs the cluster to its end; returns the worst exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, self._pass_on)
    for task in self._tasks:
      if not self._signals:
        self._start(task)
    statuses = {}
    while self._children:
      time.sleep(0.1)
      for task, child in list(self._children.items()):
        if child.poll() is not None:
          del self._children[task]
          statuses[task] = self._handle_end(task, child.returncode)
      if time.time() > self._stop_by:
        self._pass_on(signal.SIGKILL, None)
    for thread in self._threads:
      thread.join(10)
    return max(statuses.values(), default=0)

  def _start(self, task):
    config = {'cluster': self._cluster,
              'task': {'type': task[0], 'index': task[1]}}
    child = self._children[task] = subprocess.Popen(
        self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=dict(os.environ, TF_CONFIG=json.dumps(config)),
        start_new_session=True)  # a terminal's ^C comes through us, once
    for source, target in ((child.stdout, sys.stdout),
                           (child.stderr, sys.stderr)):
      thread = threading.Thread(target=self._copy, args=(task, source, target))
      thread.daemon = True
      thread.start()
      self._threads.append(thread)

  def _copy(self, task, source, target):
    """Passes lines on with the name of their task before them."""
    for line in iter(source.readline, b''):
      target.write('[%s %d] %s' % (task + (line.decode(errors='replace'),)))
      target.flush()
    source.close()

  def _handle_end(self, task, returncode):
    """Restarts a task that died; returns its status as a shell would."""
    if returncode == -signal.SIGTERM and signal.SIGTERM in self._signals:
      return 0  # it had not begun, so that there was nothing to save
    status = returncode if returncode >= 0 else 128 - returncode
    if not status or self._signals:
      return status
    # A restart mends neither an error in the flags (2) nor a NaN (3).
    if status not in (2, 3) and self._restarts_left:
      self._restarts_left -= 1
      print('[%s %d] died with status %d; restarts left after this one: %d' %
            (task + (status, self._restarts_left)), file=sys.stderr)
      self._start(task)
      return 0
    print('[%s %d] ended with status %d; stopping the others' %
          (task + (status,)), file=sys.stderr)
    self._pass_on(signal.SIGTERM, None)
    return status

  def _pass_on(self, number, frame):
    """Passes a signal on to all; the second one kills."""
    self._signals.append(number)
    self._stop_by = time.time() + STOP_SECS
    for child in list(self._children.values()):
      child.send_signal(number if len(self._signals) == 1 else signal.SIGKILL)


def run(counts, max_restarts):
  """Runs this process's own command line as a cluster; returns the status."""
  # Of a flag that is there twice the last one counts.
  command = [sys.executable] + sys.argv + ['--local-cluster=']
  return LocalCluster(counts, command, max_restarts).run()
