"""Clusters of real processes on loopback; placement and waiting without them.
"""
import argparse
import collections
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from clusters import Cluster
from conftest import ROOT

import cifar10_main
import cifar10_utils
import cluster
import local_cluster
import model_fn
import tf_config
from tf_compat import estimator, tf

INTERVAL = 40  # steps between checkpoints
CONSTANT_RATE = ['--lr-boundaries-epochs', '', '--lr-factors', '1']
# Seconds from the last checkpoint to the end of the last process; they share
# two cores here.
END_SECS = 15


def flags(steps, *args):
  return CONSTANT_RATE + ['--train-steps', steps, '--save-checkpoints-steps',
                          INTERVAL] + list(args)


def last_save(c):
  return os.path.getmtime(os.path.join(c.job_dir, 'checkpoint'))


def result(c):
  """Accuracy and global step of the chief's last line."""
  found = re.findall(r'^eval: accuracy=(\S+) loss=\S+ global_step=(\d+)',
                     c.log('chief 0'), re.MULTILINE)
  return float(found[-1][0]), int(found[-1][1])


def losses(c, task='chief 0'):
  return [float(x) for x in re.findall(r' loss = ([\d.]+)', c.log(task))]


def evaluated_steps(c):
  folder = os.path.join(c.job_dir, 'eval')
  return {e.step for name in os.listdir(folder)
          for e in tf.train.summary_iterator(os.path.join(folder, name))
          for v in e.summary.value if v.tag == 'accuracy'}


# ---- trainings of real processes ---------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('sync, ps', [(False, 1), (False, 2), (True, 1),
                                      (True, 2)])
def test_a_cluster_learns_and_all_its_processes_end(digits_dir, tmp_path, sync,
                                                    ps):
  steps = 160 if sync else 320
  # At the full rate, gradients that are some steps old make the end noisy.
  rate = ['--lr-boundaries-epochs', 5, '--lr-factors', '1,0.1']
  with Cluster(tmp_path, digits_dir, workers=2, ps=ps,
               args=flags(steps, *rate + ['--sync'] * sync)) as c:
    c.start()
    c.start('evaluator 0')
    statuses, ends = c.wait(300)
    own = c.own_steps()
    accuracy, step = result(c)
    assert set(statuses.values()) == {0}
    assert max(ends.values()) - last_save(c) < END_SECS
    assert steps <= step <= steps + 3
    assert accuracy > 0.9  # chance is 0.1
    assert min(own.values()) > 0
    # Every local step is a gradient of one global step.
    assert abs(sum(own.values()) - (3 if sync else 1) * step) <= 3
    assert losses(c)[-1] < losses(c)[0]
    assert step in evaluated_steps(c)

    c.start('worker 0', 'ps 0')  # after the end
    statuses, _ = c.wait(60, ['worker 0', 'ps 0'])
    assert set(statuses.values()) == {0}
    assert 'Nothing left to train' in c.log('worker 0')


