"""Inception-ResNet-v2 out of its TF-slim checkpoint: classes, features, export.

  python extract_tf_slim.py --download DIR
  python extract_tf_slim.py --checkpoint C --images DIR --top 5 [--labels FILE]
  python extract_tf_slim.py --checkpoint C --data-dir DIR --features OUT
  python extract_tf_slim.py --checkpoint C --export DIR
  python extract_tf_slim.py --checkpoint ANY --list
  python extract_tf_slim.py --checkpoint ANY --convert OUT.npz

A checkpoint is a job directory, a prefix, or one file. The last two take any
checkpoint of TensorFlow 1.
"""
import argparse
import contextlib
import hashlib
import os
import sys
import time

import numpy as np
from tqdm import tqdm

import atomic_files
import checkpoint_variables
import cifar10
import cifar10_archive
import cifar10_utils
import export
import features
import inception_resnet_v2 as network
import pictures
import predict
import usage
from tf_compat import tf, use_graph_mode
from usage import UsageError

NAME = 'inception_resnet_v2_2016_08_30'
URL = 'http://download.tensorflow.org/models/%s.tar.gz' % NAME


@contextlib.contextmanager
def working_in(folder, flag):
  """Creates a local folder and keeps a second run out."""
  try:
    os.makedirs(folder, exist_ok=True)
    with atomic_files.locked(folder, flag):
      yield
  except OSError as e:
    raise UsageError('%s %s cannot be written: %s' % (flag, folder, e))


# ---- download ----------------------------------------------------------------


def download(folder):
  """Leaves the published checkpoint in `folder` and returns its path.

  Nobody publishes the archive's checksum: the one found first is written beside
  it, and every later use is checked against that.

  Raises:
    UsageError: if the archive cannot be had or has changed.
  """
  archive = os.path.join(folder, os.path.basename(URL))
  record = archive + '.sha256'
  known = None
  with working_in(folder, '--download'):
    if os.path.exists(record):
      with open(record) as f:
        known = f.read().split()[0]
    if not os.path.exists(archive):
      print('Download from %s' % URL, file=sys.stderr)
      cifar10_archive.download(URL, archive, known)
    elif known:
      cifar10_archive.check_sha256(archive, known)
    if not known:
      _record_sha256(archive, record)
    cifar10_archive.extract(archive, folder, NAME, in_archive='')
  path = os.path.join(folder, NAME, NAME + '.ckpt')
  if not os.path.exists(path):
    raise UsageError('%s has no %s.ckpt' % (archive, NAME))
  return path


def _record_sha256(archive, record):
  """Writes what `sha256sum --check` reads."""
  with atomic_files.whole_files([record]) as (temporary,), \
      open(temporary, 'w') as f:
    f.write('%s  %s\n' % (cifar10_archive.sha256_of(archive),
                          os.path.basename(archive)))


# ---- the network -------------------------------------------------------------


def restored_session(checkpoint, exclude, hint=''):
  """A session whose graph's variables are those of the checkpoint.

  Raises:
    UsageError: if the two do not fit, or the checkpoint is not whole.
  """
  session = tf.Session()
  checkpoint_variables.restore(session, checkpoint, exclude, hint)
  return session


def _classify(images, flags):
  """Builds the network: probabilities [N, num_classes], features [N, 1536]."""
  _, end_points = network.inception_resnet_v2(
      images, flags.num_classes,
      # The auxiliary head's kernel is made for one size of picture.
      create_aux_logits=(flags.aux_logits and
                         flags.image_size == network.IMAGE_SIZE))
  return end_points['Predictions'], end_points['PreLogitsFlatten']


HINT = '; see --num-classes, --no-aux-logits and --exclude-scopes'


# ---- pictures ----------------------------------------------------------------


