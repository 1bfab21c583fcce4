"""A task of a cluster -> its server, its peers, its training, its end.

TensorFlow's own runtime does the work: a gRPC server per process, variables on
the parameter servers. What is here makes it start without guessing, say whom it
waits for, and end everywhere when training is done.
"""
import json
import logging
import os
import socket
import sys
import threading
import time

import cifar10_utils
import nan_guard
import stop_signals
from tf_compat import set_recovery_wait_secs, tf
from tf_config import parse_tf_config
from usage import UsageError

RECOVERY_WAIT_SECS = 3
REPORT_SECS = 30  # between two lines about a missing peer
# After the last checkpoint: what a parameter server gives the replicas to say
# goodbye, and what a worker gives itself to finish its last step.
PS_GRACE_SECS = 7
WORKER_GRACE_SECS = 9
CLOSE_GRACE_SECS = 3  # what a worker gives its session to close
# After a signal: what a replica gives its step, which may wait for a process
# that has gone; and a parameter server the replicas, of which the chief saves.
STOP_STEP_SECS = 15
STOP_GRACE_SECS = 20


def read_task(flags):
  """This process's Task from the environment, checked against the flags.

  Parameter servers and evaluators compute on the CPU: they leave the GPUs to
  others, also where all processes are started with the same flags.
  """
  task = parse_tf_config(os.environ.get('TF_CONFIG', ''), flags.job_dir)
  check_num_workers(flags, task.num_workers if task else 1, 'TF_CONFIG')
  if task and not task.trains:
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    # None: whatever a CPU takes; a checkpoint is the same for all of them.
    flags.num_gpus = flags.data_format = None
    flags.variable_strategy = 'CPU'
  return task


def check_num_workers(flags, num_workers, where):
  """Raises UsageError unless --num-workers is left out, or right."""
  if flags.num_workers not in (None, num_workers):
    raise UsageError('--num-workers %d: %s has %d, counting the chief' %
                     (flags.num_workers, where, num_workers))


# ---- what the Estimator is told ----------------------------------------------


def run_config_arguments(task, session_config):
  """Arguments of RunConfig for a task; completes `session_config`.

  Args:
    task: Task, or None for a process on its own.
    session_config: tf.ConfigProto; its device filters keep replicas from
      waiting for each other.
  """
  # RunConfig reads its part from the environment.
  os.environ.pop('TF_CONFIG', None)
  if task is None:
    return {}
  os.environ['TF_CONFIG'] = json.dumps({
      'cluster': task.jobs, 'task': {'type': task.type, 'index': task.index}})
  if not task.trains:
    return {}
  own = '/job:%s/task:%d' % (task.type, task.index)
  session_config.device_filters.extend(['/job:ps', own])
  return {'device_fn': tf.train.replica_device_setter(
      worker_device=own, merge_devices=True, cluster=task.jobs,
      ps_ops=['Variable', 'VariableV2', 'VarHandleOp'],
      ps_strategy=cifar10_utils.GreedyLoadBalancingStrategy(
          len(task.jobs['ps']), cifar10_utils.byte_size_load_fn))}


def caching_device(config):
  """Where a replica keeps the values of variables within a step, or None.

  Each is read over the network once per step then, not once per use and tower.

  Args:
    config: RunConfig or None.
  """
  if config is None or not config.num_ps_replicas:
    return None
  return '/job:%s/task:%d/cpu:0' % (config.task_type, config.task_id)


class SyncHook(tf.train.SessionRunHook):
  """The hook of SyncReplicasOptimizer, with a strict start and a clean end.

  Its token queue runner on the chief would keep the session open for 120 s; a
  coordinator of its own, stopped first, ends it. And it puts a token for each
  replica into the queue at the start, which lets a fast one contribute twice to
  a step and wastes what a slow one computed. Tokens are needed only by replicas
  that wait for one already: when the chief comes back to a training.
  """

  def __init__(self, optimizer, is_chief, is_new):
    """`is_new`: bool, true where no checkpoint is continued."""
    self._optimizer = optimizer
    self._hook = optimizer.make_session_run_hook(is_chief, num_tokens=0)
    self._is_chief = is_chief
    self._needs_tokens = not is_new
    self._coord = None

  def begin(self):
    self._hook.begin()
    self._add_tokens = self._optimizer.get_init_tokens_op()

  def after_create_session(self, session, coord):
    self._coord = tf.train.Coordinator()
    self._hook.after_create_session(session, self._coord)
    if self._is_chief and self._needs_tokens:
      session.run(self._add_tokens)
    self._needs_tokens = True  # in a session after a lost one

  def end(self, session):
    self._coord.request_stop()


# ---- servers and peers -------------------------------------------------------