@pytest.mark.slow
@pytest.mark.parametrize('sync', [False, True])
def test_any_process_can_be_killed_and_started_again(digits_dir, tmp_path,
                                                     sync):
  # Enough steps for four kills; the chief ends them early by SIGTERM.
  with Cluster(tmp_path, digits_dir, workers=2, ps=1,
               args=flags(4000, *['--sync'] * sync)) as c:
    c.start()
    c.start('evaluator 0')
    c.wait_for_step(INTERVAL)
    for task in ('worker 1', 'chief 0', 'ps 0', 'evaluator 0'):
      before = c.wait_for_step(c.checkpoints()[-1] + 1)
      length = len(c.log(task))
      c.kill(task)
      c.start(task)
      begin = time.time()
      # Training goes on from a checkpoint of at least `before`.
      c.wait_for_step(before + INTERVAL)
      assert time.time() - begin < 60
      if task == 'chief 0':
        restored = c.wait_for_log(
            task, r'Restoring parameters from \S+-(\d+)', after=length)
        assert int(restored.group(1)) >= before
      others = set(c.processes) - {task}
      assert [t for t in others if c.processes[t].poll() is not None] == []
    c.wait_for_log('evaluator 0', 'Finished evaluation', after=length)

    stopped_at = c.checkpoints()[-1]
    for task in c.processes:
      c.kill(task, signal.SIGTERM)
    statuses, _ = c.wait(60)
    assert set(statuses.values()) == {0}
    assert c.checkpoints()[-1] >= stopped_at
    assert 'saving a checkpoint first' in c.log('chief 0')

    # The last flag counts. At the full rate an asynchronous end is noisy.
    steps = c.checkpoints()[-1] + 2 * INTERVAL
    last = ['--train-steps', str(steps), '--lr-boundaries-epochs', '1',
            '--lr-factors', '1,0.1']
    for task in c.processes:
      c.start(task, args=last)
    statuses, _ = c.wait(240)
    assert set(statuses.values()) == {0}
    accuracy, step = result(c)
    assert steps <= step <= steps + 3
    assert accuracy > 0.9


@pytest.mark.slow
def test_a_chief_killed_after_the_last_step_finds_its_workers(digits_dir,
                                                              tmp_path):
  # The only checkpoint is that of step 0: all must be trained again, in
  # step, which the chief cannot do alone.
  steps = 30
  with Cluster(tmp_path, digits_dir, args=CONSTANT_RATE + [
      '--train-steps', steps, '--sync', '--save-checkpoints-steps', 1000]) as c:
    c.start()
    c.wait_for_step(0)
    c.kill('chief 0', signal.SIGSTOP)
    time.sleep(2)
    c.kill('chief 0')
    c.start('chief 0')
    statuses, _ = c.wait(240)
    assert set(statuses.values()) == {0}
    assert result(c)[1] == steps


@pytest.mark.slow
def test_towers_in_the_workers_of_a_cluster(digits_dir, tmp_path):
  with Cluster(tmp_path, digits_dir, ps=2, args=flags(
      40, '--sync', '--virtual-devices', 2, '--variable-strategy', 'GPU',
      '--log-device-placement')) as c:
    c.start()
    statuses, _ = c.wait(240)
    assert set(statuses.values()) == {0}
    rows = re.findall(r'^/job:ps/(?:replica:0/)?task:(\d)\S* +(\d+) +(\d+)$',
                      c.log('worker 0'), re.MULTILINE)
    sizes = collections.Counter()
    for task, _, size in rows:
      sizes[task] += int(size)
    assert sorted(sizes) == ['0', '1']
    # They differ by less than the largest variable and its slot.
    assert abs(sizes['0'] - sizes['1']) <= 2 * 4 * 3 * 3 * 64 * 64


@pytest.mark.slow
@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 0),
                                            (signal.SIGINT, 130)])
def test_signals_to_a_local_cluster_save_and_stop_it(digits_dir, tmp_path,
                                                     number, status):
  with Cluster(tmp_path, digits_dir, args=flags(
      5000, '--local-cluster', 'worker=1,ps=1,evaluator=1')) as c:
    c.jobs = {'chief': ['a:1']}  # on its own; it starts the others itself
    c.start('chief 0')
    saved = c.wait_for_step(INTERVAL)
    c.kill('chief 0', number)
    assert c.wait(60)[0] == {'chief 0': status}
    log = c.log('chief 0')
    assert '[chief 0] INFO:tensorflow:Stopping: saving a checkpoint' in log
    assert c.checkpoints()[-1] >= saved
    for task in ('ps 0', 'worker 0', 'evaluator 0'):
      assert '[%s] ' % task in log