def find_pictures(paths):
  """Files to classify: those named, and the JPEG and PNG files of folders.

  Files of a folder come in the order of their names; what has another extension
  or is a folder itself is left out.

  Raises:
    UsageError: for a path that is not there or a folder without pictures.
  """
  found = []
  for path in paths:
    if not tf.gfile.IsDirectory(path):
      if not tf.gfile.Exists(path):
        raise UsageError('--images %s: no such file or folder' % path)
      found.append(path)
      continue
    names = tf.gfile.ListDirectory(path)
    chosen = predict.files_among(path, names, predict.PICTURES)
    if not chosen:
      raise UsageError('--images %s has no %s file' %
                       (path, ', '.join(predict.PICTURES)))
    if len(chosen) < len(names):
      tf.logging.info('%s: %d pictures; %d others left out', path,
                      len(chosen), len(names) - len(chosen))
    found += chosen
  return found


class PictureReader(object):
  """Reads picture files into what the network takes."""

  def __init__(self, image_size, skip_bad):
    self.skipped = 0
    self._skip_bad = skip_bad
    self._contents = tf.placeholder(tf.string, [])
    self._picture = network.preprocess(pictures.decode(self._contents),
                                       image_size)

  def read(self, session, paths):
    """Yields (path, float32 [image_size, image_size, 3]).

    Raises:
      UsageError: naming an unreadable picture, unless those are skipped.
    """
    for path in paths:
      try:
        picture = self._read_one(session, path)
      except UsageError as e:
        if not self._skip_bad:
          raise UsageError('%s; --skip-bad goes on without' % e)
        self.skipped += 1
        tf.logging.warning('Skipped: %s', e)
      else:
        yield path, picture

  def _read_one(self, session, path):
    try:
      with tf.gfile.GFile(path, 'rb') as f:
        contents = f.read()
      _check_format(contents)
      return session.run(self._picture, {self._contents: contents})
    except ValueError as e:
      problem = e
    except tf.errors.OpError as e:
      problem = predict.reason(e)
    raise UsageError('%s is no readable picture: %s' % (path, problem))


def _check_format(contents):
  """Refuses what is neither JPEG nor PNG, a GIF's many pictures above all."""
  if not contents:
    raise ValueError('it is empty')
  if contents.startswith(b'GIF8'):
    raise ValueError('it is a GIF; expected JPEG or PNG')
  if not contents.startswith((pictures.PNG_SIGNATURE,
                              pictures.JPEG_SIGNATURE)):
    raise ValueError('expected JPEG or PNG')


def read_labels(path, num_classes):
  """Lines of a file, one per class, or no names without one."""
  if not path:
    return None
  try:
    with tf.gfile.GFile(path) as f:
      names = f.read().rstrip().split('\n')
  except (tf.errors.OpError, UnicodeDecodeError) as e:
    raise UsageError('--labels %s cannot be read: %s' % (path, e))
  if len(names) != num_classes:
    raise UsageError('--labels %s has %d lines; expected %d, one per class' %
                     (path, len(names), num_classes))
  return [name.strip() for name in names]


def classify_pictures(flags, checkpoint):
  """Prints file, class, probability and name, tabs between, best first."""
  top = min(5, flags.num_classes) if flags.top is None else flags.top
  if not 1 <= top <= flags.num_classes:
    raise UsageError('--top %d: expected 1 to %d, the number of classes' %
                     (top, flags.num_classes))
  names = read_labels(flags.labels, flags.num_classes)
  paths = find_pictures(flags.images)
  reader = PictureReader(flags.image_size, flags.skip_bad)
  images = tf.placeholder(tf.float32, [None] + [flags.image_size] * 2 + [3])
  probabilities, _ = _classify(images, flags)
  with restored_session(checkpoint, flags.exclude_scopes, HINT) as session, \
      tqdm(total=len(paths), unit='picture', disable=None) as bar:
    for batch in predict.batches(reader.read(session, paths), flags.batch_size):
      found = session.run(probabilities, {images: [p for _, p in batch]})
      bar.update(len(batch))
      for (path, _), row in zip(batch, found):
        for index in np.argsort(-row, kind='stable')[:top]:
          bar.write('%s\t%d\t%.6f' % (path, index, row[index]) +
                    ('\t' + names[index] if names else ''))
  if reader.skipped == len(paths):
    raise UsageError('none of the %d pictures could be read' % len(paths))
  if reader.skipped:
    print('%d of %d pictures skipped' % (reader.skipped, len(paths)),
          file=sys.stderr)


