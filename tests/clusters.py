"""Clusters of real processes on loopback, for tests and benchmarks."""
import json
import os
import re
import signal
import subprocess
import sys
import time

from local_cluster import free_ports

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FLAGS = ['--num-layers', '8', '--batch-norm-decay', '0.9', '--seed', '1',
         '--use-distortion-for-training', 'False', '--train-batch-size', '32',
         '--num-intra-threads', '1', '--num-inter-threads', '2']


class Cluster(object):
  """Tasks named 'chief 0', 'worker 1'..., each a process with its log."""

  def __init__(self, folder, data_dir, workers=1, ps=1, args=(),
               python=sys.executable, command=None):
    """The processes run in `folder`, where the job directory and logs are.

    They run cifar10_main.py, or another `command` (list of str).
    """
    self.folder = str(folder)
    self.job_dir = os.path.join(self.folder, 'job')
    counts = {'chief': 1, 'worker': workers, 'ps': ps}
    ports = iter(free_ports(sum(counts.values())))
    self.jobs = {job: ['127.0.0.1:%d' % next(ports) for _ in range(count)]
                 for job, count in sorted(counts.items()) if count}
    self.tasks = ['%s %d' % (job, i) for job in ('ps', 'chief', 'worker')
                  for i in range(counts[job])]
    self._command = command or [
        python, os.path.join(ROOT, 'cifar10_main.py'), '--data-dir',
        str(data_dir), '--job-dir', self.job_dir] + FLAGS + [
            str(a) for a in args]
    self.processes = {}

  def __enter__(self):
    return self

  def __exit__(self, *args):
    for process in self.processes.values():
      if process.poll() is None:
        process.kill()
        process.wait()

  def start(self, *tasks, **kwargs):
    """Starts tasks (default: all but the evaluator); `args` are flags."""
    for task in tasks or self.tasks:
      job, index = task.split()
      config = {'cluster': self.jobs,
                'task': {'type': job, 'index': int(index)}}
      with open(self._log(task), 'ab') as log:
        self.processes[task] = subprocess.Popen(
            self._command + list(kwargs.get('args', ())), stdout=log,
            stderr=log, cwd=self.folder,
            env=dict(os.environ, TF_CONFIG=json.dumps(config)))

  def kill(self, task, number=signal.SIGKILL):
    self.processes[task].send_signal(number)
    if number == signal.SIGKILL:
      self.processes[task].wait()

  def wait(self, timeout=180, tasks=None):
    """Waits for the end; returns (statuses by task, seconds of the ends).

    Raises:
      AssertionError: naming those that did not end, with their last lines.
    """
    deadline = time.time() + timeout
    ends = {}
    tasks = tasks or list(self.processes)
    while len(ends) < len(tasks):
      for task in tasks:
        if task not in ends and self.processes[task].poll() is not None:
          ends[task] = time.time()
      missing = [task for task in tasks if task not in ends]
      assert time.time() < deadline, '%s did not end:\n%s' % (
          missing, '\n'.join(self.log(task)[-1500:] for task in missing))
      time.sleep(0.05)
    return {task: self.processes[task].returncode for task in tasks}, ends

  def _log(self, task):
    return os.path.join(self.folder, task.replace(' ', '-') + '.log')

  def log(self, task):
    with open(self._log(task), errors='replace') as f:
      return f.read()

  def wait_for_log(self, task, pattern, timeout=120, after=0):
    """Waits for a match of `pattern` in the log from character `after` on."""
    deadline = time.time() + timeout
    while True:
      found = re.search(pattern, self.log(task)[after:])
      if found:
        return found
      assert time.time() < deadline, '%s: no %r in\n%s' % (
          task, pattern, self.log(task)[-3000:])
      time.sleep(0.05)

  def checkpoints(self):
    """Steps of the checkpoints that are whole, in the order of their making."""
    path = os.path.join(self.job_dir, 'checkpoint')
    if not os.path.exists(path):
      return []
    with open(path) as f:  # replaced as a whole after each checkpoint
      return [int(step) for step in re.findall(
          r'all_model_checkpoint_paths: ".*model\.ckpt-(\d+)"', f.read())]

  def wait_for_step(self, step, timeout=150):
    """Waits for a checkpoint of at least this step; returns its step."""
    deadline = time.time() + timeout
    while True:
      steps = self.checkpoints()
      if steps and steps[-1] >= step:
        return steps[-1]
      assert time.time() < deadline, 'no step %d: %s\n%s' % (
          step, steps, self.log('chief 0')[-3000:])
      time.sleep(0.05)

  def own_steps(self):
    """Local steps by task, of replicas that ended."""
    return {task: int(re.findall(r'ends after (\d+) steps of its own',
                                 self.log(task))[-1])
            for task in self.tasks if not task.startswith('ps')}