@pytest.mark.slow
def test_synchronous_steps_are_exact(tmp_path):
  steps = 60
  with Cluster(tmp_path, '', workers=2, ps=2, command=[
      sys.executable, os.path.join(ROOT, 'tests', 'toy_sync.py'),
      str(tmp_path / 'job'), str(steps)]) as c:
    c.start()
    assert set(c.wait(120)[0].values()) == {0}
    found = json.loads(c.log('chief 0').splitlines()[-1])
    assert found['global_step'] == steps
    assert found['constant'] == -steps * 0.5 * 3
    # Had a gradient of an older step been applied, this would be smaller.
    assert found['steps'] == -0.5 * sum(range(steps))
    assert c.own_steps() == {'chief 0': steps, 'worker 0': steps,
                             'worker 1': steps}


# ---- starting ----------------------------------------------------------------


def test_a_missing_peer_is_named_and_ends_the_wait(digits_dir, tmp_path):
  with Cluster(tmp_path, digits_dir,
               args=['--start-timeout-secs', 3, '--train-steps', 5]) as c:
    c.start('chief 0', 'ps 0')
    statuses, _ = c.wait(120)
    assert statuses == {'chief 0': 1, 'ps 0': 1}
    worker = 'worker 0 at ' + c.jobs['worker'][0]
    assert 'chief 0: waiting for ' in c.log('chief 0')
    for task in ('chief 0', 'ps 0'):
      assert re.search(r'%s: gave up after \d+ s without .*%s' %
                       (task, worker), c.log(task))
    assert c.checkpoints() == []


def waiting_task(**jobs):
  return tf_config.Task(jobs, 'chief', 0)


def test_waiting_is_told_at_once_and_every_30_seconds(monkeypatch):
  now = [1000.]
  lines = []
  monkeypatch.setattr(cluster.time, 'time', lambda: now[0])
  monkeypatch.setattr(cluster.tf.logging, 'info',
                      lambda text, *args: lines.append((now[0], text % args)))
  waiting = cluster.Waiting(waiting_task())
  for now[0] in range(1000, 1100):
    waiting.report(['ps 0 at a:1', 'worker 1 at b:1'] if now[0] > 1004 else [])
  text = 'chief 0: waiting for ps 0 at a:1, worker 1 at b:1'
  assert lines == [(t, text) for t in (1005, 1035, 1065, 1095)]


def test_peers_that_answer_are_not_missing():
  ports = local_cluster.free_ports(2)
  with socket.socket() as server:
    server.bind(('127.0.0.1', ports[0]))
    server.listen(1)
    task = waiting_task(chief=['127.0.0.1:9'],
                        ps=['127.0.0.1:%d' % port for port in ports])
    assert cluster.missing_peers(task, ('ps', 'chief')) == [
        'ps 1 at 127.0.0.1:%d' % ports[1]]


def test_a_port_that_is_taken_is_named():
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    server.listen(1)
    address = '127.0.0.1:%d' % server.getsockname()[1]
    task = waiting_task(chief=[address], ps=['127.0.0.1:9'])
    with pytest.raises(ValueError, match='cluster.chief: no server on ' +
                       address):
      cluster.start_server(task)


# ---- flags and placement -----------------------------------------------------


def read_task(monkeypatch, job, index=0, *args):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1')
  monkeypatch.setenv('TF_CONFIG', json.dumps({
      'cluster': {'chief': ['a:1'], 'worker': ['b:1', 'c:1'],
                  'ps': ['d:1', 'e:1']},
      'task': {'type': job, 'index': index}}))
  values = cifar10_main.build_parser().parse_args(
      ['--data-dir', 'data', '--job-dir', 'job'] + list(args))
  return cluster.read_task(values), values


@pytest.mark.parametrize('job', ['ps', 'evaluator'])
def test_parameter_servers_and_evaluators_leave_the_gpus(monkeypatch, job):
  _, values = read_task(monkeypatch, job, 0, '--num-gpus', '2',
                        '--variable-strategy', 'GPU', '--data-format',
                        'channels_first')
  assert os.environ['CUDA_VISIBLE_DEVICES'] == ''
  assert values.num_gpus is None
  assert values.variable_strategy == 'CPU'
  assert values.data_format is None