# ---- features ----------------------------------------------------------------


def extract_features(flags, checkpoint):
  """Writes the features of every example of the subsets, in record order."""
  data = [cifar10.Cifar10DataSet(flags.data_dir, subset, use_distortion=False)
          for subset in flags.subsets]
  # Labels are passed on; whoever trains on them says how many there are.
  examples = {d.subset: d.check_records(2**31) for d in data}
  files, start = tf.placeholder(tf.string, [None]), tf.placeholder(tf.int64, [])
  records = tf.data.TFRecordDataset(files).skip(start).batch(flags.batch_size)
  iterator = tf.data.make_initializable_iterator(
      records.map(data[0].parser).prefetch(1))
  images, labels = iterator.get_next()
  _, end_points = network.inception_resnet_v2(
      network.preprocess(images, flags.image_size), num_classes=0)
  fetches = (end_points['PreLogitsFlatten'], labels)

  with restored_session(checkpoint, flags.exclude_scopes) as session, \
      working_in(flags.features, '--features'):
    features.begin(flags.features, dict(
        {'examples_of_' + subset: n for subset, n in examples.items()},
        checkpoint=_fingerprint(checkpoint), batch_size=flags.batch_size,
        image_size=flags.image_size, excluded_scopes=flags.exclude_scopes))
    _copy_class_names(flags.data_dir, flags.features)
    for d in data:
      writer = features.Writer(
          os.path.join(flags.features, d.subset + '.tfrecords'),
          flags.batch_size)
      if writer.done:
        print('%s: there already' % d.subset)
        continue
      session.run(iterator.initializer, {files: d.get_filenames(),
                                         start: writer.count})
      _extract_subset(session, fetches, writer, d.subset, examples[d.subset])


def _extract_subset(session, fetches, writer, subset, total):
  """Appends batch after batch until the subset is done."""
  begun, start = writer.count, time.time()
  if begun:
    print('%s: continues after %d of %d' % (subset, begun, total))
  with tqdm(total=total, initial=begun, unit='picture', desc=subset,
            disable=None) as bar:
    while writer.count < total:
      before = writer.count
      writer.append(*session.run(fetches))
      bar.update(writer.count - before)
  writer.finish()
  print('%s: %d times %d features; %.1f pictures per second' % (
      subset, total, network.NUM_FEATURES,
      (total - begun) / (time.time() - start)))


def _fingerprint(checkpoint):
  """SHA-256 of the index, which has every value's checksum, or of the one file
  of the older format."""
  index = checkpoint + '.index'
  path = index if tf.gfile.Exists(index) else checkpoint
  with tf.gfile.GFile(path, 'rb') as f:
    return hashlib.sha256(f.read()).hexdigest()


def _copy_class_names(data_dir, folder):
  path = os.path.join(data_dir, 'classes.txt')
  if tf.gfile.Exists(path):
    tf.gfile.Copy(path, os.path.join(folder, 'classes.txt'), overwrite=True)


# ---- export ------------------------------------------------------------------


def export_model(flags, checkpoint):
  """Writes a SavedModel that takes the bytes of JPEG and PNG files.

  Signature `serving_default`: images, string [N] -> classes, int64 [N];
  probabilities, float32 [N, num_classes]. Signature `features`: images ->
  features, float32 [N, 1536].
  """
  with export.new_folder(flags.export, '--export') as folder:
    contents = tf.placeholder(tf.string, [None], 'images')
    images = tf.map_fn(
        lambda c: network.preprocess(pictures.decode(c), flags.image_size),
        contents, dtype=tf.float32, parallel_iterations=1)
    probabilities, found = _classify(images, flags)
    signatures = {
        key: export.signature('images', contents, outputs)
        for key, outputs in (
            ('serving_default', {'classes': tf.argmax(probabilities, 1),
                                 'probabilities': probabilities}),
            ('features', {'features': found}))}
    with restored_session(checkpoint, flags.exclude_scopes, HINT) as session:
      export.save(session, folder, signatures,
                  read_labels(flags.labels, flags.num_classes) or ())
  print('%s: signatures %s' % (flags.export, ', '.join(sorted(signatures))))


