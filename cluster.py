"""TF_CONFIG -> this process's task in a cluster, its server, and its end.

TensorFlow's own runtime does the work: a gRPC server per process, variables on
the parameter servers. What is here makes it start without guessing, say whom it
waits for, and end everywhere when training is done.
"""
import collections
import json
import os
import socket
import threading
import time

import cifar10_utils
import stop_signals
from tf_compat import set_recovery_wait_secs, tf
from usage import UsageError

KEYS = ('cluster', 'task', 'model_dir', 'environment', 'job')
TASK_KEYS = ('type', 'index', 'trial', 'cloud')
# 2017 said master for what is called chief since.
JOBS = ('chief', 'master', 'worker', 'ps', 'evaluator')

RECOVERY_WAIT_SECS = 3
REPORT_SECS = 30  # between two lines about a missing peer
# After the last checkpoint: what a parameter server gives the replicas to say
# goodbye, and what a worker gives itself to finish its last step.
PS_GRACE_SECS = 8
WORKER_GRACE_SECS = 12
# What a parameter server that was told to stop gives the chief to save.
STOP_GRACE_SECS = 20


class Task(collections.namedtuple('Task', 'jobs type index')):
  """One process of a cluster.

  Attributes:
    jobs: dict of 'chief', 'worker' and 'ps' to their lists of 'host:port'.
    type: 'chief', 'worker', 'ps' or 'evaluator'.
    index: int, which of them.
  """

  @property
  def name(self):
    return '%s %d' % (self.type, self.index)

  @property
  def num_workers(self):
    """Processes that train: the chief and the workers."""
    return 1 + len(self.jobs.get('worker', ()))

  @property
  def worker_index(self):
    """Which of them this is; the chief is 0."""
    return self.index + 1 if self.type == 'worker' else 0

  @property
  def is_chief(self):
    return self.type == 'chief'

  @property
  def trains(self):
    return self.type in ('chief', 'worker')

  def peers(self, *types):
    """List of (name, address) of the other tasks of these types."""
    named = [('%s %d' % (job, i), address)
             for job in types
             for i, address in enumerate(self.jobs.get(job, ()))]
    return [peer for peer in named if peer[0] != self.name]


# ---- TF_CONFIG ---------------------------------------------------------------


def parse_tf_config(text, job_dir=None):
  """Parses the environment variable TF_CONFIG.

  Args:
    text: str, JSON, or empty.
    job_dir: str or None; a `model_dir` in TF_CONFIG must be the same.

  Returns:
    Task, or None where there is only one process, which needs no cluster.

  Raises:
    UsageError: naming the key and what was expected.
  """
  if not text.strip():
    return None
  try:
    config = json.loads(text, object_pairs_hook=_no_duplicates)
  except (ValueError, RecursionError) as e:
    raise UsageError('TF_CONFIG: expected JSON: %s' % e)
  if config == {}:
    return None
  _check_keys('', config, KEYS)
  model_dir = config.get('model_dir', job_dir)
  if job_dir is not None:
    _require(isinstance(model_dir, str) and
             model_dir.rstrip('/') == job_dir.rstrip('/'), 'model_dir',
             model_dir, 'the same as --job-dir %s' % job_dir)
  jobs = _parse_cluster(config.get('cluster'))
  job_type, index = _parse_task(config.get('task'), jobs)
  jobs.pop('evaluator', None)  # TensorFlow: not a part of the cluster
  if len(jobs) == 1 and job_type == 'chief':
    return None
  return Task(jobs, job_type, index)


def _require(condition, key, value, expected):
  if not condition:
    raise UsageError('TF_CONFIG: %s is %s; expected %s' %
                     (key, json.dumps(value), expected))


def _no_duplicates(pairs):
  """json's objects as dicts; a key that is there twice is an error."""
  keys = [key for key, _ in pairs]
  for key in keys:
    if keys.count(key) > 1:
      raise ValueError('key "%s" is there twice' % key)
  return dict(pairs)


