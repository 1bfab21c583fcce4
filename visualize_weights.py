"""Kernels and intermediate outputs -> one picture.

  python visualize_weights.py --checkpoint JOB_DIR --output kernels.png
  python visualize_weights.py --checkpoint JOB_DIR --list-variables
  python visualize_weights.py --checkpoint JOB_DIR --list-tensors
  python visualize_weights.py --checkpoint JOB_DIR \\
      --fetch resnet/tower_0/Relu:0 --output maps.png

Names come from the checkpoint's own graph, so no model code is needed. Default
names such as `conv2d_1` are a convention, no specification.
"""
import numpy as np

import atomic_files
import checkpoint_variables
import cifar10_utils
import pictures
import usage
from tf_compat import tf, use_graph_mode
from usage import UsageError

FIRST_KERNEL = 'resnet/conv2d/kernel'


def put_kernels_on_grid(kernel, pad=1):
  """Lays the kernels of a convolution side by side.

  Kernel k is at row k % rows, column k // rows; rows is the largest divisor of
  N not above sqrt(N). All kernels share one scale, made before the black
  padding is added; a constant kernel gives zeros.

  Args:
    kernel: float32 tensor or array [Y, X, C, N], C being 1 or 3.
    pad: int, black pixels around each kernel.

  Returns:
    float32 [1, (Y + 2 pad) * rows, (X + 2 pad) * columns, C] in [0, 1].

  Raises:
    ValueError: for another number of channels.
  """
  kernel = tf.convert_to_tensor(kernel)
  height, width, channels, count = kernel.shape.as_list()
  if channels not in (1, 3):
    raise ValueError(
        'a kernel with %d channels is no picture; choose one of them: '
        'kernel[:, :, c:c + 1], --channel c on the command line' % channels)
  rows = max(d for d in range(1, int(count**.5) + 1) if count % d == 0)
  columns = count // rows

  low, high = tf.reduce_min(kernel), tf.reduce_max(kernel)
  spread = high - low
  scaled = (kernel - low) / tf.where(spread > 0, spread, tf.ones_like(spread))
  around = (pad, pad)
  scaled = tf.pad(scaled, [around, around, (0, 0), (0, 0)])
  height, width = height + 2 * pad, width + 2 * pad

  grid = tf.reshape(scaled, [height, width, channels, columns, rows])
  grid = tf.transpose(grid, [4, 0, 3, 1, 2])  # [rows, H, columns, W, C]
  return tf.reshape(grid, [1, rows * height, columns * width, channels])


def first_kernel():
  """The variable of the first convolution in the default graph."""
  return tf.get_collection(tf.GraphKeys.GLOBAL_VARIABLES,
                           scope=FIRST_KERNEL)[0]


class KernelsHook(tf.train.SummarySaverHook):
  """Writes the first layer's kernels as the image `kernels/conv2d`."""

  def __init__(self, output_dir, save_steps):
    """Every `save_steps` steps, to the events of `output_dir`."""
    with tf.name_scope('kernels_on_grid'):
      grid = put_kernels_on_grid(first_kernel())
    summary = tf.summary.image('kernels/conv2d', grid, max_outputs=1,
                               collections=[])
    super(KernelsHook, self).__init__(
        save_steps=save_steps, output_dir=output_dir, summary_op=summary)


# ---- the command -------------------------------------------------------------


def read_variable(checkpoint, name):
  """The value of a variable in a checkpoint.

  Raises:
    UsageError: if there is no such variable, or it cannot be read.
  """
  reader = cifar10_utils.open_checkpoint(checkpoint, '--checkpoint')
  if not reader.has_tensor(name):
    raise UsageError('--variable %s is not in %s; --list-variables shows what '
                     'is' % (name, checkpoint))
  return checkpoint_variables.read(reader, checkpoint, name)


def import_graph(checkpoint):
  """Imports the graph a checkpoint came with; returns its Saver.

  Raises:
    UsageError: if there is none, or it cannot be read.
  """
  if not tf.gfile.Exists(checkpoint + '.meta'):
    raise UsageError('%s.meta is missing: without it the checkpoint has no '
                     'graph' % checkpoint)
  try:
    return tf.train.import_meta_graph(checkpoint + '.meta', clear_devices=True)
  except Exception as e:
    # What is no graph is taken for text: protobuf raises various errors.
    raise UsageError('%s.meta cannot be read as a graph: %s' % (
        checkpoint, (str(e).splitlines() or [''])[0]))


def print_variables(checkpoint, which):
  """Prints name, shape, type, parameters: GLOBAL or TRAINABLE variables."""
  if which == 'TRAINABLE':
    import_graph(checkpoint)
    rows = [(v.op.name, v.shape.as_list(), v.dtype.base_dtype.name)
            for v in tf.trainable_variables()]
  else:
    rows = checkpoint_variables.list_all(
        cifar10_utils.open_checkpoint(checkpoint, '--checkpoint'))
  checkpoint_variables.print_table(rows)


def print_tensors(checkpoint):
  """Prints name, type and shape of the tensors the training step computes."""
  import_graph(checkpoint)
  for op in tf.get_default_graph().get_operations():
    for tensor in op.outputs:
      if op.name.startswith('resnet'):
        print('%-64s %-8s %s' % (tensor.name, tensor.dtype.name, tensor.shape))


