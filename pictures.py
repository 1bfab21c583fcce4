"""Pictures from files, and from numbers: text, a confusion matrix, a gallery.

Those that are drawn are numpy arrays: uint8 [height, width] or [height, width,
3].
"""
import numpy as np

from cifar10 import DEPTH, HEIGHT, WIDTH
from tf_compat import tf

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
JPEG_SIGNATURE = b'\xff\xd8\xff'
# A PNG of 50 KB can ask for gigabytes. This many take 150 MB, and twice that
# again in a progressive JPEG.
MAX_PIXELS = 50 * 10**6

# 3x5 letters: five rows of three bits, the top row in the highest bits.
GLYPHS = dict(zip('abcdefghijklmnopqrstuvwxyz0123456789-.>', [
    0o25755, 0o65656, 0o34443, 0o65556, 0o74647, 0o74644, 0o34553, 0o55755,
    0o72227, 0o11152, 0o55655, 0o44447, 0o57755, 0o65555, 0o25552, 0o65644,
    0o25573, 0o65655, 0o34216, 0o72222, 0o55557, 0o55552, 0o55775, 0o55255,
    0o55222, 0o71247, 0o25552, 0o26227, 0o61247, 0o61216, 0o55711, 0o74616,
    0o34652, 0o71122, 0o25252, 0o25316, 0o00700, 0o00002, 0o42124]))


# ---- from files --------------------------------------------------------------


def decode(contents):
  """A PNG or JPEG file's bytes, string [] -> uint8 [H, W, 3].

  Grey becomes RGB, 16 bits become 8, transparency and what EXIF says of the
  orientation are ignored. The size is read from the header and checked before
  anything is decoded.

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
    return tf.image.decode_png(contents, channels=DEPTH)  # or JPEG


def decode_picture(contents, height=HEIGHT, width=WIDTH):
  """`decode`, averaged down to float32 [height, width, 3] in [0, 255]."""
  # Averaging areas: a large picture must not be sampled at 32x32 points.
  # Rounded to what a file holds, because sums in float32 can exceed 255.
  return tf.round(tf.image.resize_images(decode(contents), [height, width],
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


# ---- from numbers ------------------------------------------------------------


def draw_text(text, scale=1):
  """bool [5 * scale, 4 * len(text) * scale]; unknown characters are blank."""
  rows = np.zeros([5, 4 * len(text)], bool)
  for i, character in enumerate(text.lower()):
    bits = GLYPHS.get(character, 0)
    for row in range(5):
      for column in range(3):
        rows[row, 4 * i + column] = bits >> (14 - 3 * row - column) & 1
  return enlarge(rows, scale)


def enlarge(picture, scale):
  """Nearest neighbour: each pixel becomes scale x scale pixels."""
  return picture.repeat(scale, 0).repeat(scale, 1)


def encode_png(picture):
  """PNG bytes of a uint8 picture [H, W], [H, W, 1] or [H, W, 3]."""
  picture = np.asarray(picture)
  with tf.Graph().as_default(), tf.Session() as session:
    return session.run(tf.image.encode_png(
        picture if picture.ndim == 3 else picture[..., np.newaxis]))


def draw_confusion_matrix(matrix, names, cell=24):
  """A picture of counts, true class per row, predicted class per column.

  Cells are as bright as the share of their row, and show it in percent.

  Args:
    matrix: int [C, C], examples of class i predicted as class j.
    names: list of C str.
    cell: int, pixels per cell.

  Returns:
    uint8 [H, W, 3].
  """
  margin = 8 + 8 * max(map(len, names))
  side = margin + cell * len(names)
  picture = np.full([side, side, 3], 255, np.uint8)
  share = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
  for i, name in enumerate(names):
    text = draw_text(name, 2)
    at = margin + cell * i + (cell - text.shape[0]) // 2
    _paint(picture, text, at, margin - 4 - text.shape[1])
    _paint(picture, np.rot90(text), margin - 4 - text.shape[1], at)
    for j in range(len(names)):
      y, x = margin + cell * i, margin + cell * j
      shade = int(255 * (1 - share[i, j]))
      picture[y:y + cell - 1, x:x + cell - 1] = (shade, shade, 255)
      if matrix[i, j]:
        percent = draw_text('%d' % round(100 * share[i, j]))
        _paint(picture, percent, y + (cell - 5) // 2,
               x + (cell - percent.shape[1]) // 2,
               255 if share[i, j] > 0.5 else 0)
  return picture


def draw_gallery(images, captions, columns=5, scale=3):
  """Pictures in a grid, each with one line of text below.

  Args:
    images: uint8 [N, H, W, 3].
    captions: list of N str.

  Returns:
    uint8 [rows * (H * scale + 10), columns * W * scale, 3].
  """
  height, width = [scale * n for n in images.shape[1:3]]
  rows = -(-len(images) // columns)
  picture = np.full([rows * (height + 10), columns * width, 3], 255, np.uint8)
  for i, (image, caption) in enumerate(zip(images, captions)):
    y, x = i // columns * (height + 10), i % columns * width
    picture[y:y + height, x:x + width] = enlarge(image, scale)
    _paint(picture, draw_text(caption)[:, :width], y + height + 2, x)
  return picture


def _paint(picture, mask, y, x, value=0):
  """Sets the pixels under a bool mask whose corner is at (y, x)."""
  picture[y:y + mask.shape[0], x:x + mask.shape[1]][mask] = value