def _check_keys(where, value, allowed):
  """`value` must be a dict with these keys only."""
  _require(isinstance(value, dict), where or 'the value', value, 'an object')
  for key in value:
    if key not in allowed:
      raise UsageError('TF_CONFIG: %s is no key of %s; expected %s' % (
          json.dumps(key), where or 'TF_CONFIG', ', '.join(allowed)))


def _parse_cluster(value):
  """Returns dict of job to list of unique addresses, 'chief' for 'master'."""
  _check_keys('cluster', value, JOBS)
  _require(not ('chief' in value and 'master' in value), 'cluster', value,
           'either chief or master, which is its old name')
  jobs = {'chief' if job == 'master' else job: addresses
          for job, addresses in value.items()}
  _require('chief' in jobs, 'cluster', value, 'a chief')
  seen = set()
  for job, addresses in jobs.items():
    key = 'cluster.' + job
    _require(isinstance(addresses, list) and addresses, key, addresses,
             'a list of host:port')
    for address in addresses:
      _require(_is_address(address), key, address,
               'host:port with a port from 1 to 65535')
      _require(address not in seen, key, address,
               'addresses that are used once')
      seen.add(address)
  for job in ('chief', 'evaluator'):
    _require(len(jobs.get(job, 'x')) == 1, 'cluster.' + job, jobs.get(job),
             'one address')
  _require('worker' not in jobs or 'ps' in jobs, 'cluster', value,
           'a ps where there are workers')
  return jobs


def _is_address(value):
  if not isinstance(value, str):
    return False
  host, colon, port = value.rpartition(':')
  return bool(host and colon and not set(host) & set('/ \t\n') and
              port.isascii() and port.isdigit() and len(port) <= 5 and
              0 < int(port) <= 65535)


def _parse_task(value, jobs):
  """Returns (type, index) of this process."""
  _check_keys('task', value, TASK_KEYS)
  job_type = value.get('type')
  _require(job_type in JOBS, 'task.type', job_type,
           'one of ' + ', '.join(JOBS))
  if job_type == 'master':
    job_type = 'chief'
  _require(job_type in jobs or job_type == 'evaluator', 'task.type', job_type,
           'one that is in cluster: ' + ', '.join(sorted(jobs)))
  count = len(jobs.get(job_type, 'x'))
  index = value.get('index')
  if isinstance(index, str) and index.isascii() and index.isdigit():
    index = int(index)  # some launchers quote it
  _require(type(index) is int and 0 <= index < count, 'task.index', index,
           'an integer from 0 to %d' % (count - 1))
  return job_type, index


def read_task(flags):
  """This process's Task from the environment, checked against the flags.

  Parameter servers and evaluators compute on the CPU: they leave the GPUs to
  others, also where all processes are started with the same flags.
  """
  task = parse_tf_config(os.environ.get('TF_CONFIG', ''), flags.job_dir)
  num_workers = task.num_workers if task else 1
  if flags.num_workers not in (None, num_workers):
    raise UsageError('--num-workers %d: TF_CONFIG has %d, counting the chief' %
                     (flags.num_workers, num_workers))
  if task and not task.trains:
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    flags.num_gpus = None
  return task


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


class SyncHook(tf.train.SessionRunHook):
  """The hook of SyncReplicasOptimizer, with a clean end.

  Its token queue runner on the chief would keep the session open for 120 s; a
  coordinator of its own, stopped first, ends it.
  """

  def __init__(self, optimizer, is_chief):
    self._hook = optimizer.make_session_run_hook(is_chief)
    self._coord = None

  def begin(self):
    self._hook.begin()

  def after_create_session(self, session, coord):
    self._coord = tf.train.Coordinator()
    self._hook.after_create_session(session, self._coord)

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


