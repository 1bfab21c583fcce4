"""Files that appear whole or not at all: temporary name, fsync, rename."""
import contextlib
import fcntl
import os
import shutil

from usage import UsageError

SUFFIX = '.unfinished'


def temporary_name(path):
  """'DIR/.NAME.unfinished', where `path` is written before it is whole."""
  folder, name = os.path.split(path)
  return os.path.join(folder, '.' + name + SUFFIX)


def fsync(path):
  """Waits until a file's data, or a folder's names, are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def remove(path):
  """Removes a file, or a folder with all in it; nothing if it is not there."""
  if os.path.isdir(path) and not os.path.islink(path):
    shutil.rmtree(path)
  else:
    with contextlib.suppress(FileNotFoundError):
      os.remove(path)


@contextlib.contextmanager
def whole_files(paths, superseded=()):
  """Yields a list of names to write to; they become `paths` at the end.

    with whole_files(['a.csv']) as (temporary,):
      with open(temporary, 'w') as f: ...

  If the block raises, nothing has changed. A killed process leaves only names
  that end in '.unfinished'.

  Args:
    paths: list of str, on one file system with their temporary names.
    superseded: existing files, removed before the first new one takes its name,
      so that a kill between two renames leaves files missing but never a mix of
      old and new.
  """
  temporaries = [temporary_name(path) for path in paths]
  folders = sorted({os.path.dirname(path) or '.' for path in paths})
  try:
    yield temporaries
    for temporary in temporaries:
      fsync(temporary)
    for path in superseded:
      os.remove(path)
    for folder in folders:
      fsync(folder)
    for temporary, path in zip(temporaries, paths):
      os.replace(temporary, path)
    for folder in folders:
      fsync(folder)
  finally:
    for temporary in temporaries:
      remove(temporary)


@contextlib.contextmanager
def whole_gfile(path, flag):
  """Yields a text file to write to, anywhere that tf.gfile knows.

  It becomes `path` at the end; if the block raises, nothing has changed.

  Args:
    path: str.
    flag: str, the flag to name in an error.

  Raises:
    UsageError: if the file cannot be written; before the block, where that is
      known by then.
  """
  # Only here, because TensorFlow takes seconds to load and 200 MB.
  from tf_compat import tf

  temporary = temporary_name(path)
  try:
    if tf.gfile.IsDirectory(path):
      raise UsageError('%s %s is a folder; expected a file' % (flag, path))
    try:
      with tf.gfile.GFile(temporary, 'w') as f:
        f.write('')  # creates the file
        f.flush()
        yield f
      tf.gfile.Rename(temporary, path, overwrite=True)
    finally:
      if tf.gfile.Exists(temporary):
        tf.gfile.Remove(temporary)
  except tf.errors.OpError as e:
    raise UsageError('%s %s cannot be written: %s' % (flag, path, e.message))


@contextlib.contextmanager
def locked(folder, flag):
  """Keeps a second process out of a folder; a dead owner holds no lock.

  Args:
    folder: str; one that is not on a local path, such as gs://, is not locked.
    flag: str, the flag to name in an error.

  Raises:
    UsageError: if another process holds the lock.
  """
  if '://' in folder:
    yield
    return
  descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UsageError('%s %s: another run is writing there' % (flag, folder))
    except OSError:
      pass  # some network file systems cannot lock folders
    yield
  finally:
    os.close(descriptor)  # and unlocks
