"""TF_CONFIG: what is accepted, and what is refused in one line."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, error_lines

import tf_config
import usage

CLUSTER = {'chief': ['a:1'], 'worker': ['b:1', 'c:1'], 'ps': ['d:1']}


def config(cluster=None, **task):
  return {'cluster': cluster or CLUSTER,
          'task': task or {'type': 'worker', 'index': 0}}


def clustered(**jobs):
  """A config for the chief whose cluster has these jobs, too."""
  return config(dict(CLUSTER, **jobs), type='chief', index=0)


def parse(value, job_dir='job'):
  return tf_config.parse_tf_config(json.dumps(value), job_dir)


MALFORMED = [
    ('{', 'expected JSON'),
    ('chief', 'expected JSON'),
    ('[' * 100000, 'expected JSON'),
    ('{"task": {}, "task": {}}', 'key "task" is there twice'),
    ([], 'the value is []; expected an object'),
    (None, 'the value is null; expected an object'),
    ({'clutser': {}}, '"clutser" is no key of TF_CONFIG; expected cluster'),
    ({'task': {'type': 'chief', 'index': 0}}, 'cluster is null; expected an'),
    ({'cluster': CLUSTER}, 'task is null; expected an object'),
    (config(['a:1']), 'cluster is ["a:1"]; expected an object'),
    (clustered(wroker=['e:1']), '"wroker" is no key of cluster'),
    (clustered(master=['e:1']), 'expected either chief or master'),
    (config({'worker': ['b:1'], 'ps': ['d:1']}), 'expected a chief'),
    (config({'chief': ['a:1'], 'worker': ['b:1']}), 'expected a ps where'),
    (clustered(chief=['a:1', 'e:1']), 'cluster.chief is ["a:1", "e:1"]; '
     'expected one address'),
    (clustered(evaluator=['e:1', 'f:1']), 'cluster.evaluator is'),
    (clustered(worker=[]), 'cluster.worker is []; expected a list of'),
    (clustered(worker='b:1'), 'cluster.worker is "b:1"; expected a list'),
    (clustered(worker=[1]), 'cluster.worker is 1; expected host:port'),
    (clustered(worker=['b..c:1']), 'cluster.worker is "b..c:1"; expected'),
    (clustered(worker=[64 * 'b' + ':1']), '"; expected host:port'),
    (config(type='worker', index=5000 * '9'), 'expected an integer from 0'),
    (clustered(worker=['b']), 'cluster.worker is "b"; expected host:port'),
    (clustered(worker=['b:']), 'cluster.worker is "b:"'),
    (clustered(worker=[':1']), 'cluster.worker is ":1"'),
    (clustered(worker=['b:0']), 'with a port from 1 to 65535'),
    (clustered(worker=['b:65536']), 'with a port from 1 to 65535'),
    (clustered(worker=['b:\u0661']), 'with a port from 1 to 65535'),
    (clustered(worker=['b:1 ']), 'cluster.worker is "b:1 "'),
    (clustered(worker=['::1:1']), 'cluster.worker is "::1:1"'),
    (clustered(worker=['grpc://b:1']), 'cluster.worker is "grpc://b:1"'),
    (clustered(worker=['B:1', 'b:1']), '"b:1"; expected addresses that are '
     'used once'),
    (clustered(ps=['a:1']), '"a:1"; expected addresses that are used once'),
    (config(type='chief'), 'task.index is null; expected an integer from 0 to '
     '0'),
    (config(type='worker', index=2), 'task.index is 2; expected an integer '
     'from 0 to 1'),
    (config(type='worker', index=-1), 'task.index is -1'),
    (config(type='worker', index=True), 'task.index is true'),
    (config(type='worker', index=0.0), 'task.index is 0.0'),
    (config(type='worker', index='one'), 'task.index is "one"'),
    (config(type='evaluator', index=1), 'task.index is 1; expected an integer '
     'from 0 to 0'),
    (config(index=0), 'task.type is null; expected one of chief'),
    (config(type='server', index=0), 'task.type is "server"; expected one of'),
    (config(type=['chief'], index=0), 'task.type is ["chief"]'),
    (config({'chief': ['a:1'], 'ps': ['d:1']}, type='worker', index=0),
     'task.type is "worker"; expected one that is in cluster: chief, ps'),
    (config(type='chief', index=0, name='x'), '"name" is no key of task'),
    (dict(config(), model_dir='other'), 'model_dir is "other"; expected the '
     'same as --job-dir job'),
    (dict(config(), model_dir=None), 'model_dir is null'),
    ({10**4 * 'x': 1}, '"%s... is no key of' % (199 * 'x')),
    ('{"a\\nb": 1, "a\\nb": 1}', 'key "a\\nb" is there twice'),
]


@pytest.mark.parametrize('value, message', MALFORMED)
def test_malformed_configs_name_the_key_and_what_was_expected(value, message):
  text = value if isinstance(value, str) else json.dumps(value)
  with pytest.raises(usage.UsageError) as error:
    tf_config.parse_tf_config(text, 'job')
  assert str(error.value).startswith('TF_CONFIG: ')
  assert message in str(error.value)
  assert '\n' not in str(error.value)


# Runs the command once per TF_CONFIG in one process: TensorFlow loads once.
# A port that is opened, or a server that starts, is an error.
MANY_COMMANDS = r"""
import json, os, socket, sys
import cifar10_main, usage
from tf_compat import tf, use_graph_mode
def refuse(*args, **kwargs):
  os.write(2, b'A PORT WAS OPENED\n')
  os._exit(1)