def wait_for_peers(task, flags, resuming):
  """Returns once the peers answer; names those that do not every 30 s.

  At the start of a training everyone is waited for. One that goes on needs the
  parameter servers and the chief: other workers may have ended already.

  Raises:
    SystemExit: status 1 after --start-timeout-secs; 0 if training is over
      or a signal came.
  """
  types = ('ps', 'chief') if resuming else ('ps', 'chief', 'worker')
  start = reported = time.time()
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
    if waited < 2 or time.time() - reported >= REPORT_SECS:
      reported = time.time()
      tf.logging.info('%s: waiting for %s', task.name, ', '.join(missing))
    time.sleep(1)


class PeersHook(tf.train.SessionRunHook):
  """Names lost peers while no step is made; lets no worker outlive training.

  TensorFlow retries by itself and in silence until a peer is back. A worker
  that is in the middle of it when the others end would never end.
  """

  def __init__(self, task, flags):
    self._task = task
    self._flags = flags
    self.steps = 0
    self._last_step = time.time()
    self._ended = False
    thread = threading.Thread(target=self._watch)
    thread.daemon = True
    thread.start()

  def after_run(self, run_context, run_values):
    self.steps += 1
    self._last_step = time.time()

  def end(self, session):
    self._ended = True

  def _watch(self):
    finished_secs = 0
    while not self._ended:
      time.sleep(1)
      if time.time() - self._last_step < 2:
        continue
      if int(time.time() - self._last_step) % REPORT_SECS == 0:
        for peer in missing_peers(self._task, ('ps', 'chief')):
          tf.logging.info('%s: waiting for %s', self._task.name, peer)
      finished_secs += self._task.type == 'worker' and is_finished(self._flags)
      if finished_secs > WORKER_GRACE_SECS and not self._ended:
        tf.logging.info('%s: training ended without it', self._task.name)
        os._exit(0)  # the main thread is inside TensorFlow and stays there


# ---- replicas ----------------------------------------------------------------


def train(classifier, input_fn, task, flags):
  """Trains as the chief or a worker until all have reached --train-steps.

  What the Estimator's train_and_evaluate does here, but with a server that has
  the devices of the session's configuration, which that one leaves out.
  """
  start_server(task, classifier.config.session_config)
  wait_for_peers(task, flags,
                 resuming=cifar10_utils.latest_checkpoint(flags.job_dir))
  set_recovery_wait_secs(RECOVERY_WAIT_SECS)
  hook = PeersHook(task, flags)
  classifier.train(input_fn, max_steps=flags.train_steps, hooks=[hook])
  say_ended(task, 'stopped' if stop_signals.received() else 'finished')
  tf.logging.info('%s: ends after %d steps of its own', task.name, hook.steps)


# ---- the end -----------------------------------------------------------------


def is_finished(flags):
  """True if a checkpoint of the last step is there."""
  checkpoint = cifar10_utils.latest_checkpoint(flags.job_dir)
  return bool(checkpoint and cifar10_utils.checkpoint_step(checkpoint) >=
              flags.train_steps)


def _messages(index):
  """The queue on a parameter server in which replicas say how they ended."""
  with tf.device('/job:ps/task:%d' % index):
    return tf.FIFOQueue(1000, tf.string, shapes=[[]], shared_name='ended')


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
  as soon as the chief has saved.
  """
  if is_finished(flags):
    tf.logging.info('Nothing left to serve: training has ended')
    return
  server = start_server(task)
  config = tf.ConfigProto(device_filters=['/job:ps/task:%d' % task.index])
  with tf.Graph().as_default(), stop_signals.noted():
    queue = _messages(task.index)
    size, message = queue.size(), queue.dequeue()
    heard = set()
    finished_secs = stopping_secs = 0
    with tf.Session(server.target, config=config) as session:
      while (finished_secs < PS_GRACE_SECS and
             stopping_secs < STOP_GRACE_SECS and
             sum(m.endswith('finished') for m in heard) < task.num_workers):
        time.sleep(1)
        for _ in range(session.run(size)):
          heard.add(session.run(message).decode())
        finished_secs += is_finished(flags)
        stopping_secs += stop_signals.received()
        if stopping_secs and any(m.startswith('chief') for m in heard):
          break
  tf.logging.info('%s: ends', task.name)
