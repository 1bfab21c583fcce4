"""The CIFAR-10 archive: fetched, checked, unpacked and unpickled with care.

Archives and pickles can be made to write anywhere and to run any code when they
are read. Nothing here trusts them: what does not look like CIFAR-10 is refused,
in one line that names the file, before it takes much memory or disk.
"""
import contextlib
import gzip
import hashlib
import io
import os
import pickle
import pickletools
import tarfile
import zlib

import numpy as np
from six.moves import http_client, urllib
from tqdm import tqdm

import atomic_files
from usage import UsageError

# Limits in bytes; the real archive has 170 MB, unpacked 178 MB in 9 members, a
# batch 31 MB in 40,000 pickle opcodes.
MAX_UNPACKED_BYTES = 512 * 2**20
MAX_MEMBERS = 100
MAX_PICKLE_BYTES = 40 * 2**20
MAX_PICKLE_OPCODES = 10**6

CHUNK_BYTES = 2**16
TIMEOUT_SECS = 60


# ---- the file ----------------------------------------------------------------


def download(url, path, sha256):
  """Downloads `url` to `path`, which appears when it is whole and checked.

  Args:
    url: str.
    path: str.
    sha256: str, 64 hexadecimal digits; None for a file whose sum nobody knows.

  Raises:
    UsageError: if the server cannot be reached or answers with an error, if the
      answer is cut short, or if the checksum is wrong.
  """
  with atomic_files.whole_files([path]) as (temporary,):
    try:
      with contextlib.closing(urllib.request.urlopen(
          url, timeout=TIMEOUT_SECS)) as response:
        _save(response, temporary)
    except UsageError as e:
      raise UsageError('%s: %s' % (url, e))
    except (OSError, http_client.HTTPException) as e:
      raise UsageError('%s cannot be downloaded to %s: %s' % (url, path, e))
    if sha256:
      check_sha256(temporary, sha256, path)


def _save(response, filename):
  """Writes an HTTP response to a file, with a progress bar on a terminal."""
  length = response.length or 0  # 0: the server did not say
  received = 0
  with open(filename, 'wb') as f, tqdm(
      total=length or None, unit='B', unit_scale=True, disable=None) as bar:
    for chunk in iter(lambda: response.read(CHUNK_BYTES), b''):
      f.write(chunk)
      bar.update(len(chunk))
      received += len(chunk)
      if received > MAX_UNPACKED_BYTES:
        raise UsageError('sent more than %d bytes' % MAX_UNPACKED_BYTES)
  if received < length:
    raise UsageError('the download ended after %d of %d bytes; try again' %
                     (received, length))


def check_sha256(filename, expected, path=None):
  """Moves `filename` to `path`.bad unless its SHA-256 is the expected one.

  Args:
    filename: str, the file to read.
    expected: str, 64 hexadecimal digits.
    path: str, the name to speak of; `filename` if None.

  Raises:
    UsageError: naming both sums.
  """
  path = path or filename
  found = sha256_of(filename)
  if found != expected:
    os.replace(filename, path + '.bad')
    raise UsageError('%s: SHA-256 is %s, expected %s; the file was moved to '
                     '%s.bad' % (path, found, expected, path))


def sha256_of(filename):
  """SHA-256 of a file: 64 hexadecimal digits."""
  digest = hashlib.sha256()
  with open(filename, 'rb') as f:
    for chunk in iter(lambda: f.read(CHUNK_BYTES), b''):
      digest.update(chunk)
  return digest.hexdigest()


# ---- its members -------------------------------------------------------------


class _LimitedGzip(gzip.GzipFile):
  """Refuses to unpack too much, at once (a tar header) or altogether."""

  def read(self, size=-1):
    if not 0 <= size <= 2**20:
      raise UsageError('has a header of %d bytes' % size)
    data = gzip.GzipFile.read(self, size)
    _check_unpacked(self.tell())
    return data

  def seek(self, offset, whence=io.SEEK_SET):
    _check_unpacked(offset)
    return gzip.GzipFile.seek(self, offset, whence)