@pytest.mark.parametrize('job', ['chief', 'worker'])
def test_those_that_train_keep_their_gpus(monkeypatch, job):
  _, values = read_task(monkeypatch, job, 0, '--num-gpus', '2')
  assert os.environ['CUDA_VISIBLE_DEVICES'] == '0,1'
  assert values.num_gpus == 2


def test_the_number_of_workers_is_checked(monkeypatch):
  task, _ = read_task(monkeypatch, 'worker', 1, '--num-workers', '3')
  assert (task.num_workers, task.worker_index) == (3, 2)
  with pytest.raises(ValueError, match='--num-workers 2: TF_CONFIG has 3'):
    read_task(monkeypatch, 'worker', 1, '--num-workers', '2')


def training_graph(monkeypatch, job, *args):
  """Variables of a replica's training graph, as the Estimator builds it."""
  task, values = read_task(monkeypatch, job, 0, *args)
  vars(values).update(num_gpus=0, data_format='channels_last', learning_rate=.1,
                      num_examples=1000, job_dir='')
  config = tf.ConfigProto()
  arguments = cluster.run_config_arguments(task, config)
  with tf.device(arguments['device_fn']):
    tf.train.get_or_create_global_step()
    towers = max(1, values.virtual_devices)
    fn = model_fn.get_model_fn(0, values.variable_strategy, task.num_workers,
                               values.virtual_devices)
    fn([tf.zeros([4, 32, 32, 3])] * towers, [tf.zeros([4], tf.int32)] * towers,
       estimator.ModeKeys.TRAIN, values, estimator.RunConfig(
           session_config=config, **arguments))
  return config, tf.global_variables()


@pytest.mark.parametrize('args', [
    ['--num-layers', '8'], ['--num-layers', '8', '--sync'],
    ['--num-layers', '8', '--virtual-devices', '2']])
def test_variables_and_slots_are_spread_by_bytes(monkeypatch, args):
  _, variables = training_graph(monkeypatch, 'worker', *args)
  sizes = collections.Counter()
  largest = 0
  for v in variables:
    size = v.dtype.size * v.shape.num_elements()
    sizes[tf.DeviceSpec.from_string(v.device).task] += size
    largest = max(size, largest)
    assert tf.DeviceSpec.from_string(v.device).job == 'ps'
  assert sorted(sizes) == [0, 1]
  assert abs(sizes[0] - sizes[1]) <= 2 * largest
  place = {v.op.name: v.device for v in variables}
  slots = [name for name in place if name.endswith('/Momentum')]
  assert len(slots) == len(tf.trainable_variables())
  for name in slots:
    assert place[name] == place[name[:-len('/Momentum')]]


def test_all_replicas_place_the_variables_alike(monkeypatch):
  places = []
  for job in ('chief', 'worker'):
    with tf.Graph().as_default():
      _, variables = training_graph(monkeypatch, job, '--num-layers', '8')
      places.append([(v.op.name, v.device) for v in variables])
  assert places[0] == places[1]


def test_towers_send_one_gradient_and_compute_on_their_worker(monkeypatch):
  config, _ = training_graph(monkeypatch, 'worker', '--num-layers', '8',
                             '--virtual-devices', '2')
  assert list(config.device_filters) == ['/job:ps', '/job:worker/task:0']
  for op in tf.get_default_graph().get_operations():
    if op.type in ('Conv2D', 'Conv2DBackpropFilter') or (
        op.name.startswith('gradient_averaging')):
      device = tf.DeviceSpec.from_string(op.device)
      assert (device.job, device.task) == ('worker', 0), op.name


