"""Gradients of each example; `tf.gradients` of a sum gives their sum."""
from tf_compat import tf


def per_example_gradients(loss_per_example, variables, vectorized=False):
  """Gradients of each example's loss, where `tf.gradients` would add them up.

  With batch norm in training mode an example's loss depends on the others in
  its batch, so its gradient does too; the sum is the batch's all the same.

  Args:
    loss_per_example: float [N].
    variables: list of variables; zero for those the loss does not depend on.
    vectorized: bool; all examples at once by `tf.vectorized_map`, which wants N
      times the memory, instead of one after the other.

  Returns:
    List of tensors [N] + shape, one per variable.
  """
  count = tf.shape(loss_per_example)[0]

  def gradients_of(index):
    # A product rather than loss_per_example[index], whose gradient
    # vectorized_map of 1.15 cannot convert.
    loss = tf.reduce_sum(loss_per_example * tf.one_hot(
        index, count, dtype=loss_per_example.dtype))
    return [tf.convert_to_tensor(g) for g in tf.gradients(
        loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)]

  indices = tf.range(count)
  if vectorized:
    return tf.vectorized_map(gradients_of, indices)
  return tf.map_fn(gradients_of, indices,
                   dtype=[v.dtype.base_dtype for v in variables],
                   parallel_iterations=1)


def per_example_gradient_norms(loss_per_example, variables):
  """Length of each example's gradient over all variables: float [N]."""
  squares = [tf.reduce_sum(tf.reshape(tf.square(g), [tf.shape(g)[0], -1]), 1)
             for g in per_example_gradients(loss_per_example, variables)]
  return tf.sqrt(tf.add_n(squares))