def _check_unpacked(size):
  if size > MAX_UNPACKED_BYTES:
    raise UsageError('has %d bytes unpacked, more than the %d allowed' %
                     (size, MAX_UNPACKED_BYTES))


def extract(archive, data_dir, folder, in_archive=None):
  """Unpacks the files of `folder`/ in a .tar.gz to `data_dir`/`folder`.

  `in_archive` is the folder's name in the archive if it is another one; '' for
  an archive of files without a folder.

  The folder appears when it is complete; files that are in it already are
  replaced or left alone.

  Raises:
    UsageError: naming the archive, and the member that is not a regular file
      directly in the folder or that is too large; nothing remains of it then.
  """
  target = os.path.join(data_dir, folder)
  temporary = atomic_files.temporary_name(target)
  atomic_files.remove(temporary)
  os.mkdir(temporary)
  try:
    with _LimitedGzip(archive) as unpacked, tarfile.open(
        fileobj=unpacked, mode='r:') as tar:
      _extract_members(tar, folder if in_archive is None else in_archive,
                       temporary)
      while unpacked.read(CHUNK_BYTES):
        pass  # to the end, where gzip keeps its own checksum
    _move_folder(temporary, target)
  except UsageError as e:
    raise UsageError('%s: %s' % (archive, e))
  except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as e:
    if getattr(e, 'errno', None):  # of the disk; those of gzip have no number
      raise
    raise UsageError('%s is not a whole .tar.gz: %s' % (archive, e))
  finally:
    atomic_files.remove(temporary)


def _extract_members(tar, folder, temporary):
  """Streams each member to the temporary folder, after it was checked."""
  total = 0
  for count, member in enumerate(tar):
    total += member.size
    if count >= MAX_MEMBERS:
      raise UsageError('has more than %d members' % MAX_MEMBERS)
    if total > MAX_UNPACKED_BYTES:
      raise UsageError('member %r would make it %d bytes unpacked; allowed are '
                       '%d' % (member.name, total, MAX_UNPACKED_BYTES))
    if member.isdir() and member.name == folder:
      continue
    name = os.path.basename(member.name)
    if (not member.isreg() or member.issparse() or name in ('', '.', '..') or
        member.name != os.path.join(folder, name)):
      raise UsageError('member %r is not a regular file in %s/; refused' %
                       (member.name, folder))
    if os.path.exists(os.path.join(temporary, name)):
      raise UsageError('member %r is there twice; refused' % member.name)
    _extract_file(tar.extractfile(member), os.path.join(temporary, name))


def _extract_file(source, filename):
  with open(filename, 'wb') as f:
    for chunk in iter(lambda: source.read(CHUNK_BYTES), b''):
      f.write(chunk)
    f.flush()
    os.fsync(f.fileno())


def _move_folder(temporary, target):
  """Renames a folder, or its files where there is an incomplete one."""
  if os.path.isdir(target):
    for name in os.listdir(temporary):
      os.replace(os.path.join(temporary, name), os.path.join(target, name))
    atomic_files.fsync(target)
  else:
    os.rename(temporary, target)
  atomic_files.fsync(os.path.dirname(target) or '.')


# ---- its pickles -------------------------------------------------------------


class _Dtype(object):
  """Stands for a numpy.dtype while unpickling; only plain kinds exist."""

  def __init__(self, code):
    self.value = np.dtype(_text(code))
    if self.value.kind not in 'biufcS':
      raise ValueError('arrays of dtype %r are refused' % _text(code))

  def __setstate__(self, state):
    # (version, byte order, subarray, names, fields, ...)
    if any(part is not None for part in state[2:5]):
      raise ValueError('structured arrays are refused')
    self.value = self.value.newbyteorder(_text(state[1]))