socket.socket.bind = socket.socket.connect = refuse
tf.train.Server = socket.create_connection = refuse
use_graph_mode()
for text in json.load(sys.stdin):
  os.environ['TF_CONFIG'] = text
  try:
    usage.run(cifar10_main.build_parser(), cifar10_main.main, sys.argv[1:])
    print('accepted')
  except SystemExit as e:
    print(e.code)
"""


def test_the_command_refuses_each_in_one_line_and_opens_no_port(
    digits_dir, tmp_path):
  texts = [v if isinstance(v, str) else json.dumps(v) for v, _ in MALFORMED]
  done = subprocess.run(
      [sys.executable, '-c', MANY_COMMANDS, '--data-dir', digits_dir,
       '--job-dir', 'job', '--num-layers', '8'],
      input=json.dumps(texts), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      universal_newlines=True, cwd=str(tmp_path), timeout=200,
      env=dict(os.environ, PYTHONPATH=ROOT))
  assert done.stdout.split() == ['2'] * len(texts)
  lines = [line for line in done.stderr.splitlines() if 'error: ' in line]
  assert len(lines) == len(texts) >= 25
  for line, (_, message) in zip(lines, MALFORMED):
    assert message in line
  assert 'A PORT WAS OPENED' not in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'job').exists()


def test_a_real_process_ends_with_one_line_and_status_2(digits_dir, tmp_path):
  done = subprocess.run(
      [sys.executable, os.path.join(ROOT, 'cifar10_main.py'), '--data-dir',
       digits_dir, '--job-dir', str(tmp_path / 'job')],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
      timeout=200, env=dict(os.environ, TF_CONFIG='{"cluster": {}}'))
  assert done.returncode == 2
  assert error_lines(done.stderr) == [
      'cifar10_main.py: error: TF_CONFIG: cluster is {}; expected a chief']
  assert not (tmp_path / 'job').exists()


# ---- what is accepted --------------------------------------------------------


@pytest.mark.parametrize('text', ['', ' ', '{}', '\n{ }'])
def test_an_empty_config_is_a_process_on_its_own(text):
  assert tf_config.parse_tf_config(text) is None


def test_a_chief_alone_is_a_process_on_its_own():
  for evaluator in ({}, {'evaluator': ['e:1']}):
    assert parse(config(dict({'chief': ['a:1']}, **evaluator),
                        type='chief', index=0)) is None


def test_master_is_an_old_name_of_the_chief():
  task = parse(config({'master': ['a:1'], 'ps': ['d:1']}, type='master',
                      index=0))
  assert task == ({'chief': ['a:1'], 'ps': ['d:1']}, 'chief', 0)
  assert task.is_chief
  assert parse(config({'master': ['a:1'], 'ps': ['d:1']}, type='chief',
                      index=0)) == task


def test_workers_are_counted_with_the_chief_first():
  tasks = [parse(config(type=job, index=index))
           for job, index in (('chief', 0), ('worker', 0), ('worker', '1'))]
  assert [task.worker_index for task in tasks] == [0, 1, 2]
  assert [task.num_workers for task in tasks] == [3, 3, 3]
  assert parse(config({'chief': ['a:1'], 'ps': ['d:1']}, type='ps',
                      index=0)).num_workers == 1


def test_the_evaluator_may_be_in_the_cluster_or_not():
  for evaluator in ({}, {'evaluator': ['e:1']}):
    task = parse(config(dict(CLUSTER, **evaluator), type='evaluator', index=0))
    assert (task.type, task.jobs, task.trains) == ('evaluator', CLUSTER, False)


def test_what_launchers_add_is_accepted():
  # Kubeflow's operator sets environment; others quote the index.
  task = parse(dict(config(type='worker', index='1', trial='1'),
                    environment='cloud', model_dir='job/'))
  assert (task.type, task.index) == ('worker', 1)
  assert parse(dict(config(), model_dir='./job')) == parse(config())


@pytest.mark.parametrize('address', [
    'localhost:1', '10.0.0.1:65535', '[::1]:2222', '[fe80::1%eth0]:2222',
    'job-worker-0.default.svc:2222', 'my_host:80'])
def test_names_and_both_kinds_of_ip_addresses_are_accepted(address):
  assert parse(clustered(worker=[address])).jobs['worker'] == [address]


def test_peers_are_the_others():
  task = parse(config(type='worker', index=0))
  assert task.peers('ps', 'chief', 'worker') == [
      ('ps 0', 'd:1'), ('chief 0', 'a:1'), ('worker 1', 'c:1')]