@pytest.mark.parametrize('args, steps', [([], 82 * 10), (['--sync'], 82 * 3)])
def test_boundaries_count_the_global_steps_of_an_epoch(monkeypatch, args,
                                                       steps):
  # 1000 examples in batches of 100: ten global steps, or, all three in one, 3.
  _, values = read_task(monkeypatch, 'chief', 0, '--train-batch-size', '100',
                        *args)
  assert cifar10_utils.learning_rate_steps(
      1000, cifar10_utils.examples_per_step(values, 3),
      values.lr_boundaries_epochs)[0] == steps


def test_only_the_chief_writes_to_the_job_directory(monkeypatch):
  written = []

  class Hook(tf.train.SessionRunHook):
    def __init__(self, *args, **kwargs):
      written.append(kwargs['output_dir'])

  monkeypatch.setattr(cifar10_utils, 'ExamplesPerSecondHook', Hook)
  for is_chief in (True, False):
    with tf.Graph().as_default():
      task, values = read_task(monkeypatch, 'chief')
      vars(values).update(num_gpus=0, data_format='channels_last',
                          learning_rate=.1, num_examples=1000, num_layers=8)
      tf.train.get_or_create_global_step()
      model_fn.get_model_fn(0, 'CPU', 3)(
          [tf.zeros([4, 32, 32, 3])], [tf.zeros([4], tf.int32)],
          estimator.ModeKeys.TRAIN, values,
          argparse.Namespace(is_chief=is_chief, num_ps_replicas=0))
  assert written == ['job', None]


def test_a_step_reads_the_variables_once_and_sends_one_gradient(monkeypatch):
  """The bytes between worker and parameter servers that docs/cluster.md says.
  """
  _, variables = training_graph(monkeypatch, 'worker', '--num-layers', '44',
                                '--virtual-devices', '2')
  sizes = {v.op.name: v.dtype.size * v.shape.num_elements() for v in variables}
  read = [op.inputs[0].op.name for op in tf.get_default_graph().get_operations()
          if op.type == 'ReadVariableOp' and any(
              'worker' in consumer.device
              for consumer in op.outputs[0].consumers())]
  trained = [v.op.name for v in tf.trainable_variables()]
  assert sum(sizes[name] for name in trained) == 2634604
  # What creates a variable and what the steps use read it once each; only the
  # latter is cached on the worker.
  for name in trained:
    assert read.count(name) == 1, name
  # The average over the towers is made on the worker, once for each parameter.
  averages = [op for op in tf.get_default_graph().get_operations()
              if op.type == 'Mul' and
              op.name.startswith('gradient_averaging/')]
  assert 4 * sum(op.outputs[0].shape.num_elements()
                 for op in averages) == 2634604
  assert all('/job:worker/task:0' in op.device for op in averages)


# Trains where only TensorFlow can read and write: in its memory.
IN_MEMORY = """
import os, sys
import cifar10_main
from tf_compat import tf, use_graph_mode
use_graph_mode()
try:
  tf.gfile.MakeDirs('ram://data')
except tf.errors.UnimplementedError:
  sys.exit(77)
for name in os.listdir(sys.argv[1]):
  if name.endswith('.tfrecords'):
    tf.gfile.Copy(os.path.join(sys.argv[1], name), 'ram://data/' + name)
cifar10_main.main(
    job_dir='ram://data/job', data_dir='ram://data', num_layers=8,
    train_steps=4, train_batch_size=8, save_checkpoints_steps=2)
assert tf.gfile.Exists('ram://data/job/model.ckpt-4.index')
"""


def test_data_and_job_may_be_on_any_file_system_of_tensorflow(digits_dir,
                                                              tmp_path):
  done = subprocess.run(
      [sys.executable, '-c', IN_MEMORY, digits_dir], cwd=str(tmp_path),
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
      timeout=200, env=dict(os.environ, PYTHONPATH=ROOT))
  if done.returncode == 77:
    pytest.skip('this TensorFlow has no ram:// file system')
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'global_step=4 examples=299' in done.stdout
  assert os.listdir(str(tmp_path)) == []