# ---- main --------------------------------------------------------------------


def build_parser():
  parser = usage.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--checkpoint', metavar='CKPT',
      help='job directory, prefix, or a file of the older format')
  jobs = parser.add_mutually_exclusive_group(required=True)
  jobs.add_argument('--images', nargs='+', metavar='PATH',
                    help='print the classes of these JPEG and PNG files, or of '
                    'those in folders')
  jobs.add_argument('--features', metavar='OUT',
                    help='write the features of the pictures in --data-dir to '
                    'this folder; run again, it continues')
  jobs.add_argument('--export', metavar='DIR', help='write a SavedModel')
  jobs.add_argument('--list', action='store_true',
                    help='print name, shape, type and parameters of every '
                    'variable')
  jobs.add_argument('--convert', metavar='OUT.npz',
                    help='write every variable to a NumPy file')
  jobs.add_argument('--download', metavar='DIR',
                    help='fetch the published checkpoint (about 220 MB)')
  add('--top', type=int, help='classes per picture (default: 5, or all of '
      'fewer)')
  add('--labels', metavar='FILE', help='names of the classes, one per line')
  add('--skip-bad', action='store_true',
      help='name and count unreadable pictures instead of ending')
  add('--data-dir', help='folder of TFRecord files')
  add('--subsets', type=usage.comma_separated(str), metavar='SUBSET,...',
      default=list(cifar10.SUBSETS), help='default: all three')
  add('--num-classes', type=int, default=network.NUM_CLASSES,
      help='logits (default: %(default)s)')
  add('--no-aux-logits', dest='aux_logits', action='store_false',
      help='leave the second head out of the graph, as with any other '
      '--image-size than %d' % network.IMAGE_SIZE)
  add('--exclude-scopes', type=usage.comma_separated(str), default=[],
      metavar='SCOPE,...', help='variables below these are not restored, but '
      'random')
  add('--batch-size', type=int, default=16, help='pictures (default: 16)')
  add('--image-size', type=int, default=network.IMAGE_SIZE,
      help='height and width of what the network sees, at least %d (default: '
      '%%(default)s)' % network.MIN_IMAGE_SIZE)
  return parser


def check_flags(flags):
  """Raises UsageError for a flag out of range or without its companion."""
  for name, lowest in (('num_classes', 1), ('batch_size', 1),
                       ('image_size', network.MIN_IMAGE_SIZE)):
    if getattr(flags, name) < lowest:
      raise UsageError('--%s %d: expected at least %d' % (
          name.replace('_', '-'), getattr(flags, name), lowest))
  if not flags.subsets:
    raise UsageError('--subsets is empty: expected some of %s' %
                     ', '.join(cifar10.SUBSETS))
  if not flags.checkpoint and not flags.download:
    raise UsageError('--checkpoint is missing; --download fetches one')
  if bool(flags.features) != bool(flags.data_dir):
    raise UsageError('--features OUT and --data-dir DIR: expected both')


def main(**flags):
  """Does one job; the arguments are the flags.

  Raises:
    UsageError: for input that a user can mend.
  """
  flags = argparse.Namespace(**flags)
  check_flags(flags)
  if flags.download:
    print(download(flags.download))
    return
  checkpoint = checkpoint_variables.find(flags.checkpoint)
  reader = cifar10_utils.open_checkpoint(checkpoint, '--checkpoint')
  if flags.list:
    checkpoint_variables.print_table(checkpoint_variables.list_all(reader))
  elif flags.convert:
    count = checkpoint_variables.convert(reader, checkpoint, flags.convert)
    print('%s: %d variables' % (flags.convert, count))
  else:
    run = (classify_pictures if flags.images else
           export_model if flags.export else extract_features)
    with tf.Graph().as_default():
      # What is not restored is random, but the same when an extraction resumes.
      tf.set_random_seed(0)
      run(flags, checkpoint)


if __name__ == '__main__':
  use_graph_mode()
  tf.logging.set_verbosity(tf.logging.INFO)
  usage.run(build_parser(), main)
