"""A run of everything in a real TensorBoard, over HTTP and in a browser."""
import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import run_command
from six.moves import urllib

import summaries
from tf_compat import tf

DIGITS = ['digit_%d' % i for i in range(10)]
TRAINING_SCALARS = {
    'loss', 'loss/cross_entropy', 'loss/weight_decay', 'accuracy',
    'training/learning_rate', 'training/gradient_norm',
    'training/examples_per_second', 'global_step/sec', 'dead_relu/Relu',
    'dead_relu/stage_2/residual_v1/Relu_1'}
EVALUATION_SCALARS = {
    'loss', 'loss/cross_entropy', 'loss/weight_decay', 'accuracy'} | {
        'accuracy/' + name for name in DIGITS}


@pytest.fixture(scope='module')
def job_dir(digits_dir, tmp_path_factory):
  """120 steps with every summary on."""
  path = str(tmp_path_factory.mktemp('tensorboard') / 'run')
  done = run_command(
      'cifar10_main.py', '--data-dir', digits_dir, '--job-dir', path,
      '--num-layers', 8, '--train-steps', 120, '--train-batch-size', 32,
      '--batch-norm-decay', 0.9, '--use-distortion-for-training', 'False',
      '--summaries', 'full', '--summary-steps', 40, '--visualize-activations',
      '--profile-steps', '50:52')
  assert done.returncode == 0, done.stderr[-3000:]
  return path


@pytest.fixture(scope='module')
def server(job_dir):
  """Address of a TensorBoard on loopback that has read the run."""
  with contextlib.closing(socket.socket()) as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  process = subprocess.Popen(
      [sys.executable, '-m', 'tensorboard.main', '--logdir', job_dir, '--host',
       '127.0.0.1', '--port', str(port), '--reload_interval', '5'],
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  address = 'http://127.0.0.1:%d' % port
  try:
    for _ in range(120):
      with contextlib.suppress(OSError, KeyError):
        if 'eval_test' in get(address, 'scalars/tags'):
          break
      assert process.poll() is None
      time.sleep(0.5)
    yield address
  finally:
    process.terminate()
    process.wait(30)


def get(address, route):
  with contextlib.closing(urllib.request.urlopen(
      '%s/data/plugin/%s' % (address, route), timeout=30)) as response:
    return json.loads(response.read().decode())


def test_every_promised_scalar_is_there_and_finite(server):
  tags = get(server, 'scalars/tags')
  assert set(tags['.']) >= TRAINING_SCALARS
  assert set(tags['eval']) >= EVALUATION_SCALARS
  assert set(tags['eval_test']) >= EVALUATION_SCALARS
  assert 'loss_1' not in tags['.']
  for run, names in (('.', TRAINING_SCALARS), ('eval', EVALUATION_SCALARS)):
    for name in names:
      values = get(server, 'scalars/scalars?' + urllib.parse.urlencode(
          {'run': run, 'tag': name}))
      assert values, name
      assert all(math.isfinite(float(value)) for _, _, value in values), name


def test_images_are_there(server):
  tags = get(server, 'images/tags')
  assert {'outputs/first/image', 'outputs/stage_1/residual_v1/image',
          'kernels/conv2d/image'} <= set(tags['.'])
  assert {'pictures/confusion_matrix', 'pictures/mistakes'} <= set(tags['eval'])


def test_histograms_are_there(server):
  tags = set(get(server, 'histograms/tags')['.'])
  assert {'kernels/resnet/conv2d/kernel', 'gradients/resnet/dense/bias',
          'activations/first', 'activations/stage_2/residual_v1',
          'gradients/norm_per_example'} <= tags


def test_graph_and_flags_are_there(server):
  with contextlib.closing(urllib.request.urlopen(
      server + '/data/plugin/graphs/graph?run=.', timeout=30)) as response:
    assert b'resnet/tower_0/Relu' in response.read()
  text = get(server, 'text/text?run=.&tag=flags')
  assert '--num-layers' in text[0]['text']


def test_flags_are_in_the_hparams_tab(server):
  request = urllib.request.Request(
      server + '/data/plugin/hparams/experiment', b'{}',
      {'Content-Type': 'application/json'})
  with contextlib.closing(urllib.request.urlopen(request,
                                                 timeout=30)) as response:
    experiment = json.loads(response.read().decode())
  names = {info['name'] for info in experiment['hparamInfos']}
  assert {'num_layers', 'learning_rate', 'train_batch_size'} <= names


def test_steps_that_a_restore_repeats_are_traced_again(tmp_path):
  step = tf.train.get_or_create_global_step()
  next_step = step.assign_add(1)
  for _ in range(2):  # one session before the restore, one after it
    hook = summaries.ProfileHook(0, 2, str(tmp_path))
    with tf.train.SingularMonitoredSession([hook]) as session:
      session.run(next_step)
      session.run(next_step)
  assert {'timeline-0.json', 'timeline-1.json'} <= set(os.listdir(
      str(tmp_path)))


def test_the_profile_is_a_chrome_trace(job_dir):
  for step in (50, 51):
    with open(os.path.join(job_dir, 'timeline-%d.json' % step)) as f:
      events = json.load(f)['traceEvents']
    assert any('Conv2D' in event.get('name', '') for event in events)
  assert not os.path.exists(os.path.join(job_dir, 'timeline-52.json'))


CHROMIUM = shutil.which('chromium')


@pytest.mark.skipif(not CHROMIUM, reason='no chromium on PATH')
def test_a_browser_shows_scalars_images_and_graph(server, tmp_path):
  sync_api = pytest.importorskip(
      'playwright.sync_api', reason='playwright is not installed')
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
        executable_path=CHROMIUM, args=[
            '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
            '--disable-background-networking', '--disable-component-update',
            '--disable-sync'])
    page = browser.new_page(viewport={'width': 1280, 'height': 900})
    errors = []
    page.on('console', lambda message: errors.append(message.text)
            if message.type == 'error' else None)
    for tab, content in (
        ('scalars', 'text=tag: accuracy/digit_3'),
        ('images', 'text=tag: kernels/conv2d/image'),
        ('histograms', 'text=activations/first'),
        ('graphs', 'text.nodelabel:visible:has-text("resnet")'),
        ('hparams', ':text("batch_norm_decay"):visible')):
      page.goto('%s/#%s' % (server, tab))
      page.wait_for_selector(content, timeout=30000)
      page.wait_for_timeout(1000)  # cards are drawn after their titles
      screenshot(page, tmp_path, tab)
    browser.close()
  # Fonts of other hosts cannot be loaded without a network.
  assert [e for e in errors if 'ERR_' not in e] == []


def screenshot(page, folder, name):
  """Keeps a picture, in SCREENSHOTS if that is set."""
  folder = os.environ.get('SCREENSHOTS', str(folder))
  path = os.path.join(folder, name + '.png')
  page.screenshot(path=path)
  assert os.path.getsize(path) > 10000  # a blank page has less
