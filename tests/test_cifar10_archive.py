"""cifar10_archive: what is not CIFAR-10 is refused, and does no harm."""
import contextlib
import gzip
import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading

import pytest
from conftest import ROOT

import cifar10_archive
from usage import UsageError

FOLDER = 'cifar-10-batches-py'


# ---- archives ----------------------------------------------------------------


def member(name, data=b'', **fields):
  """A TarInfo with the given fields, and its content."""
  info = tarfile.TarInfo(name)
  info.size = len(data)
  for field, value in fields.items():
    setattr(info, field, value)
  return info, data


def tar_gz(*members):
  """Bytes of a .tar.gz."""
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
    for info, data in members:
      tar.addfile(info, io.BytesIO(data))
  return buffer.getvalue()


def extract(tmp_path, data):
  """Extracts into tmp_path/inside/data; returns files of the folder."""
  data_dir = tmp_path / 'inside' / 'data'
  data_dir.mkdir(parents=True, exist_ok=True)
  (data_dir / 'a.tar.gz').write_bytes(data)
  cifar10_archive.extract(str(data_dir / 'a.tar.gz'), str(data_dir), FOLDER)
  return {path.name: path.read_bytes()
          for path in (data_dir / FOLDER).iterdir()}


GOOD = (member(FOLDER, type=tarfile.DIRTYPE), member(FOLDER + '/a', b'content'))


def test_files_of_the_folder_are_extracted(tmp_path):
  assert extract(tmp_path, tar_gz(*GOOD)) == {'a': b'content'}
  assert sorted(os.listdir(str(tmp_path / 'inside' / 'data'))) == [
      'a.tar.gz', FOLDER]


def test_an_incomplete_folder_is_filled_and_keeps_what_else_is_there(tmp_path):
  folder = tmp_path / 'inside' / 'data' / FOLDER
  folder.mkdir(parents=True)
  (folder / 'a').write_bytes(b'half')
  (folder / 'notes').write_bytes(b'mine')
  assert extract(tmp_path, tar_gz(*GOOD)) == {'a': b'content', 'notes': b'mine'}