class _Array(object):
  """Stands for a numpy.ndarray while unpickling; filled by its state."""

  def __setstate__(self, state):
    _, shape, dtype, fortran_order, data = state
    # A view: state that is used many times must not multiply in memory.
    self.value = np.frombuffer(data, dtype.value).reshape(
        shape, order='F' if fortran_order else 'C')


class _Unpickler(pickle.Unpickler):
  """Builds numbers, strings, containers and plain numpy arrays, no more."""

  def __init__(self, data):
    super(_Unpickler, self).__init__(io.BytesIO(data), encoding='bytes')
    self._globals = _Globals()

  def find_class(self, module, name):
    return self._globals.find(module, name)


class _Globals(object):
  """The few globals that numpy 1 and 2 and Python 2 and 3 write.

  They are replaced by methods, which check what they are given; a pickle never
  gets hold of the real ones. The methods are not the unpickler's own: one that
  fails keeps its stack, and if that refers to the unpickler Python never frees
  either.
  """

  encoded_bytes = 0

  def find(self, module, name):
    module = module.replace('numpy._core', 'numpy.core')
    try:
      return {
          'numpy.ndarray': 'numpy.ndarray',
          'numpy.dtype': self._dtype,
          'numpy.core.multiarray._reconstruct': self._reconstruct,
          'numpy.core.multiarray.scalar': self._scalar,
          'numpy.core.numeric._frombuffer': self._frombuffer,
          '_codecs.encode': self._bytes,
          'builtins.bytes': self._bytes,
          'builtins.bytearray': self._bytes,
          '__builtin__.bytes': self._bytes,
          '__builtin__.bytearray': self._bytes,
      }[module + '.' + name]
    except KeyError:
      raise ValueError('it asks for %s.%s, which is refused' % (module, name))

  def _dtype(self, code, align=0, copy=0):
    del align, copy
    return _Dtype(code)

  def _reconstruct(self, array_type, shape, dtype):
    del dtype
    if array_type != 'numpy.ndarray' or shape != (0,):
      raise ValueError('an array that does not start empty is refused')
    return _Array()

  def _scalar(self, dtype, data):
    if dtype.value.itemsize > 16:
      raise ValueError('a number of %d bytes is refused' % dtype.value.itemsize)
    return np.frombuffer(data, dtype.value, count=1)[0]

  def _frombuffer(self, data, dtype, shape, order):
    array = _Array()
    array.__setstate__((1, shape, dtype, order == 'F', data))
    return array

  def _bytes(self, data=b'', encoding='latin1'):
    """bytes(), bytes(b'..') or encode('..', 'latin1'); never bytes(10**12)."""
    if isinstance(data, (bytes, bytearray)):
      return data
    if not isinstance(data, str) or encoding not in ('latin1', 'latin-1'):
      raise ValueError('bytes made from %s are refused' % type(data).__name__)
    # One long string encoded many times must not multiply in memory.
    self.encoded_bytes += len(data)
    if self.encoded_bytes > MAX_PICKLE_BYTES:
      raise ValueError('it holds too many bytes')
    return data.encode('latin1')


def _text(data):
  """str of an ASCII string that Python 2 pickled (bytes) or 3 (str)."""
  return data.decode('ascii') if isinstance(data, bytes) else str(data)


def _check_opcodes(data):
  """Refuses pickles that are broken, or small but large once loaded.

  Reads past arguments by their length: ten times as fast as pickletools.
  """
  position = 0
  for _ in range(MAX_PICKLE_OPCODES):
    code = data[position:position + 1]
    if code not in _OPCODES:
      raise ValueError('it is damaged, or not a pickle')
    name, size, length_bytes, lines = _OPCODES[code]
    start = position + 1
    position = start + size
    if length_bytes:
      position += int.from_bytes(data[start:position], 'little')
    for _ in range(lines):
      position = data.find(b'\n', position) + 1 or len(data)
    # The time that a number of many digits takes grows with their square.
    if lines and position - start > 1000 and name not in ('STRING', 'UNICODE'):
      raise ValueError('it has a number or name of more than 1000 characters')
    # The memo is a list as long as its highest index.
    if name in _PUTS and _PUTS[name](data[start:position]) > MAX_PICKLE_OPCODES:
      break
    if name == 'STOP':
      return
  raise ValueError('it has more than %d opcodes' % MAX_PICKLE_OPCODES)


