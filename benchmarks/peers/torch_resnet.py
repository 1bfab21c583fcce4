"""ResNet on 32x32 pictures in PyTorch: examples/s of training and evaluation.

  python torch_resnet.py --num-layers 20 --batch-size 128 --steps 30 [--compile]

The same work as cifar10_main.py: pictures in memory as uint8, padded crop and
mirror on whole batches, the same network (padded shortcuts, 11 logits), SGD
with momentum 0.9, weight decay 2e-4 on every parameter, float32. channels_last,
PyTorch's faster layout on a CPU. Prints one JSON line.
"""
import argparse
import json
import time

import torch
from torch import nn
from torch.nn import functional as F


class Unit(nn.Module):
  """conv-BN-ReLU-conv-BN, add, ReLU; shortcut pooled and padded."""

  def __init__(self, channels_in, channels_out, stride):
    super().__init__()
    self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(channels_out, eps=1e-5, momentum=0.003)
    self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(channels_out, eps=1e-5, momentum=0.003)
    self.stride = stride
    self.pad = (channels_out - channels_in) // 2

  def forward(self, x):
    y = F.relu(self.bn1(self.conv1(x)), inplace=True)
    y = self.bn2(self.conv2(y))
    if self.stride != 1:
      x = F.avg_pool2d(x, self.stride)
    if self.pad:
      x = F.pad(x, (0, 0, 0, 0, self.pad, self.pad))
    return F.relu(x + y, inplace=True)


def build_network(num_layers):
  units = (num_layers - 2) // 6
  layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False),
            nn.BatchNorm2d(16, eps=1e-5, momentum=0.003), nn.ReLU(True)]
  channels = 16
  for width, stride in ((16, 1), (32, 2), (64, 2)):
    for i in range(units):
      layers.append(Unit(channels, width, stride if i == 0 else 1))
      channels = width
  layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 11)]
  return nn.Sequential(*layers)


def next_batch(images, labels, batch_size, training):
  """uint8 pictures in memory to a float batch, cropped and mirrored."""
  chosen = torch.randint(0, len(images), (batch_size,))
  x = images[chosen]
  if training:
    x = F.pad(x, (4, 4, 4, 4))
    rows = torch.randint(0, 9, (batch_size, 1)) + torch.arange(32)
    columns = torch.arange(32).repeat(batch_size, 1)
    flip = torch.rand(batch_size) < 0.5
    columns[flip] = columns[flip].flip(1)
    columns += torch.randint(0, 9, (batch_size, 1))
    picture = torch.arange(batch_size)[:, None, None]
    x = x[picture, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
  x = x.float().contiguous(memory_format=torch.channels_last)
  return x / 128 - 1, labels[chosen]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--num-layers', type=int, default=20)
  parser.add_argument('--batch-size', type=int, default=128)
  parser.add_argument('--steps', type=int, default=30)
  parser.add_argument('--warmup', type=int, default=5)
  parser.add_argument('--compile', action='store_true')
  parser.add_argument('--evaluate', action='store_true')
  args = parser.parse_args()

  torch.manual_seed(0)
  images = torch.randint(0, 256, (10000, 3, 32, 32), dtype=torch.uint8)
  labels = torch.randint(0, 10, (10000,))
  network = build_network(args.num_layers).to(
      memory_format=torch.channels_last)
  network.train(not args.evaluate)
  optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9,
                              weight_decay=2e-4)
  forward = torch.compile(network) if args.compile else network

  def step():
    x, y = next_batch(images, labels, args.batch_size, not args.evaluate)
    if args.evaluate:
      with torch.no_grad():
        return forward(x).argmax(1)
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(forward(x), y).backward()
    optimizer.step()
    return None

  for _ in range(args.warmup):
    step()
  start = time.perf_counter()
  for _ in range(args.steps):
    step()
  seconds = time.perf_counter() - start
  print(json.dumps({
      'examples_per_second': args.steps * args.batch_size / seconds,
      'version': torch.__version__}))


if __name__ == '__main__':
  main()
