"""A checkpoint -> a SavedModel that classifies pictures without this project.

Three signatures on one set of weights, all with the outputs `classes`, int64
[N], and `probabilities`, float32 [N, num_classes]:

  serving_default  image_bytes: string [N], PNG or JPEG of any size
  images           images: float32 [N, 32, 32, 3] in [0, 255]
  examples         examples: string [N], serialized tf.train.Example

The names of the classes are the lines of `assets/classes.txt`.
"""
import os

import atomic_files
from cifar10 import DEPTH, HEIGHT, WIDTH
from tf_compat import tf
from usage import UsageError

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
JPEG_SIGNATURE = b'\xff\xd8\xff'
# A PNG of 50 KB can ask for gigabytes. This many take 150 MB, and twice that
# again in a progressive JPEG.
MAX_PIXELS = 50 * 10**6


def decode_picture(contents, height=HEIGHT, width=WIDTH):
  """Decodes a picture of any size and kind, and averages it down.

  Grey becomes RGB, 16 bits become 8, transparency is ignored. The size is read
  from the header and checked before anything is decoded.

  Args:
    contents: string [], PNG or JPEG.
    height, width: int, of the result.

  Returns:
    float32 [height, width, 3] in [0, 255].

  Raises (when run):
    InvalidArgumentError: for anything else, and above MAX_PIXELS.
  """
  is_png = tf.equal(tf.strings.substr(contents, 0, len(PNG_SIGNATURE)),
                    PNG_SIGNATURE)
  is_jpeg = tf.equal(tf.strings.substr(contents, 0, len(JPEG_SIGNATURE)),
                     JPEG_SIGNATURE)
  with tf.control_dependencies([tf.Assert(
      tf.logical_or(is_png, is_jpeg), ['neither PNG nor JPEG'])]):
    contents = tf.identity(contents)
  size = tf.cast(tf.cond(
      is_png, lambda: _png_size(contents),
      lambda: tf.image.extract_jpeg_shape(contents)[:2]), tf.int64)
  fits = tf.logical_and(tf.reduce_all(size > 0),
                        tf.reduce_prod(size) <= MAX_PIXELS)
  with tf.control_dependencies([tf.Assert(
      fits, ['its header asks for too many pixels:', size])]):
    picture = tf.image.decode_png(contents, channels=DEPTH)  # or JPEG
  # Averaging areas: a large picture must not be sampled at 32x32 points.
  # Rounded to what a file holds, because sums in float32 can exceed 255.
  return tf.round(tf.image.resize_images(picture, [height, width],
                                         tf.image.ResizeMethod.AREA))


def _png_size(contents):
  """int32 [2], as the header, which is always the first chunk, has it."""
  # A short file has size 0: an op that fails puts its input into the message,
  # which must be text.
  start = tf.strings.join([tf.strings.substr(contents, 0, 24), 24 * b'\0'])
  return tf.decode_raw(tf.strings.substr(start, 16, 8), tf.int32,
                       little_endian=False)


def decode_pictures(contents, height=HEIGHT, width=WIDTH):
  """string [N] -> float32 [N, height, width, 3]; see `decode_picture`."""
  return tf.map_fn(lambda c: decode_picture(c, height, width), contents,
                   dtype=tf.float32,
                   parallel_iterations=1)  # one picture in memory at a time


def restore(session, checkpoint):
  """Restores the variables of the default graph.

  Raises:
    UsageError: if the checkpoint lacks one, or cannot be read.
  """
  try:
    tf.train.Saver(tf.global_variables()).restore(session, checkpoint)
  except (tf.errors.OpError, ValueError) as e:
    raise UsageError('checkpoint %s cannot be restored: %s' %
                     (checkpoint, str(e).splitlines()[0]))


def signature(name, tensor, outputs):
  """SignatureDef of one input and the outputs."""
  return tf.saved_model.predict_signature_def({name: tensor}, outputs)


def build_signatures(classify, dataset):
  """Builds the network once per kind of input, on shared variables.

  Args:
    classify: function from float32 [N, 32, 32, 3], preprocessed, to a dict of
      output tensors.
    dataset: Cifar10DataSet; its parser and preprocess are the model's too.

  Returns:
    Dict of signature name to SignatureDef.
  """
  with tf.name_scope('serving'):
    contents = tf.placeholder(tf.string, [None], 'image_bytes')
    images = tf.placeholder(tf.float32, [None, HEIGHT, WIDTH, DEPTH], 'images')
    examples = tf.placeholder(tf.string, [None], 'examples')
    inputs = [
        ('serving_default', 'image_bytes', contents,
         dataset.preprocess(decode_pictures(contents))),
        ('images', 'images', images, dataset.preprocess(images)),
        ('examples', 'examples', examples, dataset.parser(examples)[0])]
  signatures = {}
  for key, name, tensor, preprocessed in inputs:
    with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
      signatures[key] = signature(name, tensor, classify(preprocessed))
  return signatures


def write(export_dir, build, checkpoint, class_names):
  """Writes a SavedModel, which appears whole or not at all.

  Args:
    export_dir: str, a folder that is not there yet, or is empty.
    build: function without arguments that builds an inference graph and returns
      a dict of signature name to SignatureDef.
    checkpoint: str, prefix of the one whose weights it gets.
    class_names: list of str, written to the asset `classes.txt`.

  Raises:
    UsageError: if the folder is in use or cannot be written.
  """
  export_dir = export_dir.rstrip('/')
  temporary = atomic_files.temporary_name(export_dir)
  try:
    check_is_free(export_dir)
    if tf.gfile.Exists(temporary):
      tf.gfile.DeleteRecursively(temporary)
    tf.gfile.MakeDirs(os.path.dirname(export_dir) or '.')
    try:
      _build(temporary, build, checkpoint, class_names)
      if tf.gfile.Exists(export_dir):
        tf.gfile.DeleteRecursively(export_dir)  # it is empty
      tf.gfile.Rename(temporary, export_dir)
    finally:
      if tf.gfile.Exists(temporary):
        tf.gfile.DeleteRecursively(temporary)
  except tf.errors.OpError as e:
    raise UsageError('--export-dir %s cannot be written: %s' %
                     (export_dir, e.message))


def check_is_free(export_dir):
  """Raises UsageError unless the folder is missing or empty."""
  if not tf.gfile.Exists(export_dir):
    return
  if not tf.gfile.IsDirectory(export_dir) or tf.gfile.ListDirectory(export_dir):
    raise UsageError('--export-dir %s: expected a new or empty folder' %
                     export_dir)


def _build(folder, build, checkpoint, class_names):
  builder = tf.saved_model.Builder(folder)
  with tf.Graph().as_default(), tf.Session() as session:
    signatures = build()
    restore(session, checkpoint)
    names = os.path.join(folder, 'classes.txt')
    with tf.gfile.GFile(names, 'w') as f:
      f.write(''.join(name + '\n' for name in class_names))
    tf.add_to_collection(tf.GraphKeys.ASSET_FILEPATHS,
                         tf.constant(names, name='class_names'))
    builder.add_meta_graph_and_variables(
        session, [tf.saved_model.SERVING], signatures,
        tf.get_collection(tf.GraphKeys.ASSET_FILEPATHS), clear_devices=True)
    builder.save()
    tf.gfile.Remove(names)  # it was copied to assets/