def start_server(task, session_config=None):
  """Starts the gRPC server of this task; it has the devices of the config.

  Raises:
    UsageError: if the port cannot be had.
  """
  address = task.jobs[task.type][task.index]
  try:
    return tf.train.Server(task.jobs, task.type, task.index,
                           config=session_config or tf.ConfigProto(
                               device_count={'GPU': 0}))
  except tf.errors.OpError as e:
    raise UsageError('TF_CONFIG: cluster.%s: no server on %s: %s' %
                     (task.type, address, e.message))


def missing_peers(task, types):
  """Names and addresses of the peers that do not answer: list of str."""
  missing = []
  for name, address in task.peers(*types):
    host, port = address.rsplit(':', 1)
    try:
      socket.create_connection((host.strip('[]'), int(port)), 2).close()
    except OSError:
      missing.append('%s at %s' % (name, address))
  return missing


class Waiting(object):
  """Names the peers that are missing: at once, then every 30 s."""

  def __init__(self, task):
    self._name = task.name
    self._reported = None

  def report(self, missing):
    """Logs the peers of `missing` (list of str) if it is time to."""
    now = time.time()
    if missing and (not self._reported or now - self._reported >= REPORT_SECS):
      self._reported = now
      tf.logging.info('%s: waiting for %s', self._name, ', '.join(missing))


def wait_for_peers(task, flags):
  """Returns once the peers answer; names those that do not every 30 s.

  At the start of a training everyone is waited for. One that goes on needs the
  parameter servers and the chief: other workers may have ended already.

  Raises:
    SystemExit: status 1 after --start-timeout-secs; 0 if training is over
      or a signal came.
  """
  if task.type == 'evaluator':  # it only reads what the chief writes
    types = ('chief',)
  elif cifar10_utils.latest_checkpoint(flags.job_dir):
    types = ('ps', 'chief')
  else:
    types = ('ps', 'chief', 'worker')
  start = time.time()
  waiting = Waiting(task)
  while True:
    missing = missing_peers(task, types)
    if not missing:
      return
    if is_finished(flags) or stop_signals.received():
      raise SystemExit(stop_signals.exit_status())
    waited = time.time() - start
    if 0 < flags.start_timeout_secs <= waited:
      tf.logging.error('%s: gave up after %d s without %s', task.name, waited,
                       ', '.join(missing))
      raise SystemExit(1)
    waiting.report(missing)
    time.sleep(1)


# ---- replicas ----------------------------------------------------------------


class ReplicaHook(tf.train.SessionRunHook):
  """Keeps a worker until the last checkpoint is there, and no longer.

  A chief that dies between the last step and its checkpoint goes back to the
  one before, and then needs its workers again. And TensorFlow retries by itself
  and in silence until a lost peer is back: a worker that is in the middle of it
  when the others end would never end, so a thread looks on.
  """

  def __init__(self, task, flags):
    self._task = task
    self._flags = flags
    # In synchronous training every step waits for all.
    self._needed = ('ps', 'chief') + (('worker',) if flags.sync else ())
    self._steps = 0
    self._last_step = time.time()
    self._stops = False  # between two steps, after a signal
    self._end = None  # when it came
    thread = threading.Thread(target=self._watch)
    thread.daemon = True
    thread.start()

  def begin(self):
    self._global_step = tf.train.get_global_step()

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(self._global_step)

  def after_run(self, run_context, run_values):
    self._steps += 1
    self._last_step = time.time()
    self._stops = stop_signals.received()
    step = run_values.results
    # A step's own read of the global step may come before its increment.
    near_end = self._flags.train_steps - self._task.num_workers
    if self._task.is_chief or step < near_end:
      return
    step = run_context.session.run(self._global_step)
    while step >= self._flags.train_steps:
      if is_finished(self._flags) or stop_signals.received():
        run_context.request_stop()
        return
      if not cifar10_utils.latest_checkpoint(self._flags.job_dir):
        raise UsageError('--job-dir %s has no checkpoint at the end of the '
                         'training; expected the folder that the chief writes '
                         'to' % self._flags.job_dir)
      time.sleep(0.5)
      self._last_step = time.time()
      step = run_context.session.run(self._global_step)

  def end(self, session):
    self._end = time.time()
    if not self._task.is_chief:
      say_how_ended(self._task, self._flags)
    self._log_end('it is over')

  def _watch(self):
    finished_secs = stopping_secs = 0
    waiting = Waiting(self._task)
    while not self._end:
      time.sleep(1)
      if time.time() - self._last_step < 2:
        waiting = Waiting(self._task)
        continue
      waiting.report(missing_peers(self._task, self._needed))
      finished_secs += not self._task.is_chief and is_finished(self._flags)
      stopping_secs += stop_signals.received() and not self._stops
      if finished_secs > WORKER_GRACE_SECS:
        self._leave('training ended without it')
      if stopping_secs > (STOP_STEP_SECS if self._task.is_chief else 2):
        self._leave('stops within a step; the last checkpoint stands')
    # A session that has lost a peer may take half a minute to close.
    while not self._task.is_chief:
      time.sleep(1)
      if time.time() - self._end > CLOSE_GRACE_SECS:
        leave(stop_signals.exit_status())

  def _leave(self, why):
    """Ends the process: its main thread is inside TensorFlow and stays there.
    """
    if not self._end:
      self._log_end(why)
      say_ended(self._task, 'stopped')
      leave(stop_signals.exit_status())

  def _log_end(self, why):
    tf.logging.info('%s: %s; ends after %d steps of its own', self._task.name,
                    why, self._steps)