def _argument_sizes(opcode):
  """(name, bytes that are there always, whether they count more, lines)."""
  size = opcode.arg.n if opcode.arg else 0
  length = {pickletools.TAKEN_FROM_ARGUMENT1: 1,
            pickletools.TAKEN_FROM_ARGUMENT4: 4,
            pickletools.TAKEN_FROM_ARGUMENT4U: 4,
            pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(size, 0)
  lines = 0
  if size == pickletools.UP_TO_NEWLINE:
    lines = 2 if opcode.arg is pickletools.stringnl_noescape_pair else 1
  return opcode.name, max(size, 0) + length, bool(length), lines


_OPCODES = {code.encode('latin1'): _argument_sizes(opcode)
            for code, opcode in pickletools.code2op.items()}
_PUTS = {'PUT': int,
         'BINPUT': lambda argument: int.from_bytes(argument, 'little'),
         'LONG_BINPUT': lambda argument: int.from_bytes(argument, 'little')}


def read_pickle_from_file(filename):
  """Reads one batch file of CIFAR-10.

  Differs from 2017: a restricted unpickler, because a plain one runs whatever
  code the file asks for; and the content is checked.

  Args:
    filename: str, a pickle written by Python 2 or 3.

  Returns:
    dict of bytes to values, with b'data', uint8 [N, 3072] (planes depth,
    height, width), and b'labels', list of N ints in [0, 10).

  Raises:
    UsageError: naming the file, if it is not such a pickle.
  """
  with open(filename, 'rb') as f:
    data = f.read(MAX_PICKLE_BYTES + 1)
  try:
    if len(data) > MAX_PICKLE_BYTES:
      raise ValueError('it has more than %d bytes' % MAX_PICKLE_BYTES)
    _check_opcodes(data)
    batch = _Unpickler(data).load()
    return _check_batch(batch)
  except Exception as e:
    # A broken pickle can raise nearly every kind of exception.
    problem = (str(e) or type(e).__name__).encode('unicode_escape').decode()
    raise UsageError('%s is not a CIFAR-10 batch: %s' %
                     (filename, problem[:200]))


def _check_batch(batch):
  """Returns the batch with keys as bytes and arrays as such, if it is one."""
  if not isinstance(batch, dict):
    raise ValueError('expected a dict, found %s' % type(batch).__name__)
  batch = {key.encode() if isinstance(key, str) else key:
           value.value if isinstance(value, _Array) else value
           for key, value in batch.items()}
  for key in (b'data', b'labels'):
    if key not in batch:
      raise ValueError('it has no %r' % key)

  images, labels = batch[b'data'], batch[b'labels']
  if (not isinstance(images, np.ndarray) or images.dtype != np.uint8 or
      images.ndim != 2 or images.shape[1] != 3072 or not len(images)):
    raise ValueError('data is %s %s, expected uint8 [N, 3072]' % (
        getattr(images, 'dtype', type(images).__name__),
        list(getattr(images, 'shape', ''))))
  if not isinstance(labels, (list, np.ndarray)) or len(labels) != len(images):
    raise ValueError('labels are not a list of %d numbers, one for each '
                     'picture' % len(images))
  for index, label in enumerate(labels):
    if not isinstance(label, (int, np.integer)) or not 0 <= label < 10:
      found = ('%.9g' % label if isinstance(label, (int, float, np.number)) else
               'a ' + type(label).__name__)
      raise ValueError('label %d (counted from 0) is %s, expected an integer '
                       'in [0, 10)' % (index, found))
  batch[b'labels'] = [int(label) for label in labels]
  return batch
