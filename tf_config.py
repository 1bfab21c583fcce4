"""TF_CONFIG -> which process of which cluster this is, strictly checked."""
import collections
import json
import os
import re

from usage import UsageError

KEYS = ('cluster', 'task', 'model_dir', 'environment', 'job')
TASK_KEYS = ('type', 'index', 'trial', 'cloud')
# 2017 said master for what is called chief since.
JOBS = ('chief', 'master', 'worker', 'ps', 'evaluator')
# Names of labels of at most 63 characters, IPv4 and, in brackets, IPv6.
ADDRESS = re.compile(
    r'(([A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?|'
    r'\[[0-9A-Fa-f:.]+(%[A-Za-z0-9]+)?\]):(?P<port>[1-9][0-9]{0,4})')


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
             os.path.abspath(model_dir) == os.path.abspath(job_dir),
             'model_dir', model_dir, 'the same as --job-dir %s' % job_dir)
  jobs = _parse_cluster(config.get('cluster'))
  job_type, index = _parse_task(config.get('task'), jobs)
  jobs.pop('evaluator', None)  # TensorFlow: not a part of the cluster
  if len(jobs) == 1 and job_type == 'chief':
    return None
  return Task(jobs, job_type, index)


def _require(condition, key, value, expected):
  if not condition:
    raise UsageError('TF_CONFIG: %s is %s; expected %s' %
                     (key, _show(value), expected))


def _show(value):
  """The value as JSON, cut where it is too long for a line."""
  try:
    text = json.dumps(value)
  except RecursionError:  # json reads a little deeper than it writes
    return 'nested too deeply'
  return text if len(text) <= 200 else text[:200] + '...'


def _no_duplicates(pairs):
  """json's objects as dicts; a key that is there twice is an error."""
  keys = [key for key, _ in pairs]
  for key in keys:
    if keys.count(key) > 1:
      raise ValueError('key %s is there twice' % _show(key))
  return dict(pairs)


def _check_keys(where, value, allowed):
  """`value` must be a dict with these keys only."""
  _require(isinstance(value, dict), where or 'the value', value, 'an object')
  for key in value:
    if key not in allowed:
      raise UsageError('TF_CONFIG: %s is no key of %s; expected %s' % (
          _show(key), where or 'TF_CONFIG', ', '.join(allowed)))


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
      _require(address.lower() not in seen, key, address,
               'addresses that are used once')
      seen.add(address.lower())
  for job in ('chief', 'evaluator'):
    _require(len(jobs.get(job, 'x')) == 1, 'cluster.' + job, jobs.get(job),
             'one address')
  _require('worker' not in jobs or 'ps' in jobs, 'cluster', value,
           'a ps where there are workers')
  return jobs


def _is_address(value):
  match = isinstance(value, str) and ADDRESS.fullmatch(value)
  return bool(match) and int(match.group('port')) <= 65535


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
  if isinstance(index, str) and re.fullmatch('[0-9]{1,9}', index):
    index = int(index)  # some launchers quote it
  _require(type(index) is int and 0 <= index < count, 'task.index', index,
           'an integer from 0 to %d' % (count - 1))
  return job_type, index