def train(classifier, input_fn, task, flags):
  """Trains as the chief or a worker until all have reached --train-steps.

  What the Estimator's train_and_evaluate does here, but with a server that has
  the devices of the session's configuration, which that one leaves out.
  """
  start_server(task, classifier.config.session_config)
  wait_for_peers(task, flags)
  set_recovery_wait_secs(RECOVERY_WAIT_SECS)
  # The chief says when it is over: it saves the last checkpoint.
  classifier.train(
      input_fn, hooks=[ReplicaHook(task, flags)],
      max_steps=flags.train_steps if task.is_chief else None,
      saving_listeners=(
          [nan_guard.FiniteCheckpoints()] if task.is_chief else None))
  # The chief has closed its session by now: without the parameter servers, who
  # end when they hear this, that would take some 20 seconds.
  if task.is_chief:
    say_how_ended(task, flags)


# ---- the end -----------------------------------------------------------------


def leave(status):
  """Ends this process at once: TensorFlow takes seconds to take a server down.
  """
  sys.stdout.flush()
  logging.shutdown()
  os._exit(status)


def is_finished(flags):
  """True if a checkpoint of the last step is there, as far as can be seen."""
  try:
    checkpoint = cifar10_utils.latest_checkpoint(flags.job_dir)
  except tf.errors.OpError:  # a network file system that is away for a moment
    return False
  return bool(checkpoint and cifar10_utils.checkpoint_step(checkpoint) >=
              flags.train_steps)


def _messages(index):
  """The queue on a parameter server in which replicas say how they ended."""
  with tf.device('/job:ps/task:%d' % index):
    return tf.FIFOQueue(1000, tf.string, shapes=[[]], shared_name='ended')


def say_how_ended(task, flags):
  """Tells the parameter servers whether training is over for all."""
  say_ended(task, 'finished' if is_finished(flags) else 'stopped')


def say_ended(task, how):
  """Tells the parameter servers that this replica is 'finished' or 'stopped'.

  One that is not there is left alone: it will see the last checkpoint.
  """
  for i, address in enumerate(task.jobs['ps']):
    if missing_peers(task._replace(jobs={'ps': [address]}), ['ps']):
      continue
    config = tf.ConfigProto(device_filters=['/job:ps/task:%d' % i],
                            operation_timeout_in_ms=5000)
    with tf.Graph().as_default(), tf.Session('grpc://' + address,
                                             config=config) as session:
      try:
        session.run(_messages(i).enqueue('%s %s' % (task.name, how)))
      except tf.errors.OpError as e:
        tf.logging.warning('ps %d did not hear the end: %s', i, e.message)


def serve_parameters(task, flags):
  """Runs a parameter server until all replicas have finished.

  It also ends some seconds after the last checkpoint appeared, because one that
  was restarted has not heard those who finished before; and, when told to stop,
  as soon as the replicas, which were told too, have saved and stopped.
  """
  if is_finished(flags):
    tf.logging.info('Nothing left to serve: training has ended')
    return
  server = start_server(task)
  config = tf.ConfigProto(device_filters=['/job:ps/task:%d' % task.index])
  with tf.Graph().as_default(), stop_signals.noted():
    wait_for_peers(task, flags)
    queue = _messages(task.index)
    size, message = queue.size(), queue.dequeue()
    finished, ended = set(), set()
    finished_secs = stopping_secs = 0
    with tf.Session(server.target, config=config) as session:
      while (len(finished) < task.num_workers and
             finished_secs < PS_GRACE_SECS and
             stopping_secs < STOP_GRACE_SECS and
             not (stopping_secs and len(ended) == task.num_workers)):
        time.sleep(1)
        for _ in range(session.run(size)):
          name, how = session.run(message).decode().rsplit(' ', 1)
          ended.add(name)
          if how == 'finished':
            finished.add(name)
        finished_secs += is_finished(flags)
        stopping_secs += stop_signals.received()
  tf.logging.info('%s: ends', task.name)
  leave(stop_signals.exit_status())
