"""visualize_weights and pictures: grids, PNG files, the command."""
import os
import shutil

import numpy as np
import pytest
from conftest import error_lines, run_command

import cifar10_utils
import pictures
import visualize_weights
from tf_compat import tf


def grid(kernel, pad=1):
  with tf.Session() as session:
    return session.run(visualize_weights.put_kernels_on_grid(
        np.asarray(kernel, np.float32), pad))


@pytest.mark.parametrize('count, rows, columns', [
    (1, 1, 1), (7, 1, 7), (10, 2, 5), (16, 4, 4), (64, 8, 8)])
def test_kernels_are_in_order_on_the_fullest_grid(count, rows, columns):
  # Kernel k is constant k.
  kernel = np.tile(np.arange(count), (3, 5, 1, 1))
  picture = grid(kernel)
  assert picture.shape == (1, 5 * rows, 7 * columns, 1)
  for k in range(count):
    y, x = 5 * (k % rows), 7 * (k // rows)
    expected = np.zeros((5, 7))
    expected[1:-1, 1:-1] = k / max(1, count - 1)
    np.testing.assert_allclose(picture[0, y:y + 5, x:x + 7, 0], expected,
                               atol=1e-6)


@pytest.mark.parametrize('pad', [0, 1, 3])
def test_scale_is_of_the_whole_tensor_and_padding_is_black(pad):
  kernel = np.random.RandomState(0).normal(size=(3, 3, 3, 4))
  picture = grid(kernel, pad)
  assert (picture.min(), picture.max()) == (0, 1)
  assert picture.shape == (1, 2 * (3 + 2 * pad), 2 * (3 + 2 * pad), 3)
  inside = picture[0, pad:pad + 3, pad:pad + 3]
  np.testing.assert_allclose(
      inside, (kernel[..., 0] - kernel.min()) / np.ptp(kernel), atol=1e-6)
  if pad:
    assert not picture[0, :pad].any()


@pytest.mark.parametrize('value', [0, -3, 7])
def test_a_constant_kernel_is_black(value):
  assert not grid(np.full((3, 3, 1, 4), value)).any()


@pytest.mark.parametrize('channels', [2, 4, 16])
def test_other_channels_are_refused_with_a_way_out(channels):
  with pytest.raises(ValueError, match='%d channels .*--channel' % channels):
    visualize_weights.put_kernels_on_grid(tf.zeros([3, 3, channels, 4]))


def decode(data):
  with tf.Session() as session:
    return session.run(tf.image.decode_png(data))


def test_png_survives_the_round_trip():
  picture = np.random.RandomState(0).randint(0, 256, (5, 7, 3)).astype('uint8')
  np.testing.assert_array_equal(decode(pictures.encode_png(picture)), picture)
  np.testing.assert_array_equal(
      decode(pictures.encode_png(picture[..., 0]))[..., 0], picture[..., 0])


def test_text_is_legible():
  rows = [''.join('#' if dot else '.' for dot in row)
          for row in pictures.draw_text('T1')]
  assert rows == ['###..#..',
                  '.#..##..',
                  '.#...#..',
                  '.#...#..',
                  '.#..###.']
  assert pictures.draw_text('ab', 3).shape == (15, 24)


def test_confusion_matrix_shades_the_share_of_the_row():
  picture = pictures.draw_confusion_matrix(
      np.array([[8, 0], [5, 5]]), ['cat', 'dog'], cell=24)
  corner = picture.shape[0] - 48
  shades = picture[corner::24, corner::24, 0]
  np.testing.assert_array_equal(shades, [[0, 255], [127, 127]])


@pytest.fixture(scope='module')
def job_dir(digits_dir, tmp_path_factory):
  path = str(tmp_path_factory.mktemp('job'))
  done = run_command(
      'cifar10_main.py', '--data-dir', digits_dir, '--job-dir', path, '--mode',
      'train', '--num-layers', 8, '--train-steps', 2, '--train-batch-size', 8)
  assert done.returncode == 0, done.stderr
  return path


def run(job_dir, *args):
  return run_command('visualize_weights.py', '--checkpoint', job_dir, *args)


def test_the_command_draws_the_first_kernels(job_dir, tmp_path):
  output = tmp_path / 'kernels.png'
  done = run(job_dir, '--output', output)
  assert done.returncode == 0, done.stderr
  # 16 kernels of 3x3, 5x5 with padding, on 4x4: 20 pixels, enlarged 25 times.
  picture = decode(output.read_bytes())
  assert picture.shape == (500, 500, 3)
  assert (picture[::25, ::25] == picture[24::25, 24::25]).all()
  assert os.listdir(str(tmp_path)) == ['kernels.png']


def test_one_channel_of_a_deeper_kernel(job_dir, tmp_path):
  output = tmp_path / 'one.png'
  done = run(job_dir, '--variable', 'resnet/conv2d_1/kernel', '--channel', 3,
             '--output', output)
  assert done.returncode == 0, done.stderr
  assert decode(output.read_bytes()).shape == (500, 500, 1)


def test_fetch_draws_the_maps_of_a_tensor_by_name(job_dir, tmp_path):
  output = tmp_path / 'maps.png'
  done = run(job_dir, '--fetch', 'resnet/tower_0/Relu:0', '--output', output)
  assert done.returncode == 0, done.stderr
  assert 'resnet/tower_0/Relu:0 float32 [8, 32, 32, 16]: min 0' in done.stdout
  assert decode(output.read_bytes()).shape == (3 * 136, 3 * 136, 1)


def test_fetch_takes_variables_and_names_without_a_number(job_dir):
  kernel = run(job_dir, '--fetch', 'resnet/conv2d/kernel').stdout
  assert 'resnet/conv2d/kernel float32 [3, 3, 3, 16]: min -' in kernel
  assert 'global_step:0 int64 []: min 2, mean 2, max 2' in run(
      job_dir, '--fetch', 'global_step:0').stdout


def test_maps_of_a_channels_first_net_are_turned(digits_dir, tmp_path):
  if not cifar10_utils.runs_channels_first():
    pytest.skip('this TensorFlow has no channels_first kernels on the CPU')
  done = run_command(
      'cifar10_main.py', '--data-dir', digits_dir, '--job-dir', tmp_path,
      '--mode', 'train', '--num-layers', 8, '--train-steps', 1,
      '--train-batch-size', 8, '--data-format', 'channels_first')
  assert done.returncode == 0, done.stderr
  done = run(tmp_path, '--fetch', 'resnet/tower_0/Relu:0')
  assert 'float32 [8, 32, 32, 16]' in done.stdout, done.stderr


def test_variables_and_tensors_are_listed(job_dir):
  trainable = run(job_dir, '--list-variables', 'TRAINABLE').stdout
  assert 'total: 23 variables' in trainable
  assert trainable.split()[-1] == '75355'
  variables = run(job_dir, '--list-variables').stdout
  assert 'total: 61 variables' in variables
  assert 'resnet/conv2d/kernel ' in variables
  tensors = run(job_dir, '--list-tensors').stdout
  assert 'resnet/tower_0/Relu:0 ' in tensors


@pytest.mark.parametrize('args, message', [
    ([], '--output, --fetch, --list-variables or --list-tensors'),
    (['--variable', 'nope', '--output', 'x.png'], '--variable nope is not in'),
    (['--variable', 'resnet/conv2d_1/kernel', '--output', 'x.png'],
     'a kernel with 16 channels is no picture'),
    (['--channel', '9', '--output', 'x.png'], '--channel 9: expected 0 to 2'),
    (['--fetch', 'nope:0'], '--fetch nope:0 is no tensor of'),
    (['--fetch', 'a:b:c'], '--fetch a:b:c is no tensor of'),
    (['--fetch', 'loss', '--output', 'x.png'], 'float32 [] is no batch'),
    (['--fetch', 'resnet/tower_0/fully_connected/dense/BiasAdd', '--output',
      'x.png'], 'float32 [8, 11] is no batch of maps'),
    (['--output', '/nowhere/x.png'], '--output /nowhere/x.png cannot be')])
def test_bad_input_is_one_line(job_dir, tmp_path, args, message):
  done = run_command('visualize_weights.py', '--checkpoint', job_dir, *args,
                     cwd=str(tmp_path))
  assert done.returncode == 2
  assert message in error_lines(done.stderr)[0]
  assert len(error_lines(done.stderr)) == 1
  assert os.listdir(str(tmp_path)) == []


def test_a_directory_without_checkpoint_is_refused(tmp_path):
  done = run(tmp_path, '--list-variables')
  assert done.returncode == 2
  assert 'expected a job directory with a checkpoint' in done.stderr


@pytest.mark.parametrize('ending, args, message', [
    ('.meta', ('--list-tensors',), 'cannot be read as a graph'),
    ('.data', ('--variable', 'resnet/dense/kernel', '--output', 'x.png'),
     'resnet/dense/kernel cannot be read'),
    ('.data', ('--fetch', 'loss'), 'cannot be restored')])
def test_a_truncated_checkpoint_is_one_line(job_dir, tmp_path, ending, args,
                                            message):
  for name in os.listdir(job_dir):
    if name.startswith('model.ckpt-2.'):
      data = (tmp_path / name)
      shutil.copy(os.path.join(job_dir, name), str(data))
      if ending in name:
        data.write_bytes(data.read_bytes()[:100])
  done = run(tmp_path, *args)
  assert done.returncode == 2, done.stderr
  line, = error_lines(done.stderr)
  assert message in line
  assert not (tmp_path / 'x.png').exists()