BAD_MEMBERS = [
    member('../x', b'bad'),
    member(FOLDER + '/../../x', b'bad'),
    member(FOLDER + '/..', b'bad'),
    member('/tmp/cifar10-test-x', b'bad'),
    member(FOLDER + '//x', b'bad'),
    member(FOLDER + '/sub/x', b'bad'),
    member('x', b'bad'),
    member(FOLDER, b'bad'),
    member(FOLDER + '/x', type=tarfile.SYMTYPE, linkname='/etc/passwd'),
    member(FOLDER + '/x', type=tarfile.SYMTYPE, linkname='a'),
    member(FOLDER + '/x', type=tarfile.LNKTYPE, linkname=FOLDER + '/a'),
    member(FOLDER, type=tarfile.SYMTYPE, linkname='/tmp'),
    member(FOLDER + '/x', type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    member(FOLDER + '/x', type=tarfile.BLKTYPE, devmajor=7),
    member(FOLDER + '/x', type=tarfile.FIFOTYPE),
    member(FOLDER + '/x', type=tarfile.DIRTYPE),
    member('../x', type=tarfile.DIRTYPE),
]


@pytest.mark.parametrize('bad', BAD_MEMBERS, ids=lambda bad: '%s-%s' % (
    bad[0].name.replace('/', '_'), bad[0].type.decode()))
def test_a_bad_member_is_refused_by_name_and_nothing_remains(tmp_path, bad):
  with pytest.raises(UsageError) as e:
    extract(tmp_path, tar_gz(*GOOD, bad))
  assert repr(bad[0].name) in str(e.value)
  assert 'a.tar.gz' in str(e.value)
  found = [name for _, folders, files in os.walk(str(tmp_path))
           for name in folders + files]
  assert sorted(found) == ['a.tar.gz', 'data', 'inside']
  assert not os.path.exists('/tmp/cifar10-test-x')


def test_the_same_name_twice_is_refused(tmp_path):
  with pytest.raises(UsageError, match='twice'):
    extract(tmp_path, tar_gz(*GOOD, GOOD[1]))
  assert os.listdir(str(tmp_path / 'inside' / 'data')) == ['a.tar.gz']


def test_too_many_members_are_refused(tmp_path):
  with pytest.raises(UsageError, match='more than 100 members'):
    extract(tmp_path, tar_gz(*[member('%s/%d' % (FOLDER, i), b'')
                               for i in range(200)]))


@pytest.mark.parametrize('cut', [0, 1, 9, 40, -1])
def test_a_damaged_archive_is_refused(tmp_path, cut):
  data = tar_gz(member(FOLDER + '/a', os.urandom(5000)))
  with pytest.raises(UsageError, match='is not a whole .tar.gz'):
    extract(tmp_path, data[:cut] + (b'' if cut < 0 else b'rubbish'))
  assert os.listdir(str(tmp_path / 'inside' / 'data')) == ['a.tar.gz']


def bomb(header_type):
  """A .tar.gz of 1 MB whose one member unpacks to 1 GiB of zeros."""
  info, _ = member(FOLDER + '/data_batch_1', type=header_type)
  info.size = 2**30
  # gzip files can be strung together: a MiB of zeros, 1,024 times.
  return gzip.compress(info.tobuf()) + 1024 * gzip.compress(bytes(2**20))


EXTRACT_AND_MEASURE = """
import sys
import cifar10_archive
try:
  cifar10_archive.extract(sys.argv[1], sys.argv[2], sys.argv[3])
except cifar10_archive.UsageError as e:
  with open('/proc/self/status') as f:
    print([line.split()[1] for line in f if line.startswith('VmHWM')][0], e)
"""


@pytest.mark.parametrize('header_type', [
    tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_bomb_is_refused_in_little_memory_and_disk(tmp_path, header_type):
  archive = tmp_path / 'bomb.tar.gz'
  archive.write_bytes(bomb(header_type))
  output = subprocess.check_output(
      [sys.executable, '-c', EXTRACT_AND_MEASURE, str(archive), str(tmp_path),
       FOLDER], cwd=ROOT, universal_newlines=True)
  peak_kib, message = output.split(' ', 1)
  assert int(peak_kib) < 200 * 2**10
  assert 'bomb.tar.gz' in message
  assert str(2**30) in message or 'header' in message
  assert os.listdir(str(tmp_path)) == ['bomb.tar.gz']


def test_members_that_are_too_large_together_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(cifar10_archive, 'MAX_UNPACKED_BYTES', 8000)
  with pytest.raises(UsageError, match="member '%s/b' would make it 9000 bytes"
                     % FOLDER):
    extract(tmp_path, tar_gz(member(FOLDER + '/a', bytes(4000)),
                             member(FOLDER + '/b', bytes(5000))))


# ---- downloads ---------------------------------------------------------------


@contextlib.contextmanager
def serve(body, status=200, length=None):
  """An HTTP server on this host; yields its URL.

  Args:
    body: bytes of each answer.
    status: int, HTTP status.
    length: int, the Content-Length it claims; None for the real one, -1 for
      none at all.
  """
  class Handler(http.server.BaseHTTPRequestHandler):

    def do_GET(self):
      self.send_response(status)
      if length != -1:
        self.send_header('Content-Length',
                         str(len(body) if length is None else length))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *args):
      pass

  server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield 'http://127.0.0.1:%d/a.tar.gz' % server.server_port
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


def sha256(data):
  return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
  monkeypatch.setenv('no_proxy', '*')


BODY = os.urandom(200000)


@pytest.mark.parametrize('length', [None, -1])
def test_a_download_arrives_whole(tmp_path, length):
  path = tmp_path / 'a.tar.gz'
  with serve(BODY, length=length) as url:
    cifar10_archive.download(url, str(path), sha256(BODY))
  assert path.read_bytes() == BODY
  assert os.listdir(str(tmp_path)) == ['a.tar.gz']


def test_a_download_cut_short_leaves_nothing(tmp_path):
  with serve(BODY, length=300000) as url, pytest.raises(
      UsageError, match='ended after 200000 of 300000 bytes'):
    cifar10_archive.download(url, str(tmp_path / 'a'), sha256(BODY))
  assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize('status', [404, 500])
def test_an_http_error_names_the_address_and_leaves_nothing(tmp_path, status):
  with serve(b'no', status=status) as url, pytest.raises(UsageError) as e:
    cifar10_archive.download(url, str(tmp_path / 'a'), sha256(BODY))
  assert url in str(e.value)
  assert str(status) in str(e.value)
  assert os.listdir(str(tmp_path)) == []


def test_no_server_is_one_line_and_leaves_nothing(tmp_path):
  with serve(BODY) as url:
    pass
  with pytest.raises(UsageError, match='cannot be downloaded') as e:
    cifar10_archive.download(url, str(tmp_path / 'a'), sha256(BODY))
  assert '\n' not in str(e.value)
  assert os.listdir(str(tmp_path)) == []


def test_an_endless_download_is_stopped(tmp_path, monkeypatch):
  monkeypatch.setattr(cifar10_archive, 'MAX_UNPACKED_BYTES', 100000)
  with serve(BODY, length=-1) as url, pytest.raises(
      UsageError, match='more than 100000 bytes'):
    cifar10_archive.download(url, str(tmp_path / 'a'), sha256(BODY))
  assert os.listdir(str(tmp_path)) == []


def test_a_download_with_a_wrong_checksum_is_kept_aside(tmp_path):
  with serve(BODY) as url, pytest.raises(UsageError) as e:
    cifar10_archive.download(url, str(tmp_path / 'a'), sha256(b''))
  assert sha256(BODY) in str(e.value)
  assert sha256(b'') in str(e.value)
  assert os.listdir(str(tmp_path)) == ['a.bad']
  assert (tmp_path / 'a.bad').read_bytes() == BODY