def fetch_tensor(checkpoint, name):
  """Runs the checkpoint's graph on its own input; returns one tensor's value.

  Args:
    checkpoint: str, prefix.
    name: str, such as 'resnet/tower_0/Relu:0'; ':0' may be left out. That of a
      variable gives its value.

  Returns:
    numpy array; maps are [N, H, W, C] in both data formats.

  Raises:
    UsageError: if there is no such tensor, its input data are gone, or the
      checkpoint is damaged.
  """
  saver = import_graph(checkpoint)
  graph = tf.get_default_graph()
  variables = {v.name: v for v in tf.global_variables()}
  try:
    name = name if ':' in name else name + ':0'
    tensor = graph.get_tensor_by_name(name)
  except (KeyError, ValueError):
    raise UsageError('--fetch %s is no tensor of %s; --list-tensors shows '
                     'them' % (name, checkpoint))
  if tensor.dtype == tf.resource and name not in variables:
    raise UsageError('--fetch %s is a handle, not numbers' % name)
  with tf.Session() as session:
    try:
      saver.restore(session, checkpoint)
    except (tf.errors.OpError, ValueError) as e:
      raise UsageError('%s cannot be restored: %s' %
                       (checkpoint, str(e).splitlines()[0]))
    session.run(tf.local_variables_initializer())
    try:
      value = session.run(variables.get(name, tensor))
    except tf.errors.OpError as e:
      raise UsageError('--fetch %s: the graph of %s cannot run: %s' %
                       (name, checkpoint, e.message.splitlines()[0]))
  channels_first = any(op.type == 'Conv2D' and
                       op.get_attr('data_format') == b'NCHW'
                       for op in graph.get_operations())
  if channels_first and value.ndim == 4 and name not in variables:
    return value.transpose(0, 2, 3, 1)
  return value


def describe(value):
  """Type, shape and range of a fetched value, in one line."""
  text = '%s %s' % (value.dtype, list(value.shape))
  if value.dtype.kind in 'biuf' and value.size:
    text += ': min %.6g, mean %.6g, max %.6g' % (value.min(), value.mean(),
                                                 value.max())
  return text


def maps_of_first_example(value):
  """[H, W, 1, C], C grey pictures, from [N, H, W, C].

  Raises:
    UsageError: for other shapes or types.
  """
  if value.ndim != 4 or value.dtype.kind not in 'biuf' or not value.size:
    raise UsageError('--fetch: %s %s is no batch of maps; --output wants '
                     '[N, H, W, C]' % (value.dtype, list(value.shape)))
  return value[0][:, :, np.newaxis]


def write_grid(kernel, output, channel=None):
  """Writes float32 [Y, X, C, N] as a PNG, enlarged to about 512 pixels."""
  if kernel.ndim != 4:
    raise UsageError('a tensor of shape %s is no set of pictures: expected 4 '
                     'dimensions' % list(kernel.shape))
  if channel is not None:
    if not 0 <= channel < kernel.shape[2]:
      raise UsageError('--channel %d: expected 0 to %d' %
                       (channel, kernel.shape[2] - 1))
    kernel = kernel[:, :, channel:channel + 1]
  try:
    grid = put_kernels_on_grid(kernel.astype(np.float32))
  except ValueError as e:
    raise UsageError(e)
  with tf.Session() as session:
    picture = np.rint(session.run(grid)[0] * 255).astype(np.uint8)
  picture = pictures.enlarge(picture, max(1, 512 // max(picture.shape)))
  try:
    with atomic_files.whole_files([output]) as (temporary,), \
        open(temporary, 'wb') as f:
      f.write(pictures.encode_png(picture))
  except OSError as e:
    raise UsageError('--output %s cannot be written: %s' % (output, e))
  print('%s: %d pictures of %dx%d pixels, enlarged' %
        ((output, kernel.shape[3]) + kernel.shape[:2]))


def build_parser():
  parser = usage.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--checkpoint', required=True, metavar='DIR|PREFIX',
      help='job directory, or the prefix of one checkpoint in it')
  add('--variable', default=FIRST_KERNEL, metavar='NAME',
      help='kernel to draw (default: %(default)s)')
  add('--channel', type=int, help='draw this input channel only')
  add('--output', metavar='PNG', help='file to write the picture to')
  add('--list-variables', nargs='?', const='GLOBAL', metavar='GLOBAL|TRAINABLE',
      choices=['GLOBAL', 'TRAINABLE'], help='print name, shape, parameters')
  add('--list-tensors', action='store_true',
      help='print the tensors that --fetch takes')
  add('--fetch', metavar='TENSOR',
      help='run the graph on its own input and draw this tensor for the first '
      'example, e.g. resnet/tower_0/Relu:0')
  return parser


def main(checkpoint, variable, channel, output, list_variables, list_tensors,
         fetch):
  """Lists, fetches or draws; the arguments are the flags."""
  checkpoint = checkpoint_variables.find(checkpoint)
  if list_variables:
    print_variables(checkpoint, list_variables)
  elif list_tensors:
    print_tensors(checkpoint)
  elif fetch:
    value = np.asarray(fetch_tensor(checkpoint, fetch))
    print('%s %s' % (fetch, describe(value)))
    if output:
      write_grid(maps_of_first_example(value), output)
  elif output:
    write_grid(read_variable(checkpoint, variable), output, channel)
  else:
    raise UsageError('--output, --fetch, --list-variables or --list-tensors: '
                     'expected one of them')


if __name__ == '__main__':
  use_graph_mode()
  usage.run(build_parser(), main)
